"""Monarch attention with gradients, so that the demo transformer can learn to work with both kinds of attention.

The paper tunes its models with Monarch attention for 800 to 1,500 steps; the demo model's last training does the same
for a part of every batch. Plain differentiable tensor operations, made for short clips: the R factor of every frame is
held in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_cli.families.wan import WAN, WanMonarchProcessor


def structured_attention(
    q: Tensor, k: Tensor, v: Tensor, frames: int, *, own_frame: bool = False, settled: bool = False
) -> Tensor:
    """Two cold iterations and the first frame exact, as preset `paper` (algorithm of section 3 of the paper).

    Args:
        q: (B, N, heads, D) with N = frames x positions.
        k: as q.
        v: as q.
        frames: frames of the token grid.
        own_frame: every frame sees its own keys exactly besides, as with a band of 0 (this project's).
        settled: one iteration that starts from the L of two others, through which no gradient flows: what a warm start
            comes to once steps hardly differ.

    Returns:
        (B, N, heads, D), differentiable with respect to q, k and v.

    """
    scale = q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    # (B, heads, T, P, D)
    q5, k5, v5 = (x.unflatten(1, (frames, -1)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    o_own = lse_own = exact = None
    if own_frame:
        scores = (scale * q5) @ k5.mT
        lse_own = torch.logsumexp(scores.to(wide), dim=-1)
        o_own = (scores - lse_own[..., None]).exp().to(v.dtype) @ v5
        exact = torch.eye(frames, dtype=torch.bool, device=q.device)
        exact[0] = True  # the first frame is exact as a whole, so R serves the others alone
    beta = scale * q5
    iterations = 3 if settled else 2
    for step in range(iterations):
        scores = (beta @ k5.mT).to(wide)
        log_r = scores - torch.logsumexp(scores, dim=-1, keepdim=True)
        R = log_r.exp()
        c_l = (R * log_r).sum(-1)
        R = R.to(v.dtype)
        # One small matrix product per position: (B, heads, P, T_l, D) x (B, heads, P, D, T_k).
        alpha = (R @ k5).transpose(2, 3)
        logits = (q5.transpose(2, 3) @ alpha.mT).to(wide) * scale - c_l.transpose(2, 3)[..., None, :]
        if exact is None or lse_own is None:
            L, weight = torch.softmax(logits, dim=-1), None
        else:
            logits = logits.masked_fill(exact, float("-inf"))
            both = torch.softmax(torch.cat([logits, lse_own.transpose(2, 3)[..., None]], dim=-1), dim=-1)
            L, weight = both[..., :-1], both[..., -1:]
        if step < iterations - 1:
            L = L.detach() if settled else L
            gathered = L.mT.to(q.dtype) @ q5.transpose(2, 3)
            c_r = L.sum(-2)[..., None].clamp_min(0.1)
            beta = (scale * gathered / c_r).to(q.dtype).transpose(2, 3)
    out = L.to(v.dtype) @ (R @ v5).transpose(2, 3)
    if weight is not None and o_own is not None:
        out = out + weight.to(v.dtype) * o_own.transpose(2, 3)
    rest = out.permute(0, 3, 2, 1, 4)[:, 1:].flatten(1, 2)  # (B, N - P, heads, D)
    weights = torch.softmax(((scale * q5[:, :, 0]) @ k5.flatten(2, 3).mT).to(wide), dim=-1)
    first = (weights.to(v.dtype) @ v5.flatten(2, 3)).transpose(1, 2)
    return torch.cat([first, rest], dim=1)


class HalfStructured(WanMonarchProcessor):
    """Dense attention for the first half of a batch, and for the second, which holds the same clips, Monarch's.

    One quarter of the batch runs as preset `paper`, the last quarter nearly as preset `fast`. `frames` may be set anew
    before any call: compiled code does not depend on it.
    """

    def __init__(self, frames: int) -> None:
        super().__init__(torch.zeros(2, dtype=torch.int64))
        self.frames = frames

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        """(B, N, heads, D) each -> (B, N, heads, D)."""
        return _split_batch(self, q.to(v.dtype), k.to(v.dtype), v)


def _attend_in_parts(processor: HalfStructured, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    half, quarter, frames = q.shape[0] // 2, q.shape[0] * 3 // 4, processor.frames
    dense = F.scaled_dot_product_attention(q[:half].transpose(1, 2), k[:half].transpose(1, 2), v[:half].transpose(1, 2))
    paper = structured_attention(q[half:quarter], k[half:quarter], v[half:quarter], frames)
    fast = structured_attention(q[quarter:], k[quarter:], v[quarter:], frames, own_frame=True, settled=True)
    return torch.cat([dense.transpose(1, 2), paper, fast])


# Compiled by torch 2.11 for an H100, its output is right and its gradients are wrong by orders of magnitude.
_split_batch: Callable[[HalfStructured, Tensor, Tensor, Tensor], Tensor] = torch.compiler.disable(_attend_in_parts)


def halve_attention(transformer: Any, frames: int) -> HalfStructured:
    """Give every self-attention of a Wan transformer the `HalfStructured` processor that is returned, for batches of a
    multiple of 4.
    """
    processor = HalfStructured(frames)
    for attention in WAN.self_attentions(transformer).values():
        attention.set_processor(processor)
    return processor
