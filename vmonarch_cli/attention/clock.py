"""Points in time on the device that does the work: CUDA events on a GPU, the monotonic clock on a CPU."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


class Clock:
    """Marks are cheap and never wait; the time between two marks may be read after ``settle``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Mark:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def settle(self) -> None:
        """Wait until every mark that this thread made so far has happened."""
        if self.on_gpu:
            torch.cuda.current_stream(self.device).synchronize()

    @staticmethod
    def seconds(start: Mark, stop: Mark) -> float:
        if isinstance(start, float) and isinstance(stop, float):
            return stop - start
        if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
            return float(start.elapsed_time(stop)) / 1e3
        raise TypeError("the two marks come from clocks of different devices")
