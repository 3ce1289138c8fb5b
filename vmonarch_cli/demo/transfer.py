"""Small tensors to a GPU while it works."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; a copy from the CPU to a GPU goes through pinned memory and waits for nothing.

    A plain `to`, as `torch.tensor(..., device="cuda")` does it, holds the host until all that it queued is done.
    """
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)
