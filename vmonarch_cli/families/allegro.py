"""Allegro: ``attn1`` sees only video tokens. Its pipeline gives no mask there, and a mask of a caller is refused."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor, heads_of
from vmonarch_cli.families.base import Family, Shape, at_once, layers


class AllegroMonarchProcessor(MonarchProcessor):
    """AllegroAttnProcessor2_0 for ``attn1``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("AllegroMonarchProcessor", encoder_hidden_states, attention_mask)
        query, key, value = heads_of(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb_allegro

            # It takes (B, heads, N, D).
            query = apply_rotary_emb_allegro(query.transpose(1, 2), *image_rotary_emb).transpose(1, 2)
            key = apply_rotary_emb_allegro(key.transpose(1, 2), *image_rotary_emb).transpose(1, 2)

        out = self.attend(query, key, value).flatten(2, 3).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        result: torch.Tensor = out / attn.rescale_output_factor
        return result


def _decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    clip: torch.Tensor = pipeline.decode_latents(latents.to(pipeline.vae.dtype))
    if shape is not None:
        height, width, num_frames = shape
        clip = clip[:, :, :num_frames, :height, :width]
    return clip


def _without_negative_prompt(pipeline: Any, arguments: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
    """Its call has a negative prompt as its default, and takes either that or the embeddings of one."""
    return nullcontext({**arguments, "negative_prompt": None})


ALLEGRO = Family(
    {"AllegroAttnProcessor2_0": AllegroMonarchProcessor},
    layers("transformer_blocks.N.attn1"),
    at_once(_decode),
    adjusted=_without_negative_prompt,
    always_tiled=True,
)
