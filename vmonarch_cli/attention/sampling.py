"""Dense attention measured on the tensors of a structured call, for an honest speedup beside it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from vmonarch_cli.attention.clock import Clock, Mark
from vmonarch_kernels import dense_attention

REPEATS_GPU = 3
"""Timed dense calls on a GPU, of which the median counts; on a CPU, where one is long, a single call."""


@dataclass(frozen=True)
class DenseSample:
    """Dense calls on the same q, k, v; read it after the clock has settled."""

    spans: list[tuple[Mark, Mark]]
    squares: torch.Tensor
    """(2,) float32: sum of squares of (structured - dense), and of dense."""

    def seconds(self) -> float:
        """Median time of one dense call."""
        return statistics.median(Clock.seconds(*span) for span in self.spans)

    def error(self) -> float:
        """Relative L2 error of the structured output."""
        difference, norm = self.squares.tolist()
        return float((difference / norm) ** 0.5) if norm > 0 else 0.0


def sample_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, clock: Clock) -> DenseSample:
    """Time dense attention on q, k, v and compare the structured ``out`` with it; all (B, N, heads, D).

    Nothing here waits for a GPU: a wait would leave it idle at the next layer and show up in the step's time.
    """
    spans: list[tuple[Mark, Mark]] = []
    dense = out
    for _ in range(REPEATS_GPU if clock.on_gpu else 1):
        start = clock.mark()
        dense = dense_attention(q, k, v)
        spans.append((start, clock.mark()))
    squares = torch.zeros(2, dtype=torch.float32, device=q.device)
    for head in range(q.shape[2]):  # one head at a time: a float32 copy of a long clip's output is gigabytes
        exact = dense[:, :, head].float()
        squares[0] += (out[:, :, head].float() - exact).square().sum()
        squares[1] += exact.square().sum()
    return DenseSample(spans, squares)
