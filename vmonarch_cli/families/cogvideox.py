"""CogVideoX 2b, 5b and 1.5: joint attention over [text, video]; padding is part of the text, as in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor, heads_of
from vmonarch_cli.families.base import Family, ForwardInputs, LatentClip, Shape, at_once, layers, patch_of
from vmonarch_cli.models.base import Grid, ModelEntry
from vmonarch_cli.models.cogvideox import transformer_config


class CogVideoXMonarchProcessor(MonarchProcessor):
    """CogVideoXAttnProcessor2_0 and its fused variant."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states (B, N, channels), encoder_hidden_states (B, tokens, channels) -> both again."""
        self.refuse("CogVideoXMonarchProcessor", attention_mask)
        tokens = encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(both).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(both), attn.to_k(both), attn.to_v(both)
        query, key, value = heads_of(attn, query, key, value)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query = _rotate_video(query, image_rotary_emb, tokens)
            key = _rotate_video(key, image_rotary_emb, tokens)

        out = self.attend(query, key, value, text_tokens=tokens, text_first=True).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, tokens:], out[:, :tokens]


def _rotate_video(x: torch.Tensor, rotary_emb: Any, text_tokens: int) -> torch.Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    video = apply_rotary_emb(x[:, text_tokens:], rotary_emb, sequence_dim=1)
    return torch.cat([x[:, :text_tokens], video], dim=1)


def _grid(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Latents are (B, F, C, H, W)."""
    latents: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    frames, _, rows, columns = latents.shape[1:]
    p_t, p_h, p_w = patch_of(transformer.config)
    return frames // p_t, rows // p_h, columns // p_w


def _decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    if shape is not None:  # 1.5 fills up its last temporal patch in front
        latents = latents[:, latents.shape[1] - ((shape[2] - 1) // pipeline.vae_scale_factor_temporal + 1) :]
    clip: torch.Tensor = pipeline.decode_latents(latents.to(pipeline.vae.dtype))
    return clip


def _latents(entry: ModelEntry, clip: LatentClip) -> tuple[int, ...]:
    return 1, clip.frames, entry.latent_channels, clip.height, clip.width


def _rotary(entry: ModelEntry, clip: LatentClip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The pipeline computes the rotary embedding; 2b has none."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    config = transformer_config(entry)
    if not config["use_rotary_positional_embeddings"]:
        return {}
    rows, columns = clip.height // entry.patch[1], clip.width // entry.patch[2]
    grid = {"grid_size": (rows, columns), "temporal_size": -(-clip.frames // entry.patch[0]), "device": device}
    if config["patch_size_t"] is None:
        crops: Any = ((0, 0), (rows, columns))
        embedding = get_3d_rotary_pos_embed(entry.head_dim, crops, **grid)
    else:
        largest = config["sample_height"] // entry.patch[1], config["sample_width"] // entry.patch[2]
        embedding = get_3d_rotary_pos_embed(entry.head_dim, None, grid_type="slice", max_size=largest, **grid)
    return {"image_rotary_emb": embedding}


COGVIDEOX = Family(
    {
        "CogVideoXAttnProcessor2_0": CogVideoXMonarchProcessor,
        "FusedCogVideoXAttnProcessor2_0": CogVideoXMonarchProcessor,
    },
    layers("transformer_blocks.N.attn1"),
    at_once(_decode),
    grid=_grid,
    forward=ForwardInputs(_latents, _rotary),
)
