"""Mochi-1. Sides are multiples of 16: the pipeline takes 8, and its patch of 2 then cuts off an edge."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config

MOCHI_1 = ModelEntry(
    alias="mochi-1",
    title="Mochi 1 preview",
    family="mochi",
    pipeline="MochiPipeline",
    hub_id="genmo/mochi-1-preview",
    aliases=("mochi",),
    licence="Apache-2.0",
    vae_temporal=6,
    latent_channels=12,
    heads=24,
    head_dim=128,
    layers=48,
    ffn_dim=4 * 3072 * 2 // 3,
    max_sequence_length=256,
    min_steps=2,  # a part of its schedule is linear and a part quadratic
    transformer_params=10_027_677_744,
    text_encoder_params=4_762_310_656,
    vae_params=459_748_611,
    defaults=Defaults(height=480, width=848, num_frames=85, fps=30, steps=64, guidance_scale=4.5),
)

ENTRIES = (MOCHI_1,)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    patch = config.whole("patch_size")
    hidden = config.whole("num_attention_heads") * config.whole("attention_head_dim")
    return {
        "patch": (1, patch, patch),
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers"),
        "ffn_dim": 4 * hidden * 2 // 3,
        "text_dim": config.whole("text_embed_dim"),
        "max_sequence_length": config.whole("max_sequence_length", 256),
        "latent_channels": config.whole("in_channels"),
        "min_steps": 2,
        "vae_temporal": 6,
        "vae_spatial": 8,
    }


_TEXT = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")

PIPELINES = (
    PipelineFacts(
        "MochiPipeline",
        "mochi",
        "MochiTransformer3DModel",
        _TEXT,
        _figures,
        guidance_by_batch=True,
        compiles=False,
        takes_sigmas=False,
    ),
)
