"""Which (query frame, key frame) pairs are exact, how L lies in memory, and the views every implementation shares.

Shape legend of this package: B batch, N tokens = T frames x P positions, H heads, D head
dimension; l query frames, k key frames, j query positions, i key positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vmonarch_kernels.cost import l_row_entries, window_frames

L_DTYPE = torch.float8_e4m3fn
L_SCALE = 256.0
"""Factor of a stored L, whose entries are at most 1: e4m3 has few bits below 1/64, and ends at 448."""


class Forward(NamedTuple):
    """What a call computes, with what its backward pass keeps."""

    out: Tensor
    """(B, N, H, D)"""
    l_new: Tensor | None
    """L as e4m3 (B, P, H, T, T), where it is wanted."""
    lse: Tensor | None
    """(B, H, T', P) float32 or wider, natural: log-sum-exp of every query's exact part, its extra part included. T' is
    T with a band and 1 for the first frame alone; None where neither is exact.
    """


class Gradients(NamedTuple):
    """Gradients of q, k, v and of the extra part (None without one), in their dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_out: Tensor | None = None
    extra_lse: Tensor | None = None


@dataclass(frozen=True)
class FrameGroup:
    """Query frames [first, first + count) and the key window of each: its start moves by ``stride``."""

    first: int
    count: int
    key_first: int
    stride: int


def window_start(frame: int, frames: int, band: int) -> int:
    """First key frame of a query frame's window, clamped so that every window is equally long."""
    return min(max(frame - band, 0), frames - window_frames(frames, band))


@lru_cache(maxsize=64)
def band_groups(frames: int, band: int, first_frame: bool) -> tuple[FrameGroup, ...]:
    """Split the query frames where the clamped window stops following them.

    Within a group the window either stands still (stride 0: one attention with more queries) or
    moves by one frame per query frame (stride 1: a batch over an overlapping view).
    With ``first_frame`` frame 0 is left out, because it sees every key frame.
    """
    first = 1 if first_frame else 0
    width = window_frames(frames, band)
    moving_first, moving_last = max(band + 1, first), frames - width + band - 1
    groups = [
        FrameGroup(first, min(band + 1, frames) - first, 0, 0),
        FrameGroup(moving_first, moving_last - moving_first + 1, moving_first - band, 1),
    ]
    tail = max(moving_first, moving_last + 1)
    groups.append(FrameGroup(tail, frames - tail, frames - width, 0))
    return tuple(group for group in groups if group.count > 0)


def exact_pairs(frames: int, band: int, first_frame: bool, device: torch.device) -> Tensor:
    """(T, T) bool, true where query frame l sees key frame k exactly (algorithm: the exact band)."""
    width = window_frames(frames, band)
    starts = torch.tensor([window_start(f, frames, band) for f in range(frames)], device=device)
    k = torch.arange(frames, device=device)
    pairs = (k >= starts[:, None]) & (k < starts[:, None] + width)
    if first_frame:
        pairs[0] = True
    return pairs


def merge_exact(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from its two parts; outs (..., D), lses (...)."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp()[..., None] for part in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


def empty_l(q_BTPHD: Tensor) -> Tensor:
    """An uninitialised L (B, P, H, T, T) for queries (B, T, P, H, D), its rows on multiples of L_ROW_ENTRIES."""
    batch, frames, positions, heads, _ = q_BTPHD.shape
    padded = q_BTPHD.new_empty((batch, positions, heads, frames, l_row_entries(frames)), dtype=L_DTYPE)
    return padded[..., :frames]


def with_padded_rows(l_BPHTT: Tensor) -> Tensor:
    """L in e4m3 as ``empty_l`` lays it out; the tensor itself where it is so already."""
    batch, positions, heads, frames, _ = l_BPHTT.shape
    row = l_row_entries(frames)
    strides = (positions * heads * frames * row, heads * frames * row, frames * row, row, 1)
    if l_BPHTT.stride() == strides and l_BPHTT.dtype == L_DTYPE:
        return l_BPHTT
    padded = l_BPHTT.new_zeros((batch, positions, heads, frames, row), dtype=L_DTYPE)
    padded[..., :frames] = l_BPHTT
    return padded[..., :frames]


def packed_residual(
    shape: Sequence[int], scale_shape: Sequence[int], device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A residual of zero as bytes, and their views (values, scale) of these shapes: one copy moves both."""
    entries = math.prod(shape)
    begin = -(-entries // 16) * 16  # kernels read best from multiples of 16 bytes
    packed = torch.zeros(begin + 4 * math.prod(scale_shape), dtype=torch.uint8, device=device)
    values, scale = packed[:entries].view(L_DTYPE), packed[begin:].view(torch.float32)
    return packed, (values.view(*shape), scale.view(*scale_shape))


def dequantised(values_BNHD: Tensor, scale_BPHT: Tensor, frames: int) -> Tensor:
    """The residual of every token in float32, (B, T, P, H, D), from 8 bits and a scale for each token and head."""
    return split_frames(values_BNHD.float(), frames) * scale_BPHT.permute(0, 3, 1, 2)[..., None]


def split_frames(x_BNHD: Tensor, frames: int) -> Tensor:
    """(B, N, H, D) -> (B, T, P, H, D), always a view."""
    frames_split: Tensor = x_BNHD.unflatten(1, (frames, -1))
    return frames_split
