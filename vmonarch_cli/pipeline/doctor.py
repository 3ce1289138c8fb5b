"""What this machine has and whether it works: versions, GPU, ffmpeg, disk, and the kernels against the reference."""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any, Literal

from vmonarch_cli.machine.hardware import gpu_names
from vmonarch_cli.text import binary_size, counted, first_line

if TYPE_CHECKING:
    from vmonarch_cli.pipeline.self_test import SelfTest

Status = Literal["ok", "note", "broken"]
_LITTLE_DISK = 30 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the examination; only "broken" keeps vmonarch from working."""

    name: str
    value: str
    status: Status = "ok"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Every finding, whatever the ones before it were."""
    found: list[Finding] = []
    for name, find in EXAMINATIONS.items():
        try:
            found += find()
        except Exception as error:  # an examination must survive whatever is broken here
            found.append(Finding(name, f"{type(error).__name__}: {first_line(error, 'no message')}", "broken"))
    return found


def _python() -> list[Finding]:
    valid = sys.version_info >= (3, 11)
    value = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Finding("python", value if valid else f"{value}; 3.11 or later is needed", "ok" if valid else "broken")]


def _libraries() -> list[Finding]:
    """Versions, and whether what a run takes from each package can be imported."""
    from vmonarch_cli.pipeline.imports import OPTIONAL, import_parts, installed, why_import_failed

    found = []
    for name in ("torch", "transformers", "diffusers", *(name for name in OPTIONAL if installed(name))):
        try:
            import_parts(name)
            found.append(Finding(name, metadata.version(name)))
        except Exception as error:  # a missing shared library is an OSError, a wrong build an ImportError, ...
            found.append(Finding(name, f"cannot be imported: {why_import_failed(error)}", "broken"))
    try:
        found.append(Finding("triton", metadata.version("triton")))
    except metadata.PackageNotFoundError:
        found.append(Finding("triton", "not installed: attention runs by torch, slower on a GPU", "note"))
    return found


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds none"
        seen = f", though the driver names {gpu_names()[0]}" if gpu_names() else ""
        return [Finding("gpu", f"none: {why}{seen}; vmonarch runs on the CPU", "note")]
    found = [Finding("driver", f"{_driver()}, torch built for CUDA {torch.version.cuda}")]
    for index in range(torch.cuda.device_count()):
        found += _one_gpu(torch, index)
    return found


def _one_gpu(torch: Any, index: int) -> list[Finding]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    major, minor = properties.major, properties.minor
    old = (major, minor) < (8, 0)
    shared = getattr(properties, "shared_memory_per_block_optin", None) or properties.shared_memory_per_block
    needed = "; the kernels need 8.0 or later, attention runs by torch" if old else ""
    return [
        Finding(f"cuda:{index}", f"{properties.name}, {binary_size(free)} of {binary_size(total)} free"),
        Finding("capability", f"{major}.{minor}{needed}", "note" if old else "ok"),
        Finding("shared memory", f"{binary_size(shared)} a block, {properties.multi_processor_count} multiprocessors"),
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


def _ffmpeg() -> list[Finding]:
    """Whether ffmpeg is there and encodes, by a clip of two frames."""
    import imageio_ffmpeg
    import numpy as np

    from vmonarch_cli.media.ffmpeg import require_encoder
    from vmonarch_cli.media.read import read_clip
    from vmonarch_cli.media.write import write_clip

    require_encoder()
    version = imageio_ffmpeg.get_ffmpeg_version()
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(np.zeros((2, 32, 32, 3), np.uint8), Path(folder) / "test.mp4", 8)
        count = len(read_clip(path))
    return [Finding("ffmpeg", f"{version}, H.264 written and read", "ok" if count == 2 else "broken")]


def _disk() -> list[Finding]:
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
    return [Finding("hub cache", f"{value}{hint}", "note" if little else "ok")]


def _hub_cache() -> Path:
    """Where downloads go, as huggingface_hub decides it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _demo() -> list[Finding]:
    from vmonarch_cli.errors import ModelError
    from vmonarch_cli.models.registry import find_model

    try:
        entry, _ = find_model("demo")
    except ModelError as error:
        return [Finding("demo model", error.message, "broken")]
    params = entry.transformer_params + entry.text_encoder_params + entry.vae_params
    return [Finding("demo model", f"{params / 1e6:.1f} million parameters"), *_demo_adapters()]


def _demo_adapters() -> list[Finding]:
    """Whether the adapters that come with the demo model are for its weights."""
    from vmonarch_cli.errors import InputError
    from vmonarch_cli.models.demo import WEIGHTS
    from vmonarch_cli.models.tuned import check_base
    from vmonarch_cli.plan.tuned import brought, read

    found = []
    for path in brought(WEIGHTS):
        try:
            said = read(path).adapter
            check_base(said, str(path), WEIGHTS)
        except InputError as error:
            found.append(Finding("demo adapter", error.message, "broken"))
            continue
        sampling = f"{counted(said.steps, 'step')}, guidance {said.guidance_scale:g}"
        words = f"made for {said.preset_name}, {sampling}, {counted(said.num_frames, 'frame')}"
        found.append(Finding("demo adapter", words))
    return found


def _kernels() -> list[Finding]:
    from vmonarch_cli.pipeline.self_test import run_self_tests

    words, tests = run_self_tests()
    return [Finding("attention", words), *map(_judged, tests)]


def _dense() -> list[Finding]:
    """Packages of dense attention that are installed: whether they fit this GPU and are right, and what a run takes."""
    import torch

    from vmonarch_kernels import DenseUnavailable, dense_choices, dense_obstacle
    from vmonarch_kernels.dense_facts import PACKAGES, installed
    from vmonarch_kernels.dense_packages import check

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    tensors = (device, torch.bfloat16, 128)
    found = []
    for name, package in PACKAGES.items():
        if not installed(name):
            continue
        label = f"dense {name}"
        words = f"{package.title}, {package.distribution} {package.version}{', quantised' if package.quantised else ''}"
        obstacle = dense_obstacle(name, *tensors)
        if obstacle is not None:
            found.append(Finding(label, f"{words}: not used, {obstacle}", "note"))
            continue
        try:
            check(name, *tensors)
            found.append(Finding(label, f"{words}, agrees with softmax attention"))
        except DenseUnavailable as error:
            found.append(Finding(label, str(error), "broken"))
    if device.type == "cuda":
        chosen = dense_choices("auto", *tensors)
        others = f"; beside it there are {', '.join(chosen[1:])}" if chosen[1:] else ""
        hint = "" if found else '; on Hopper and Blackwell pip install "vmonarch[fa4]" is faster'
        found.append(Finding("dense attention", f"{chosen[0]} in bfloat16{others}{hint}"))
    return found


def _quantize() -> list[Finding]:
    """What `--quantize` can compute in on each GPU."""
    import torch

    from vmonarch_cli.errors import VmonarchError
    from vmonarch_cli.pipeline.imports import installed
    from vmonarch_cli.pipeline.quantize import check_quantize
    from vmonarch_cli.plan.setup import COMPUTED, STORED

    if not installed("torchao"):
        hint = 'fp8-storage alone, torchao is not installed: pip install "vmonarch[quantize]"'
        return [Finding("8-bit weights", hint, "note")]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = []
    for device in gpus or [torch.device("cpu")]:
        able = []
        for kind in COMPUTED:
            try:
                check_quantize(kind, device, torch.bfloat16)
                able.append(kind)
            except VmonarchError:
                continue
        computes = f"{' and '.join(able) or 'none'} compute{'' if len(able) > 1 else 's'} on {device}"
        found.append(Finding("8-bit weights", f"{computes}, {' and '.join(STORED)} store"))
    return found


def _judged(test: SelfTest) -> Finding:
    value = f"relative error {test.error:.1e} against the reference, {test.bound:.1e} allowed"
    return Finding(f"self-test {test.impl}", value, "ok" if test.passed else "broken")


EXAMINATIONS: dict[str, Callable[[], list[Finding]]] = {
    "python": _python,
    "libraries": _libraries,
    "gpu": _gpu,
    "ffmpeg": _ffmpeg,
    "hub cache": _disk,
    "demo model": _demo,
    "attention": _kernels,
    "dense attention": _dense,
    "8-bit weights": _quantize,
}
"""What is examined, in order, and the function that does it; one that fails is itself a finding under its name."""
