"""What this machine has and whether it works: versions, GPU, ffmpeg, disk, and the kernels against the reference."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vmonarch_cli.machine.hardware import gpu_names
from vmonarch_cli.text import binary_size, first_line

Status = Literal["ok", "note", "broken"]
_LITTLE_DISK = 30 << 30
_GRID, _HEADS, _HEAD_DIM = (5, 6, 8), 2, 64
_EAGER_FACTOR = 1.5
_ROUNDING = {"bfloat16": 4e-3, "float32": 1e-5}
"""What rounding of the output alone may cost."""


@dataclass(frozen=True)
class Check:
    """One line of the examination; only "broken" keeps vmonarch from working."""

    name: str
    value: str
    status: Status = "ok"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Check]:
    """Every check, whatever the ones before it found."""
    found: list[Check] = []
    for name, check in _CHECKS:
        try:
            found += check()
        except Exception as error:  # an examination must survive whatever is broken here
            found.append(Check(name, f"{type(error).__name__}: {first_line(error, 'no message')}", "broken"))
    return found


def _python() -> list[Check]:
    valid = sys.version_info >= (3, 11)
    value = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Check("python", value if valid else f"{value}; 3.11 or later is needed", "ok" if valid else "broken")]


def _libraries() -> list[Check]:
    found = []
    for name in ("torch", "diffusers", "transformers"):
        try:
            __import__(name)
            found.append(Check(name, metadata.version(name)))
        except Exception as error:  # a missing shared library is an OSError, a wrong build an ImportError, ...
            found.append(Check(name, f"cannot be imported: {first_line(error)}", "broken"))
    try:
        found.append(Check("triton", metadata.version("triton")))
    except metadata.PackageNotFoundError:
        found.append(Check("triton", "not installed: attention runs by torch, slower on a GPU", "note"))
    return found


def _gpu() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds none"
        seen = f", though the driver names {gpu_names()[0]}" if gpu_names() else ""
        return [Check("gpu", f"none: {why}{seen}; vmonarch runs on the CPU", "note")]
    found = [Check("driver", f"{_driver()}, torch built for CUDA {torch.version.cuda}")]
    for index in range(torch.cuda.device_count()):
        found += _one_gpu(torch, index)
    return found


def _one_gpu(torch: Any, index: int) -> list[Check]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    major, minor = properties.major, properties.minor
    old = (major, minor) < (8, 0)
    shared = getattr(properties, "shared_memory_per_block_optin", None) or properties.shared_memory_per_block
    needed = "; the kernels need 8.0 or later, attention runs by torch" if old else ""
    return [
        Check(f"cuda:{index}", f"{properties.name}, {binary_size(free)} of {binary_size(total)} free"),
        Check("capability", f"{major}.{minor}{needed}", "note" if old else "ok"),
        Check("shared memory", f"{binary_size(shared)} a block, {properties.multi_processor_count} multiprocessors"),
    ]


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - fixed
    except (OSError, subprocess.SubprocessError):
        return "version unknown"
    return (done.stdout.splitlines() or ["version unknown"])[0].strip()


def _ffmpeg() -> list[Check]:
    """Whether ffmpeg is there and encodes, by a clip of two frames."""
    import imageio_ffmpeg
    import numpy as np

    from vmonarch_cli.media.read import read_clip
    from vmonarch_cli.media.write import write_clip

    version = imageio_ffmpeg.get_ffmpeg_version()
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(np.zeros((2, 32, 32, 3), np.uint8), Path(folder) / "test.mp4", 8)
        count = len(read_clip(path))
    return [Check("ffmpeg", f"{version}, H.264 written and read", "ok" if count == 2 else "broken")]


def _disk() -> list[Check]:
    folder = _hub_cache()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    state = "" if folder.exists() else ", not made yet"
    writable = os.access(existing, os.W_OK)
    value = f"{folder}{state}, {binary_size(free)} free{'' if writable else ', cannot be written'}"
    little = free < _LITTLE_DISK or not writable
    hint = "; the smallest real model needs about 29 GB" if free < _LITTLE_DISK else ""
    return [Check("hub cache", f"{value}{hint}", "note" if little else "ok")]


def _hub_cache() -> Path:
    """Where downloads go, as huggingface_hub decides it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _demo() -> list[Check]:
    from vmonarch_cli.errors import ModelError
    from vmonarch_cli.models.registry import find_model

    try:
        entry, _ = find_model("demo")
    except ModelError as error:
        return [Check("demo model", error.message, "broken")]
    params = entry.transformer_params + entry.text_encoder_params + entry.vae_params
    return [Check("demo model", f"{params / 1e6:.1f} million parameters")]


def _kernels() -> list[Check]:
    """The implementation that a run would use, and the eager one, against the reference, in the dtype of a run."""
    import torch

    from vmonarch_cli.pipeline.device import dtype_name
    from vmonarch_kernels import resolve_impl

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    chosen = resolve_impl("auto", device, dtype, _HEAD_DIM)
    eager = _self_test_error(torch, "torch", device, dtype)
    rounding = _ROUNDING[dtype_name(dtype)]
    found = [Check("attention", f"{chosen} in {str(dtype).removeprefix('torch.')} on {device.type}")]
    found.append(_judged("torch", eager, 8 * rounding))
    if chosen != "torch":  # a kernel may err a little more than the eager algorithm in the same precision, not more
        error = _self_test_error(torch, chosen, device, dtype)
        found.append(_judged(chosen, error, max(rounding, _EAGER_FACTOR * eager)))
    return found


def _judged(impl: str, error: float, bound: float) -> Check:
    value = f"relative error {error:.1e} against the reference, {bound:.1e} allowed"
    return Check(f"self-test {impl}", value, "ok" if error <= bound else "broken")  # not a number is broken


def _self_test_error(torch: Any, impl: str, device: Any, dtype: Any) -> float:
    """The largest relative error of cold, banded and warm calls against the oracle in float32."""
    from vmonarch_cli.media.metrics import relative_error
    from vmonarch_kernels import monarch_attention

    generator = torch.Generator().manual_seed(0)
    shape = (1, math.prod(_GRID), _HEADS, _HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    wide = q.float(), k.float(), v.float()
    errors = []
    for steps, band, warm in ((2, None, False), (2, 0, False), (1, 1, True)):
        start = None
        if warm:
            _, start = monarch_attention(*wide, _GRID, impl="reference", return_l=True)
        out = monarch_attention(q, k, v, _GRID, num_steps=steps, band=band, l_prev=start, impl=impl)
        truth = monarch_attention(*wide, _GRID, num_steps=steps, band=band, l_prev=start, impl="reference")
        errors.append(relative_error(out.float(), truth))
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


_CHECKS: tuple[tuple[str, Callable[[], list[Check]]], ...] = (
    ("python", _python),
    ("libraries", _libraries),
    ("gpu", _gpu),
    ("ffmpeg", _ffmpeg),
    ("hub cache", _disk),
    ("demo model", _demo),
    ("attention", _kernels),
)
