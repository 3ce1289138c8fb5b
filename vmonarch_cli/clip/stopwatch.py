"""What one clip takes: wall clock between phases, and memory at its peak."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Stopwatch:
    """Wall clock between phases, in seconds; waits for the GPU, so that a phase owns the work it started.

    It waits for the thread's own stream alone: what another thread does on the GPU meanwhile is none of its work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        last, self._last = self._last, self._now()
        return self._last - last

    def total(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()


def peak_memory(device: torch.device) -> tuple[int, str]:
    """(bytes, what they count) at the peak so far: of this clip on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "device"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
