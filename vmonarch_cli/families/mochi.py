"""Mochi-1: joint attention over [video, valid text], every sample with its own number of text tokens."""

from __future__ import annotations

from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor, added_qkv, heads_of, split_out
from vmonarch_cli.families.base import Family, Shape, at_once, layers, mean_and_std, run_vae


class MochiMonarchProcessor(MonarchProcessor):
    """MochiAttnProcessor2_0."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states (B, N, channels), encoder_hidden_states (B, tokens, channels) -> both again."""
        tokens = encoder_hidden_states.shape[1]
        query, key, value = heads_of(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query = _apply_rotary(query, *image_rotary_emb)
            key = _apply_rotary(key, *image_rotary_emb)
        added = added_qkv(attn, encoder_hidden_states)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))

        out = self.attend(query, key, value, text_tokens=tokens, text_mask=attention_mask.bool())
        return split_out(attn, out.flatten(2, 3), tokens)


def _apply_rotary(x: torch.Tensor, freqs_cos: torch.Tensor, freqs_sin: torch.Tensor) -> torch.Tensor:
    """Mochi's rotary embedding of x (B, N, heads, D); the tables (N, heads, D / 2) are learned."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    first = (even * freqs_cos - odd * freqs_sin).to(x.dtype)
    second = (even * freqs_sin + odd * freqs_cos).to(x.dtype)
    return torch.stack([first, second], dim=-1).flatten(-2)


def _decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    config = pipeline.vae.config
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return run_vae(pipeline, (latents / config.scaling_factor).to(pipeline.vae.dtype))
    mean, std = mean_and_std(pipeline, latents)
    return run_vae(pipeline, (latents * std / config.scaling_factor + mean).to(pipeline.vae.dtype))


MOCHI = Family({"MochiAttnProcessor2_0": MochiMonarchProcessor}, layers("transformer_blocks.N.attn1"), at_once(_decode))
