"""Rotary embeddings that several families share, which diffusers has inside their own processors."""

from __future__ import annotations

import torch


def turned_by_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of x (B, N, heads, D), where channel i makes a pair with channel i + D / 2.

    cos, sin: (N, D), every angle twice. The result has the dtype that x and the tables have together.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos[None, :, None, :] + torch.cat((-second, first), dim=-1) * sin[None, :, None, :]


def turned_by_matrices(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of x (B, N, heads, D), where neighbouring channels make pairs; in float32.

    rope: a matrix (2, 2) for each pair, of a shape that x's pairs (B, N, heads, D / 2, 1, 2) take.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2).float()
    return (rope.float() * pairs).sum(dim=-1).reshape(*x.shape)
