"""LTX-Video and LTX-2: video tokens alone in ``attn1``. LTX-2's sound and cross-attentions stay stock."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from vmonarch_cli.attention.base import Family, Grid, MonarchProcessor, heads_of, layers, patch_of

Rotary = tuple[torch.Tensor, torch.Tensor]


class LTXMonarchProcessor(MonarchProcessor):
    """LTXVideoAttnProcessor for ``attn1``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("LTXMonarchProcessor", encoder_hidden_states, attention_mask)
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states)
        if image_rotary_emb is not None:
            from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

            query = apply_rotary_emb(query, image_rotary_emb)
            key = apply_rotary_emb(key, image_rotary_emb)
        query, key, value = heads_of(attn, query, key, value)

        out = self.attend(query, key, value).flatten(2, 3).to(query.dtype)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


class LTX2MonarchProcessor(MonarchProcessor):
    """LTX2AudioVideoAttnProcessor for the video's ``attn1``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Rotary | None = None,
        key_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("LTX2MonarchProcessor", encoder_hidden_states, attention_mask)
        out = self._attend(attn, hidden_states, attn.to_v(hidden_states), query_rotary_emb, key_rotary_emb)
        return _gate_and_project(attn, hidden_states, out)

    def _attend(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        value: torch.Tensor,
        query_rotary_emb: Rotary | None,
        key_rotary_emb: Rotary | None,
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(hidden_states))
        if query_rotary_emb is not None:
            query = _rotate(attn, query, query_rotary_emb)
            key = _rotate(attn, key, query_rotary_emb if key_rotary_emb is None else key_rotary_emb)
        query, key, value = heads_of(attn, query, key, value)
        return self.attend(query, key, value).flatten(2, 3).to(query.dtype)


class LTX2PerturbedMonarchProcessor(LTX2MonarchProcessor):
    """LTX2PerturbedAttnProcessor (LTX-2.3): some calls or samples skip the attention and keep the values."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Rotary | None = None,
        key_rotary_emb: Rotary | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("LTX2PerturbedMonarchProcessor", encoder_hidden_states, attention_mask)
        value = attn.to_v(hidden_states)
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and bool(torch.all(perturbation_mask == 0))
        if all_perturbed:
            return _gate_and_project(attn, hidden_states, value)
        out = self._attend(attn, hidden_states, value, query_rotary_emb, key_rotary_emb)
        if perturbation_mask is not None:
            out = torch.lerp(value, out, perturbation_mask)
        return _gate_and_project(attn, hidden_states, out)


def _rotate(attn: Any, x: torch.Tensor, freqs: Rotary) -> torch.Tensor:
    from diffusers.models.transformers import transformer_ltx2

    if attn.rope_type == "interleaved":
        rotated: torch.Tensor = transformer_ltx2.apply_interleaved_rotary_emb(x, freqs)
    else:
        rotated = transformer_ltx2.apply_split_rotary_emb(x, freqs)
    return rotated


def _gate_and_project(attn: Any, hidden_states: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Per-head gates, from the layer's input, and the output projection of out (B, N, channels)."""
    if attn.to_gate_logits is not None:
        gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))  # (B, N, heads); 1 where the logits are 0
        out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
    result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
    return result


def _grid(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Latents come packed as tokens; their shape comes beside them."""
    bound = inspect.signature(type(transformer).forward).bind_partial(transformer, *args, **kwargs).arguments
    p_t, p_h, p_w = patch_of(transformer.config)
    return bound["num_frames"] // p_t, bound["height"] // p_h, bound["width"] // p_w


LTX = Family({"LTXVideoAttnProcessor": LTXMonarchProcessor}, layers("transformer_blocks.N.attn1"), grid=_grid)
LTX2 = Family(
    {
        "LTX2AudioVideoAttnProcessor": LTX2MonarchProcessor,
        "LTX2PerturbedAttnProcessor": LTX2PerturbedMonarchProcessor,
    },
    layers("transformer_blocks.N.attn1"),
    grid=_grid,
)
