"""Motif-Video 2B: Wan 2.1's VAE, 12 dual-stream, 16 single-stream and 8 decoder blocks."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config

MOTIF_VIDEO_2B = ModelEntry(
    alias="motif-video-2b",
    title="Motif-Video 2B",
    family="motif-video",
    pipeline="MotifVideoPipeline",
    image_pipeline="MotifVideoImage2VideoPipeline",
    hub_id="Motif-Technologies/Motif-Video-2B",
    aliases=("motif-video",),
    licence="see its model card",
    vae_float32=True,
    heads=12,
    head_dim=128,
    layers=12 + 24,
    ffn_dim=4 * 1536,
    transformer_params=2_151_132_608,
    text_encoder_params=4_000_000_000,  # an estimate: the size of the Gemma 3 that it was made from
    vae_params=126_892_531,
    clips_attended=2,
    defaults=Defaults(height=736, width=1280, num_frames=121, fps=24, steps=50, guidance_scale=8.0),
)

ENTRIES = (MOTIF_VIDEO_2B,)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    patch = config.whole("patch_size")
    hidden = config.whole("num_attention_heads") * config.whole("attention_head_dim")
    return {
        "patch": (config.whole("patch_size_t"), patch, patch),
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers") + config.whole("num_single_layers"),
        "ffn_dim": int(config.number("mlp_ratio") * hidden),
        "text_dim": config.whole("text_embed_dim"),
        "latent_channels": config.whole("out_channels"),
        "vae_temporal": vae.whole("scale_factor_temporal", 4),
        "vae_spatial": vae.whole("scale_factor_spatial", 8),
        "vae_float32": True,
        "clips_attended": 2,
    }


def _from_image(config: Config, vae: Config) -> dict[str, Any]:
    return {**_figures(config, vae), "vae_float32": False}


_TEXT = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")

_CLASS = "MotifVideoTransformer3DModel"

_CACHES = ("pab", "taylorseer")  # first-block takes the text tokens of its decoder blocks for video

PIPELINES = (
    PipelineFacts(
        "MotifVideoPipeline",
        "motif-video",
        _CLASS,
        _TEXT,
        _figures,
        guider=True,
        caches=_CACHES,
        lora=False,
        image_pipeline="MotifVideoImage2VideoPipeline",
    ),
    PipelineFacts(
        "MotifVideoImage2VideoPipeline",
        "motif-video",
        _CLASS,
        _TEXT,
        _from_image,
        guider=True,
        caches=_CACHES,
        lora=False,
        takes_image=True,
        vae_in_dtype=True,
    ),
)
