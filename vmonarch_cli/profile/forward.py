"""What one forward of a transformer takes, family by family, made from a model's entry alone: no weights, no text.

Imports no torch before it is called, so that flags can be checked against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.cogvideox import transformer_config as cogvideox_config
from vmonarch_cli.models.hunyuan import transformer_config as hunyuan_config
from vmonarch_cli.models.wan import transformer_config as wan_config

if TYPE_CHECKING:
    import torch

_POOLED_DIM = 768  # of CLIP-L, HunyuanVideo's second text encoder


@dataclass(frozen=True)
class Clip:
    """A clip in latents: frames, height and width."""

    frames: int
    height: int
    width: int


def clip_in_latents(entry: ModelEntry, height: int, width: int, num_frames: int) -> Clip:
    """A clip of that many pixels and frames, in whole patches: where latent frames do not fill the last patch, the
    pipelines add some.
    """
    frames = entry.grid(height, width, num_frames)[0] * entry.patch[0]
    return Clip(frames, height // entry.vae_spatial, width // entry.vae_spatial)


@dataclass(frozen=True)
class Forward:
    """How to call one family's transformer."""

    transformer: str
    """Class name in diffusers."""
    config: Callable[[ModelEntry], dict[str, Any]]
    """Arguments of the class for the entry's true size."""
    latents: Callable[[ModelEntry, Clip], tuple[int, ...]]
    """Shape of the latents, batch 1."""
    others: Callable[[ModelEntry, Clip, torch.device, torch.dtype], dict[str, Any]]
    """What it takes beside latents, timestep and text embeddings."""


def _channels_first(entry: ModelEntry, clip: Clip) -> tuple[int, ...]:
    return 1, entry.latent_channels, clip.frames, clip.height, clip.width


def _frames_first(entry: ModelEntry, clip: Clip) -> tuple[int, ...]:
    return 1, clip.frames, entry.latent_channels, clip.height, clip.width


def _nothing(entry: ModelEntry, clip: Clip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {}


def _rotary(entry: ModelEntry, clip: Clip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """CogVideoX's pipeline computes the rotary embedding; 2b has none."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    config = cogvideox_config(entry)
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


def _hunyuan(entry: ModelEntry, clip: Clip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    import torch

    mask = torch.zeros(1, entry.max_sequence_length, dtype=torch.bool, device=device)
    mask[:, : entry.max_sequence_length // 4] = True  # a prompt fills a part of the text's tokens
    return {
        "encoder_attention_mask": mask,
        "pooled_projections": torch.zeros(1, _POOLED_DIM, device=device, dtype=dtype),
        "guidance": torch.tensor([1000.0 * entry.defaults.guidance_scale], device=device, dtype=dtype),
    }


FORWARDS: dict[str, Forward] = {
    "WanPipeline": Forward("WanTransformer3DModel", wan_config, _channels_first, _nothing),
    "CogVideoXPipeline": Forward("CogVideoXTransformer3DModel", cogvideox_config, _frames_first, _rotary),
    "HunyuanVideoPipeline": Forward("HunyuanVideoTransformer3DModel", hunyuan_config, _channels_first, _hunyuan),
}
"""By the pipeline's class; the other families' whole models are not profiled."""
