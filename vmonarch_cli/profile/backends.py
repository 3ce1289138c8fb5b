"""Every dense attention that this machine has, as one call on (B, N, heads, D), and the float32 truth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vmonarch_cli.profile.results import QUANTISED
from vmonarch_kernels import dense_attention, dense_backends, dense_obstacle
from vmonarch_kernels.dense import is_quantised
from vmonarch_kernels.dense_facts import PACKAGES

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
MAX_EXACT_QUERIES = 16384
_SCORES_GPU, _SCORES_CPU = 1 << 28, 1 << 24  # float32 scores held at once: 1 GiB and 64 MiB


@dataclass(frozen=True)
class DenseBackend:
    """A dense attention by the name that tables show."""

    name: str
    attend: Attend
    note: str = ""


def installed_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[DenseBackend]:
    """Torch's SDPA backends of the device, then the packages that are installed and fit; the first call of each shows
    whether it works, and checks it.
    """
    names = [*dense_backends(device, dtype), *PACKAGES]
    return [
        DenseBackend(name, functools.partial(dense_attention, backend=name), _note(name))
        for name in names
        if dense_obstacle(name, device, dtype, head_dim) is None
    ]


def _note(name: str) -> str:
    return QUANTISED if is_quantised(name) else ""


class ExactSample:
    """Dense attention in float32 of some query tokens, evenly spread over the clip; all of them in a short clip.

    Scores are held for a few rows of one head at a time, so that it fits beside anything.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, queries: int = MAX_EXACT_QUERIES) -> None:
        """q, k, v: (B, N, heads, D)."""
        batch, tokens, heads, dim = q.shape
        self.stride = -(-tokens // queries)
        picked = q[:, :: self.stride]
        self.out = torch.empty(picked.shape, dtype=torch.float32, device=q.device)
        limit = _SCORES_GPU if q.device.type == "cuda" else _SCORES_CPU
        rows = max(1, limit // tokens)
        for b in range(batch):
            for h in range(heads):
                keys, values = k[b, :, h].float(), v[b, :, h].float()
                for first in range(0, picked.shape[1], rows):
                    part = slice(first, first + rows)
                    scores = (picked[b, part, h].float() * dim**-0.5) @ keys.T
                    self.out[b, part, h] = torch.softmax(scores, dim=-1) @ values

    @property
    def count(self) -> int:
        """Query tokens compared, per clip."""
        return self.out.shape[1]

    def error(self, out: Tensor) -> float:
        """Relative L2 error of an output (B, N, heads, D) on these queries."""
        return difference(out[:, :: self.stride], self.out)


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| over (B, N, heads, D), one head at a time in float32 (or wider, where both are)."""
    wide = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
    squares = torch.zeros(2, dtype=torch.float64, device=a.device)
    for head in range(a.shape[2]):
        x, y = a[:, :, head].to(wide), b[:, :, head].to(wide)
        squares[0] += (x - y).square().sum(dtype=torch.float64)
        squares[1] += y.square().sum(dtype=torch.float64)
    apart, size = squares.tolist()
    return float((apart / size) ** 0.5) if size > 0 else float(apart > 0)
