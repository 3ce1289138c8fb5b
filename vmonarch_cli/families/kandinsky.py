"""Kandinsky 5 and 6: ``self_attention`` of the visual blocks sees only video tokens; text blocks stay stock.

In Kandinsky 6 a first frame that is given stands behind the clip's frames: its rows are exact. Sound stays stock.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor
from vmonarch_cli.attention.joint import Packed
from vmonarch_cli.families.base import Family, Shape, at_once, decode_scaled, layers, patch_of
from vmonarch_cli.families.rotary import turned_by_matrices
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
            query, key = (_turned_as_trained(x, rotary_emb) for x in (query, key))

        result: torch.Tensor = attn.out_layer(self.attend(query, key, value).flatten(-2, -1))
        return result


def _turned_as_trained(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Kandinsky 5's rotary embedding has values of bfloat16, whatever x is, as the model was trained."""
    return turned_by_matrices(x, rope).to(torch.bfloat16).type_as(x)


class Kandinsky6MonarchProcessor(MonarchProcessor):
    """Kandinsky6AttnProcessor of the video's self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        rotary_emb_kv: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("Kandinsky6MonarchProcessor", encoder_hidden_states, attn_mask)
        query, key, value = (
            part(hidden_states).unflatten(-1, (attn.num_heads, -1))
            for part in (attn.to_query, attn.to_key, attn.to_value)
        )
        query, key = attn.query_norm(query), attn.key_norm(key)
        if rotary_emb is not None:
            query = turned_by_matrices(query, rotary_emb).type_as(query)
        if rotary_emb_kv is not None:
            key = turned_by_matrices(key, rotary_emb_kv).type_as(key)

        result: torch.Tensor = attn.out_layer(self.attend(query, key, value).flatten(-2, -1))
        return result


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


def _packed(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Packed:
    """The frames that are made are of kind 0; a frame that is given has another kind and stands behind them.

    Where they stand otherwise, the grid is of one token, which fits no call, so that it runs dense and is counted so.
    """
    bound = inspect.signature(type(transformer).forward).bind_partial(transformer, *args, **kwargs).arguments
    frames, rows, columns = _grid(transformer, (), bound)
    kinds = bound.get("visual_token_type_ids")
    if kinds is None:
        return Packed((frames, rows, columns))
    given = kinds.cpu() != 0
    made = int((~given[0]).sum())
    if given[:, :made].any() or not given[:, made:].all():
        return Packed((1, 1, 1))
    return Packed((made, rows, columns), others=(frames - made) * rows * columns)


def _without_padding(found: dict[str, Any]) -> dict[str, Any]:
    """Text embeddings of the real tokens of one text: the pipeline's call takes no mask for embeddings, and would
    attend to padding.
    """
    embeddings, mask = found["prompt_embeds"], found["prompt_attention_mask"]
    kept = embeddings if mask is None else embeddings[:, mask[0]]
    return {"prompt_embeds": kept, "pooled_prompt_embeds": found["pooled_prompt_embeds"]}


def _decode_sound(pipeline: Any, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Latents (1, channels, length), by way of a spectrogram."""
    vae = pipeline.audio_vae
    spectrogram = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    samples = pipeline.vocoder(spectrogram.to(pipeline.vocoder.dtype), return_dict=False)[0]
    return samples, vae.config.sample_rate


KANDINSKY_5 = Family(
    {"Kandinsky5AttnProcessor": KandinskyMonarchProcessor},
    layers("visual_transformer_blocks.N.self_attention"),
    at_once(_decode),
    grid=_grid,
    obstacle=_sparse,
    prompt=lambda text: [text],  # its encode_prompt goes through the characters of a bare string
)
KANDINSKY_6 = Family(
    {"Kandinsky6AttnProcessor": Kandinsky6MonarchProcessor},
    layers("visual_transformer_blocks.N.video_dec_block.self_attention"),
    at_once(decode_scaled),
    packed=_packed,
    encoded=_without_padding,
    decode_sound=_decode_sound,
)
