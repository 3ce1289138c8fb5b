"""Compile every launch of the Triton implementation for a GPU that is not there, and print what came out.

    python tests/kernels/offline.py '{"arch": 80, "dtype": "bfloat16", "dim": 128}'

"calls" (of `calls`) and "kernels" restrict what is compiled, "frames" and "positions" set the shape. With "width",
channels of the residual stream, in the place of "dim" it compiles the fused operations (`fused_calls`). Runs the
package's own launches on meta tensors, with a driver that knows the target alone: kernels, tiles, argument
specialisation and options are those of a real call. Prints a JSON list, one entry for each compiled kernel. Needs a
process without TRITON_INTERPRET. tests/kernels/test_other_chips.py reads it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from vmonarch_kernels import Inputs, Options, configs, launch, launch_backward, launch_fused
from vmonarch_kernels.fused_spec import HeadNorm, Norm, Rotation, Term
from vmonarch_kernels.structure import L_DTYPE, Forward, empty_l, split_frames

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KB = 1024
# Architecture: (capability as torch gives it, multiprocessors, shared memory that a block may have, threads of a warp).
GPUS: dict[int | str, tuple[tuple[int, int], int, int, int]] = {
    80: ((8, 0), 108, 163 * KB, 32),
    86: ((8, 6), 82, 99 * KB, 32),
    89: ((8, 9), 128, 99 * KB, 32),
    90: ((9, 0), 132, 227 * KB, 32),
    100: ((10, 0), 148, 227 * KB, 32),
    120: ((12, 0), 170, 99 * KB, 32),
    "gfx90a": ((9, 0), 104, 64 * KB, 64),
    "gfx942": ((9, 4), 304, 64 * KB, 64),
    "gfx1100": ((11, 0), 48, 64 * KB, 32),
}


class Driver:
    """What Triton asks its driver for when it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Recorder:
    """A kernel whose launches are compiled and kept, or nothing at all where it is not ``asked`` for."""

    def __init__(self, kernel: Any, found: dict[int, tuple[Any, dict[str, Any]]], *, asked: bool) -> None:
        self.kernel, self.found, self.asked = kernel, found, asked

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_launch(*args: Any, **kwargs: Any) -> None:
            if not self.asked:
                return
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            self.found[id(compiled)] = compiled, kwargs

        return compile_launch


def calls(dtype: torch.dtype, dim: int, frames: int, positions: int) -> dict[str, Callable[[], object]]:
    """Calls that together launch every kernel in every form."""
    size = (1, frames * positions, 12, dim)

    def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, device="meta", dtype=dtype)

    q = meta(*size)
    extra = (meta(*size), meta(*size[:3], dtype=torch.float32))
    residual = (meta(*size, dtype=L_DTYPE), meta(1, positions, 12, frames, dtype=torch.float32))
    plain = Inputs(q, q, q, (frames, 1, positions))
    warm = Inputs(q, q, q, plain.grid, empty_l(split_frames(q, frames)), extra, residual)
    lse = meta(1, 12, frames, positions, dtype=torch.float32)
    turn = meta(4, dtype=torch.int32)
    of_frame = Forward(meta(1, positions, 12, dim), None, lse[:, :, :1])

    def backward(inputs: Inputs, options: Options, rows: int) -> Callable[[], object]:
        kept = Forward(q, None, lse[:, :, :rows] if rows else None)
        return lambda: launch_backward.monarch_backward_triton(inputs, options, kept, q)

    return {
        "cold": lambda: launch.monarch_triton(plain, Options(), False),
        "warm": lambda: launch.monarch_triton(warm, Options(1, first_frame=False, band=0), True),
        "band": lambda: launch.monarch_triton(warm, Options(2, band=1), True),
        "frame": lambda: launch.frame_triton(plain, 1, 0.1),
        "backward": backward(plain, Options(), 1),
        "backward warm": backward(warm, Options(1, first_frame=False, band=0), frames),
        "backward band": backward(warm, Options(2, band=1), frames),
        "backward frame": lambda: launch_backward.frame_backward_triton(warm, 1, 0.1, of_frame, of_frame.out),
        "refresh": lambda: launch.refresh_triton(warm, meta(*size), residual, 1, [2], 0.25, 0.1),
        "turn": lambda: launch.turn_triton(warm, meta(*size), residual, turn, 0.25, 0.1),
    }


def fused_calls(dtype: torch.dtype, width: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Calls of the fused operations on a residual stream of `width` channels, heads of 128."""

    def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, device="meta", dtype=dtype)

    heads, wide = width // 128, torch.float32
    stream = meta(1, tokens, width)
    q, k, _ = meta(1, tokens, 3 * width).chunk(3, dim=-1)
    shared, own = (Rotation(*(meta(1, tokens, h, 128, dtype=wide) for _ in range(2))) for h in (1, heads))
    of_sample = Term(meta(1, 1, width, dtype=wide), meta(width, dtype=wide))
    of_token = Term(meta(1, tokens, width), meta(width, dtype=wide))
    inner, per_head = (HeadNorm(meta(size), meta(size), 1e-6, size == 128) for size in (width, 128))
    affine = Norm(1e-6, meta(width, dtype=wide), meta(width, dtype=wide))

    def chain(*terms: Term | None, norm: Norm | None, e4m3: bool = False) -> Callable[[], object]:
        gate, scale, shift = terms
        return lambda: launch_fused.residual_norm(stream, stream, gate, norm, scale, shift, e4m3=e4m3)

    return {
        "heads, all": lambda: launch_fused.qk_norm_rope(q, k, heads, inner, shared),
        "heads, each": lambda: launch_fused.qk_norm_rope(q, k, heads, per_head, shared),
        "heads, own tables": lambda: launch_fused.qk_norm_rope(q, k, heads, inner, own),
        "heads, half": lambda: launch_fused.qk_norm_rope(
            q, k, heads, per_head, Rotation(shared.cos, shared.sin, "half")
        ),
        "modulation": lambda: launch_fused.residual_norm(stream, None, None, Norm(1e-6), of_sample, of_sample),
        "gate": chain(of_sample, None, None, norm=None),
        "gate and affine norm": chain(of_sample, None, None, norm=affine),
        "gate and modulation": chain(of_sample, of_sample, of_sample, norm=Norm(1e-6)),
        "gate and modulation in e4m3": chain(of_sample, of_sample, of_sample, norm=Norm(1e-6), e4m3=True),
        "gate and modulation of tokens": chain(of_token, of_token, of_token, norm=Norm(1e-6, kind="rms")),
        "gelu": lambda: launch_fused.gelu_tanh_(meta(1, tokens, 4 * width)),
        "swiglu": lambda: launch_fused.gated_activation(meta(1, tokens, 8 * width), "silu"),
        "geglu": lambda: launch_fused.gated_activation(meta(1, tokens, 8 * width), "gelu"),
    }


def loops(sass: str) -> Iterator[tuple[int, int]]:
    """(instructions, bytes that a thread spills in one turn) of every loop of a disassembly, by backward branches."""
    rows = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    for address, text in rows:
        target = re.search(r"\bBRA(?:\.\S+)?\s.*?0x([0-9a-f]+)", text)
        if target is None or int(target[1], 16) >= address:
            continue
        body = [row for at, row in rows if int(target[1], 16) <= at <= address]
        moved = (re.search(r"\b(?:LDL|STL)\b(?:\.(?:LU|64|128))*", row) for row in body)
        yield len(body), sum(16 if "128" in m[0] else 8 if "64" in m[0] else 4 for m in moved if m)


def describe(compiled: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Name, constants, shared memory and, of a CUDA kernel, registers and spills."""
    entry: dict[str, Any] = {
        "kernel": compiled.metadata.name,
        "constants": {name: value for name, value in options.items() if isinstance(value, bool | int | str)},
        "shared": compiled.metadata.shared,
    }
    if "cubin" in compiled.asm:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])

            def dump(what: str) -> str:
                command = [str(BIN / "cuobjdump"), what, str(cubin)]
                return subprocess.run(command, capture_output=True, text=True, check=True).stdout

            usage = dict(re.findall(r"(\w+):(\d+)", dump("-res-usage")))
            entry["registers"], entry["stack"] = int(usage["REG"]), int(usage["STACK"])
            entry["loops"] = list(loops(dump("-sass")))
    return entry


def compile_all(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What a request's launches compile to."""
    arch = request["arch"]
    capability, multiprocessors, shared, warp = GPUS[arch]
    on_amd = isinstance(arch, str)
    triton.runtime.driver.set_active(Driver(GPUTarget("hip" if on_amd else "cuda", arch, warp)))
    # The package asks torch for the chip, and gets this one.
    torch.version.hip = "6.4" if on_amd else None
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        multi_processor_count=multiprocessors, shared_memory_per_block_optin=shared
    )
    chip = configs.chip(torch.device("cuda", 0))
    launch.chip = lambda device: chip  # type: ignore[assignment]
    found: dict[int, tuple[Any, dict[str, Any]]] = {}
    modules = [launch.kernels, launch_backward.kernels, launch_fused.kernels]
    if not on_amd:
        from vmonarch_kernels import _hopper, _hopper_backward

        modules += [_hopper, _hopper_backward]
    for module in modules:
        for name in dir(module):
            if name.endswith("_kernel"):
                asked = name in request.get("kernels", (name,))
                setattr(module, name, Recorder(getattr(module, name), found, asked=asked))
    dtype = getattr(torch, request["dtype"])
    frames, positions = request.get("frames", 21), request.get("positions", 1560)
    if "width" in request:
        made = fused_calls(dtype, request["width"], frames * positions)
    else:
        made = calls(dtype, request["dim"], frames, positions)
    if "width" in request:
        x = torch.empty(frames * positions, request["width"], dtype=dtype, device="meta")
        made["rows in e4m3"] = lambda: launch_fused.quantize_rows(x)
        made["gelu in e4m3"] = lambda: launch_fused.quantize_rows(x, gelu=True)
    # Not every chip has e4m3.
    for name in request.get("calls", [name for name in made if "e4m3" not in name]):
        made[name]()
    return [describe(*one) for one in found.values()]


if __name__ == "__main__":
    print(json.dumps(compile_all(json.loads(sys.argv[1]))))
