"""AnyFlow, Wan's transformer with two timesteps: ``attn1`` sees only video tokens; ``attn2``, for text, stays stock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor, heads_of
from vmonarch_cli.families.base import Family, layers, patch_of
from vmonarch_cli.families.wan import decode_wan
from vmonarch_cli.models.base import Grid


class AnyFlowMonarchProcessor(MonarchProcessor):
    """AnyFlowAttnProcessor for ``attn1``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("AnyFlowMonarchProcessor", encoder_hidden_states, attention_mask)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = heads_of(attn, query, key, attn.to_v(hidden_states))
        if rotary_emb is not None:
            from diffusers.models.transformers.transformer_anyflow import apply_rotary_emb

            query = apply_rotary_emb(query.transpose(1, 2), rotary_emb["query"]).transpose(1, 2)
            key = apply_rotary_emb(key.transpose(1, 2), rotary_emb["key"]).transpose(1, 2)

        out = self.attend(query, key, value).flatten(2, 3).type_as(query)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def _grid(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Latents are (B, F, C, H, W)."""
    latents: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    frames, _, rows, columns = latents.shape[1:]
    p_t, p_h, p_w = patch_of(transformer.config)
    return frames // p_t, rows // p_h, columns // p_w


ANYFLOW = Family(
    {"AnyFlowAttnProcessor": AnyFlowMonarchProcessor},
    layers("blocks.N.attn1"),
    decode_wan,
    grid=_grid,
)
