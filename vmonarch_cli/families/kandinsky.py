"""Kandinsky 5: ``self_attention`` of the visual blocks sees only video tokens; text blocks stay stock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor
from vmonarch_cli.families.base import Family, Shape, at_once, decode_scaled, layers, patch_of
from vmonarch_cli.models.base import Grid


class KandinskyMonarchProcessor(MonarchProcessor):
    """Kandinsky5AttnProcessor for dense checkpoints (those with NABLA, a sparse attention, are refused)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("KandinskyMonarchProcessor", encoder_hidden_states, sparse_params)
        query, key, value = (
            part(hidden_states).unflatten(-1, (attn.num_heads, -1))
            for part in (attn.to_query, attn.to_key, attn.to_value)
        )
        query = attn.query_norm(query.float()).type_as(query)
        key = attn.key_norm(key.float()).type_as(key)
        if rotary_emb is not None:
            query = _apply_rotary(query, rotary_emb).type_as(query)
            key = _apply_rotary(key, rotary_emb).type_as(key)

        result: torch.Tensor = attn.out_layer(self.attend(query, key, value).flatten(-2, -1))
        return result


def _apply_rotary(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotation matrices on pairs of channels; bfloat16, whatever x is, as the model was trained."""
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2).to(torch.float32)
    return (rope * pairs).sum(dim=-1).reshape(*x.shape).to(torch.bfloat16)


def _grid(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Latents are (B, F, H, W, C)."""
    latents: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    frames, rows, columns = latents.shape[1:4]
    p_t, p_h, p_w = patch_of(transformer.config)
    return frames // p_t, rows // p_h, columns // p_w


def _sparse(transformer: Any) -> str | None:
    """NABLA reorders the tokens in blocks of 8 x 8: another layout than the frames structured attention works on."""
    if transformer.config.attention_type == "nabla":
        return "its attention is sparse already (NABLA), with its tokens in blocks of 8 x 8"
    return None


def _decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    return decode_scaled(pipeline, latents.permute(0, 4, 1, 2, 3), shape)


KANDINSKY_5 = Family(
    {"Kandinsky5AttnProcessor": KandinskyMonarchProcessor},
    layers("visual_transformer_blocks.N.self_attention"),
    at_once(_decode),
    grid=_grid,
    obstacle=_sparse,
    prompt=lambda text: [text],  # its encode_prompt goes through the characters of a bare string
)
