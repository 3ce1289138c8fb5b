"""The attention that a run would use, checked on small tensors against the reference in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.pipeline.device import dtype_name
from vmonarch_kernels import monarch_attention, resolve_impl

_GRID, _HEADS, _HEAD_DIM = (5, 6, 8), 2, 64
_EAGER_FACTOR = 1.5
_ROUNDING = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
"""What rounding of the output alone may cost."""


@dataclass(frozen=True)
class SelfTest:
    """One implementation against the reference."""

    impl: str
    error: float
    """Largest relative error of cold, banded and warm calls; not a number where a call returned one."""
    bound: float
    """Largest error allowed."""

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the bound."""
        return self.error <= self.bound


def run_self_tests() -> tuple[str, list[SelfTest]]:
    """('triton in bfloat16 on cuda', the eager implementation and the one that a run would use)."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    chosen = resolve_impl("auto", device, dtype, _HEAD_DIM)
    eager = _largest_error("torch", device, dtype)
    rounding = _ROUNDING[dtype]
    found = [SelfTest("torch", eager, 8 * rounding)]
    if chosen != "torch":  # a kernel may err a little more than the eager algorithm in the same precision, not more
        found.append(SelfTest(chosen, _largest_error(chosen, device, dtype), max(rounding, _EAGER_FACTOR * eager)))
    return f"{chosen} in {dtype_name(dtype)} on {device.type}", found


def _largest_error(impl: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of cold, banded and warm calls against the oracle in float32."""
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
