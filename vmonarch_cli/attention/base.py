"""What all replacement processors share.

A replacement repeats the stock processor's ``__call__``, signature included (models filter keyword arguments by
it), and changes only the attention call.
"""

from __future__ import annotations

from typing import Any

import torch

from vmonarch_cli.attention.op import differentiable_self_attention, self_attention

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class MonarchProcessor:
    """What the families share. Not an nn.Module: assigning one must not change the model's state dict.

    The two class attributes are read and set by diffusers (``set_attention_backend``, ``enable_parallelism``).
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, layer: torch.Tensor) -> None:
        self.layer = layer
        """Address of the layer (``op.address``), a tensor so that compiled graphs do not depend on it."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        text_tokens: int = 0,
        text_first: bool = False,
        text_mask: torch.Tensor | None = None,
        clips: int = 1,
    ) -> torch.Tensor:
        """(B, S, heads, D) each -> (B, S, heads, D).

        Joint text-video attention has ``text_tokens`` after the video's tokens, or before them with ``text_first``;
        ``text_mask``, bool (B, text_tokens), marks the real ones. With ``clips`` above 1 the video's tokens are those
        of several grids, one after the other, and count as one clip of that many times the frames.
        """
        if self._parallel_config is None:
            trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            run = differentiable_self_attention if trains else self_attention
            out: torch.Tensor = run(q, k, v, self.layer, text_tokens, text_first, text_mask, clips)
            return out
        if text_tokens:
            raise NotImplementedError("joint text-video attention has no context parallelism in diffusers: turn it off")
        from vmonarch_cli.attention.parallel import ulysses

        return ulysses(
            q, k, v, self._parallel_config, lambda *full: self_attention(*full, self.layer, 0, False, None, 1)
        )

    @staticmethod
    def refuse(name: str, *unexpected: object) -> None:
        """ValueError when a video-only layer got a context or a mask: structured attention takes neither."""
        if any(value is not None for value in unexpected):
            raise ValueError(f"{name} does self-attention without a mask and got a context or a mask")


def heads_of(attn: Any, *tensors: torch.Tensor) -> Any:
    """(B, S, channels) -> (B, S, heads, D) for each tensor."""
    return tuple(x.unflatten(2, (attn.heads, -1)) for x in tensors)


def project(attn: Any, hidden_states: torch.Tensor) -> QKV:
    """q, k and v (B, S, channels) of a self-attention layer, fused or not."""
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return q, k, v
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def added_qkv(attn: Any, text: torch.Tensor) -> QKV:
    """q, k and v (B, tokens, heads, D) of the text in a dual-stream layer, normalised."""
    q, k, v = heads_of(attn, attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    k = k if attn.norm_added_k is None else attn.norm_added_k(k)
    return q, k, v


def split_out(attn: Any, out: torch.Tensor, text_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output projections of (B, video + text, channels) where the layer has them: (video, text)."""
    video, text = out[:, :-text_tokens], out[:, -text_tokens:]
    if getattr(attn, "to_out", None) is not None:
        video = attn.to_out[1](attn.to_out[0](video))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text
