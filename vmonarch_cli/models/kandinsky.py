"""Kandinsky 5 Lite, the dense five-second model; the ten-second and Pro models have a sparse attention of their own."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config

_MAX_GRID = (128, 128, 128)  # of diffusers' Kandinsky5RoPE3D, which no config changes

KANDINSKY_5_LITE = ModelEntry(
    alias="kandinsky-5-lite",
    title="Kandinsky 5.0 T2V Lite 5s",
    family="kandinsky-5",
    pipeline="Kandinsky5T2VPipeline",
    hub_id="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    aliases=("kandinsky-5",),
    licence="MIT",
    max_grid=_MAX_GRID,
    heads=28,
    head_dim=64,
    layers=32,
    ffn_dim=7168,
    text_dim=3584,
    transformer_params=2_007_702_848,
    text_encoder_params=8_292_166_656 + 123_060_480,  # Qwen2.5-VL 7B, CLIP-L
    vae_params=246_478_803,
    defaults=Defaults(
        height=512,
        width=768,
        num_frames=121,
        fps=24,
        steps=50,
        guidance_scale=5.0,
        negative_prompt=(
            "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
            "walking backwards"
        ),
    ),
)

ENTRIES = (KANDINSKY_5_LITE,)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    head_dim = sum(config.wholes("axes_dims"))
    return {
        "patch": config.wholes("patch_size", 3),
        "heads": config.whole("model_dim") // head_dim,
        "head_dim": head_dim,
        "layers": config.whole("num_visual_blocks"),
        "ffn_dim": config.whole("ff_dim"),
        "text_dim": config.whole("in_text_dim"),
        "latent_channels": config.whole("out_visual_dim"),
        "vae_temporal": vae.whole("temporal_compression_ratio", 4),
        "vae_spatial": vae.whole("spatial_compression_ratio", 8),
        "max_grid": _MAX_GRID,
    }


def _from_image(config: Config, vae: Config) -> dict[str, Any]:
    """The pipeline gives the first four latent frames the statistics of those after them, so there must be five."""
    found = _figures(config, vae)
    return {**found, "min_frames": 4 * found["vae_temporal"] + 1}


_TEXT = ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens")
_CLASS = "Kandinsky5Transformer3DModel"

# Its pipelines enter no cache_context and have no current_timestep, and it names the blocks' input in its own way.
_CACHES = ()

PIPELINES = (
    PipelineFacts("Kandinsky5T2VPipeline", "kandinsky-5", _CLASS, _TEXT, _figures, negative="apart", caches=_CACHES),
    PipelineFacts(
        "Kandinsky5I2VPipeline",
        "kandinsky-5",
        _CLASS,
        _TEXT,
        _from_image,
        negative="apart",
        takes_image=True,
        caches=_CACHES,
    ),
)
