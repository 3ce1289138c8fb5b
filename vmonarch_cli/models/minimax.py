"""MiniMax-H3, which makes video and sound in one packed sequence; figures from diffusers' class defaults, which are the
published configs.
"""

from __future__ import annotations

import math
from typing import Any

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config
from vmonarch_cli.models.shapes import Chunks, PackedRows

_FPS = 24
_SECONDS = (5, 15)
"""Shortest and longest clip that the pipeline makes, at its one frame rate."""
_FIXED: dict[str, Any] = {
    "embedded_guidance": True,
    "max_sequence_length": 512,  # as much of a prompt as a profile takes; the pipeline cuts off none
}
"""What all checkpoints have in common, and no config says."""


def _frames(chunk: int, latents: int, dropped: int) -> dict[str, Any]:
    """Which counts within the pipeline's seconds a VAE of such chunks can make."""
    least, most = (_FPS * seconds for seconds in _SECONDS)
    return {
        "min_frames": least + (latents - least) % chunk,
        "chunks": Chunks(frames=chunk, latents=latents, dropped=dropped, most_frames=most - (most - latents) % chunk),
    }


def _packed(sound_width: int) -> PackedRows:
    """A given frame has a row for the latents of each position, and one of what the text encoder sees there."""
    return PackedRows(fps=_FPS, sound_per_second=40, sound_channels=2, sound_width=sound_width, per_position=2)


MINIMAX_H3 = ModelEntry(
    alias="minimax-h3",
    title="MiniMax-H3",
    family="minimax-h3",
    pipeline="MiniMaxH3ModularPipeline",
    image_pipeline="MiniMaxH3ModularPipeline",
    hub_id="MiniMaxAI/MiniMax-H3",
    aliases=("h3",),
    licence="MiniMax-H3 Community",
    vae_spatial=16,
    latent_channels=24,
    packed=_packed(32),
    heads=56,
    head_dim=128,
    layers=50,
    ffn_dim=14336,
    text_dim=5120,
    transformer_params=33_122_992_896,
    text_encoder_params=33_357_390_064,  # Qwen3-VL 32B
    vae_params=2_603_868_984 + 151_321_489,  # of video and of sound
    **_frames(17, 5, 3),
    **_FIXED,
    defaults=Defaults(height=768, width=1344, num_frames=124, fps=_FPS, steps=50, guidance_scale=1.0, flow_shift=12.0),
)

ENTRIES = (MINIMAX_H3,)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    frames, dropped = vae.whole("clip_length", 17), vae.whole("token_drop", 3, least=0)
    temporal = math.prod(vae.wholes("temporal_downsample_factors", otherwise=(1, 2, 2, 1, 1, 1)))
    latents = -(-frames // temporal)
    if latents - dropped != 2:
        raise ModelError(
            f"the VAE of this MiniMax-H3 makes {latents} latent frames of {frames} and drops {dropped}, and its "
            "pipeline counts on 2 that are left"
        )
    return {
        "patch": config.wholes("patch_size", 3, (1, 2, 2)),
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers"),
        "ffn_dim": config.whole("ffn_dim"),
        "text_dim": config.whole("text_dim"),
        "latent_channels": config.whole("in_channels"),
        "vae_temporal": temporal,
        "vae_spatial": math.prod(vae.wholes("spatial_downsample_factors", otherwise=(2, 2, 2, 2, 1, 1))),
        "packed": _packed(config.whole("audio_in_channels", 32)),
        **_frames(frames, latents, dropped),
        **_FIXED,
    }


def transformer_config(entry: ModelEntry) -> dict[str, Any]:
    """Arguments of diffusers' MiniMaxH3Transformer3DModel that build its transformer, without its weights."""
    return {
        "num_attention_heads": entry.heads,
        "attention_head_dim": entry.head_dim,
        "hidden_size": entry.heads * entry.head_dim * 3 // 4,  # its heads are wider together than its rows
        "num_layers": entry.layers,
        "ffn_dim": entry.ffn_dim,
        "in_channels": entry.latent_channels,
        "audio_in_channels": 32 if entry.packed is None else entry.packed.sound_width,
        "patch_size": entry.patch,
        "text_dim": entry.text_dim,
    }


PIPELINES = (
    PipelineFacts(
        "MiniMaxH3ModularPipeline",
        "minimax-h3",
        "MiniMaxH3Transformer3DModel",
        (),
        _figures,
        negative="never",
        image_pipeline="MiniMaxH3ModularPipeline",
        text_with_image=True,
        caches=(),  # its blocks enter no cache_context and have no current_timestep
        takes_sigmas=False,  # its timesteps count up to 1, and its velocity points at the clip
        sound=True,
        last_image=True,
        modular=(
            *("transformer", "text_encoder", "tokenizer", "processor"),
            *("vae", "audio_vae", "scheduler", "audio_scheduler"),
        ),
        distilled=True,
        transformer_config=transformer_config,
    ),
)
