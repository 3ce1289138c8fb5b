"""What the chip can do, measured in the same run as what is held against it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vmonarch_cli.profile.repeat import BURST_S, timed
from vmonarch_cli.profile.results import ChipPeak, Spread


def measure_chip(device: torch.device, dtype: torch.dtype) -> ChipPeak:
    """Floating-point rate of a large square product in `dtype`, and bandwidth of a copy (read and write).

    The sizes fill a GPU (8192, and 1 GiB) and keep a CPU busy for well under a second (1024, and 128 MiB).
    """
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty((1 << 30) if on_gpu else (1 << 27), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(a, b, out=product),
        "copy": lambda: target.copy_(source),
    }
    for run in calls.values():
        run()
    times = {name: Spread.of(values) for name, values in timed(calls, device, repeats=10, burst_s=BURST_S).items()}
    return ChipPeak(2 * side**3 / times["product"].median, 2 * source.nbytes / times["copy"].median)
