"""Tensors to measure on: plain noise, or noise with the two regularities of a video's tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["video", "random"]
FRAME_CORRELATION = 0.9
KEY_CORRELATION = 0.5

IN_WORDS = {
    "video": (
        f"synthetic video tokens, standard normal, correlated {FRAME_CORRELATION} from frame to frame "
        f"and {KEY_CORRELATION} between a query and its own key"
    ),
    "random": "independent standard normal numbers, on which no structured attention can be accurate",
}


def attention_inputs(
    kind: Kind, shape: tuple[int, int, int, int, int], *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, N, heads, D) of a `shape` (B, frames, positions, heads, D).

    Every entry is standard normal, so that both kinds cost a chip the same.
    """
    batch, frames, *frame_shape = shape
    generator = torch.Generator(device).manual_seed(seed)

    def noise() -> Tensor:
        x_BTPHD = torch.empty(batch, frames, *frame_shape, dtype=dtype, device=device)
        last = torch.zeros(batch, *frame_shape, device=device)
        keep = FRAME_CORRELATION if kind == "video" else 0.0
        for frame in range(frames):  # frame by frame: a float32 copy of a long clip would be gigabytes
            fresh = torch.randn(batch, *frame_shape, generator=generator, device=device)
            last = fresh if frame == 0 else keep * last + (1 - keep**2) ** 0.5 * fresh
            x_BTPHD[:, frame] = last
        return x_BTPHD.flatten(1, 2)

    q, k, v = noise(), noise(), noise()
    if kind == "video":
        k.mul_((1 - KEY_CORRELATION**2) ** 0.5).add_(q, alpha=KEY_CORRELATION)
    return q, k, v
