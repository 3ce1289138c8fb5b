"""Interleaved repeats: every contender once per round, so that a drifting clock or a busy machine meets all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from vmonarch_cli.attention.clock import Clock, Mark
from vmonarch_cli.text import first_line

MIN_ROUNDS = 3
BURST_S = 0.05
"""For short calls: with the power that another contender drew just before, a GPU's clock differs by up to a tenth."""
_LONGEST_BURST = 50


class OnWork(Protocol):
    """Gets what a profile is about to do."""

    def __call__(self, words: str, left: float | None = None) -> None:
        """`words`: a few. `left`: seconds until this part of the profile is done, as far as anybody knows."""


def unheard(words: str, left: float | None = None) -> None:
    """Nobody listens."""


T = TypeVar("T")


class Budget:
    """Wall-clock seconds that a run may take; without a limit nothing is ever late."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._began = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - self.spent

    def allows(self, seconds: float) -> bool:
        """Whether work that takes about this long still fits."""
        return self.left >= seconds


def timed(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    seconds: float = float("inf"),
    *,
    burst_s: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of each call in each round; the caller has run every call once.

    Rounds stop after `repeats`, or when `seconds` have passed and MIN_ROUNDS are done. Calls of a round are queued
    back to back, as a model queues its layers. On a GPU as many calls as take about `burst_s` run untimed, then as
    many timed, of which the mean counts; a call that takes longer runs once.
    """
    clock = Clock(device)
    bursts = {name: _burst(run, device, burst_s) for name, run in calls.items()}
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    began = time.monotonic()
    for index in range(repeats):
        if index >= min(MIN_ROUNDS, repeats) and time.monotonic() - began > seconds:
            break
        marks: dict[str, tuple[Mark, Mark]] = {}
        clock.settle()
        for name in order_of_round(names, index):
            for _ in range(bursts[name]):
                calls[name]()
            start = clock.mark()
            for _ in range(bursts[name] or 1):
                calls[name]()
            marks[name] = (start, clock.mark())
        clock.settle()
        for name, span in marks.items():
            found[name].append(Clock.seconds(*span) / (bursts[name] or 1))
    return found


def _burst(run: Callable[[], Any], device: torch.device, seconds: float) -> int:
    """How many calls take about `seconds`; 0 of one that takes longer."""
    if device.type != "cuda" or not seconds:
        return 0
    return min(_LONGEST_BURST, round(seconds / wall(run, device)[0]))


def order_of_round(contenders: Sequence[T], index: int) -> list[T]:
    """The contenders in a random order, which is the same in every process.

    A call is slower after one that heated the chip, so no contender may always follow the same other.
    """
    return random.Random(index).sample(contenders, len(contenders))


def wall(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds until the device is done, what the call returned)."""
    clock = Clock(device)
    clock.settle()
    began = time.perf_counter()
    result = run()
    clock.settle()
    return time.perf_counter() - began, result


def call_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call adds at its peak, output included; None where torch does not count (CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def reason(error: BaseException) -> str:
    """The first line of what went wrong, for a row that has no figures."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error, 'no message')}"[:200].rstrip(".")
