"""Outputs of every implementation of the attention on small shapes, as hashes and numbers.

`python tests/behaviour/kernel_outputs.py` prints them as JSON. Triton runs under its
interpreter, in float32 on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from vmonarch_kernels import Inputs, Options, Residual, frame_attention, monarch_attention

IMPLS = ("reference", "torch", "triton")
SHAPES: tuple[tuple[int, tuple[int, int, int], int, int], ...] = (
    (1, (5, 3, 7), 2, 16),
    (2, (3, 5, 5), 1, 40),
    (1, (7, 2, 3), 3, 64),
    (1, (1, 3, 5), 2, 32),
)
"""(batch, grid, heads, head dimension); none is a power of two throughout."""


def record() -> dict[str, dict[str, Any]]:
    """Name of a call -> {"numbers", "exact"}."""
    torch.set_num_threads(1)
    found = {}
    for name, outputs in _calls():
        numbers: dict[str, list[float]] = {}
        exact: dict[str, str] = {}
        for label, tensor in outputs.items():
            _summarise(label, tensor, numbers, exact)
        found[name] = {"numbers": numbers, "exact": exact}
    return found


def _summarise(label: str, tensor: Tensor, numbers: dict[str, list[float]], exact: dict[str, str]) -> None:
    """Shape, mean, spread, largest magnitude and three entries of a tensor, and its hash."""
    values = tensor.detach().to(torch.float64).contiguous()
    exact[label] = f"{tensor.dtype} " + hashlib.sha256(values.numpy().tobytes()).hexdigest()[:32]
    flat = values.flatten()
    of_all = values.mean(), values.std(correction=0), values.abs().max()
    shape = [float(size) for size in tensor.shape]
    figures = [float(f"{float(x):.6g}") for x in (*of_all, flat[0], flat[len(flat) // 2], flat[-1])]
    numbers[label] = [*shape, *figures]


def _calls() -> Iterator[tuple[str, dict[str, Tensor]]]:
    for number, (batch, grid, heads, dim) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(100 + number)
        tokens = grid[0] * grid[1] * grid[2]

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        q, k, v = (normal(batch, tokens, heads, dim) for _ in range(3))
        other = normal(batch, tokens, heads, dim), normal(batch, tokens, heads)
        for impl in IMPLS:
            where = f"{impl} {'x'.join(map(str, grid))}, batch {batch}, {heads} heads x {dim}"
            for name, outputs in _variants(q, k, v, grid, impl, other).items():
                yield f"{where}: {name}", outputs
            if grid[0] > 1:
                for name, outputs in _refreshed(q, k, v, grid, impl, other).items():
                    yield f"{where}: {name}", outputs


def _variants(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int, int],
    impl: str,
    extra: tuple[Tensor, Tensor],
) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}

    def call(name: str, **options: Any) -> Tensor:
        out, factor = monarch_attention(q, k, v, grid, impl=impl, return_l=True, **options)
        found[name] = {"out": out, "l": factor}
        return factor

    factor = call("as published")
    call("one iteration, no first frame", num_steps=1, first_frame=False)
    call("three iterations", num_steps=3, c_floor=0.3)
    call("band 0", band=0, num_steps=1)
    call("band 1, no first frame", band=1, first_frame=False)
    call("band over all", band=grid[0])
    call("warm", l_prev=factor, num_steps=1, band=0)
    call("extra keys and scale", extra=extra, scale=0.2, band=0)
    last = grid[0] - 1
    found["one frame"] = {"out": frame_attention(q, k, v, grid, last, impl=impl)}
    found["one frame, extra keys"] = {"out": frame_attention(q, k, v, grid, 0, impl=impl, extra=extra)}
    return found


def _refreshed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int, int],
    impl: str,
    extra: tuple[Tensor, Tensor],
) -> dict[str, dict[str, Tensor]]:
    """Four steps of a clip, whose tensors change a little from one to the next, with corrected frames."""
    found = {}
    for name, made, options in (
        ("refresh 1.5", {}, {"refresh": 1.5}),
        ("refresh 0.6 of 4 calls, every frame in turn", {"first_frame": False, "calls": 4}, {"refresh": 0.6}),
        ("refresh 1, band 0, extra keys", {"calls": 4}, {"refresh": 1, "band": 0, "extra": extra}),
    ):
        residual = Residual(q, grid[0], **made)
        spec = Options(first_frame=made.get("first_frame", True), band=options.get("band"))
        for step in range(4):
            turned = q * (1 - 0.05 * step) + k * 0.05 * step
            inputs = Inputs(turned, k, v, grid, extra=options.get("extra"))
            out, _ = residual.attention(inputs, spec, options["refresh"], impl=impl)
        guided, _ = residual.attention_without_turns(Inputs(k, q, v, grid), replace(spec, band=None), impl=impl)
        kept = residual.values.float()
        found[name] = {"out": out, "corrected": guided, "values": kept, "scale": residual.scale}
    return found


if __name__ == "__main__":
    json.dump(record(), sys.stdout)
