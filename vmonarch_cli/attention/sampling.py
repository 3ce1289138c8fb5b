"""Dense attention measured on the tensors of a structured call, for an honest speedup beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vmonarch_cli.attention.clock import Clock, Mark

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


def sample_dense(dense_call: Callable[[], torch.Tensor], out: torch.Tensor, clock: Clock) -> DenseSample:
    """Time a dense call and compare the structured ``out`` of the same tensors with its result, (B, S, heads, D).

    Nothing here waits for a GPU: a wait would leave it idle at the next layer and show up in the step's time.
    """
    spans: list[tuple[Mark, Mark]] = []
    dense = out
    for _ in range(REPEATS_GPU if clock.on_gpu else 1):
        start = clock.mark()
        dense = dense_call()
        spans.append((start, clock.mark()))
    squares = torch.zeros(2, dtype=torch.float32, device=out.device)
    for head in range(out.shape[2]):  # one head at a time: a float32 copy of a long clip's output is gigabytes
        exact = dense[:, :, head].float()
        squares[0] += (out[:, :, head].float() - exact).square().sum()
        squares[1] += exact.square().sum()
    return DenseSample(spans, squares)
