"""LTX-Video, and LTX-2, which makes sound with the frames."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config

_NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"

_EXTRA_FORWARDS = 2  # of LTX-2's pipeline: spatio-temporal guidance, and guidance by isolated modalities

_CONDITION, _CONDITION_2 = "LTXConditionPipeline", "LTX2ConditionPipeline"
_CONTINUED = 9  # frames of two latent ones

LTX_VIDEO = ModelEntry(
    alias="ltx-video",
    title="LTX-Video",
    family="ltx-video",
    pipeline="LTXPipeline",
    image_pipeline="LTXImageToVideoPipeline",
    hub_id="Lightricks/LTX-Video",
    aliases=("ltx",),
    licence="LTX-Video Open Weights",
    patch=(1, 1, 1),
    vae_temporal=8,
    vae_spatial=32,
    latent_channels=128,
    heads=32,
    head_dim=64,
    layers=28,
    ffn_dim=4 * 2048,
    max_sequence_length=128,
    min_steps=2,  # the schedule is stretched to end at a given noise level, which one step cannot
    transformer_params=1_923_385_472,
    text_encoder_params=4_762_310_656,
    vae_params=419_193_649,
    defaults=Defaults(
        height=512,
        width=704,
        num_frames=161,
        fps=24,
        steps=50,
        guidance_scale=3.0,
        negative_prompt=_NEGATIVE_PROMPT,
    ),
)

LTX_2 = LTX_VIDEO.model_copy(
    update={
        "alias": "ltx-2",
        "title": "LTX-2 19B",
        "family": "ltx-2",
        "pipeline": "LTX2Pipeline",
        "image_pipeline": "LTX2ImageToVideoPipeline",
        "video_pipeline": _CONDITION_2,
        "hub_id": "Lightricks/LTX-2",
        "aliases": ("ltx2",),
        "licence": "LTX-2 Community",
        "head_dim": 128,
        "layers": 48,
        "ffn_dim": 4 * 4096,
        "text_dim": 3840,
        "extra_forwards": _EXTRA_FORWARDS,
        "max_sequence_length": 1024,
        "transformer_params": 18_876_174_592,
        "text_encoder_params": 12_187_325_040,  # Gemma 3 12B
        "vae_params": 1_222_479_601,
        "defaults": LTX_VIDEO.defaults.model_copy(
            update={"width": 768, "num_frames": 121, "steps": 40, "guidance_scale": 4.0}
        ),
    }
)

ENTRIES = (LTX_VIDEO, LTX_2)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    hidden = config.whole("num_attention_heads") * config.whole("attention_head_dim")
    patch = config.whole("patch_size", 1)
    doublings = 2 ** vae.count_true("spatio_temporal_scaling")
    return {
        "patch": (config.whole("patch_size_t", 1), patch, patch),
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers"),
        "ffn_dim": 4 * hidden,
        "text_dim": config.whole("caption_channels"),
        "latent_channels": config.whole("in_channels"),
        "vae_temporal": vae.whole("temporal_compression_ratio", vae.whole("patch_size_t", 1) * doublings),
        "vae_spatial": vae.whole("spatial_compression_ratio", vae.whole("patch_size", 4) * doublings),
    }


def _ltx(config: Config, vae: Config) -> dict[str, Any]:
    return {**_figures(config, vae), "max_sequence_length": 128}


def _ltx_condition(config: Config, vae: Config) -> dict[str, Any]:
    """The pipeline has noise levels of its own, which no shift changes."""
    return {**_ltx(config, vae), "max_sequence_length": 256, "has_flow_shift": False}


def _ltx2(config: Config, vae: Config) -> dict[str, Any]:
    return {**_figures(config, vae), "max_sequence_length": 1024, "extra_forwards": _EXTRA_FORWARDS}


_TEXT = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")

_CACHES_2 = ("pab", "taylorseer")  # first-block does not know what these blocks return

PIPELINES = (
    PipelineFacts(
        "LTXPipeline",
        "ltx-video",
        "LTXVideoTransformer3DModel",
        _TEXT,
        _ltx,
        guidance_by_batch=True,
        fuses=True,
        image_pipeline="LTXImageToVideoPipeline",
    ),
    PipelineFacts(
        "LTXImageToVideoPipeline",
        "ltx-video",
        "LTXVideoTransformer3DModel",
        _TEXT,
        _ltx,
        guidance_by_batch=True,
        fuses=True,
        takes_image=True,
    ),
    PipelineFacts(
        "LTX2Pipeline",
        "ltx-2",
        "LTX2VideoTransformer3DModel",
        _TEXT,
        _ltx2,
        guidance_by_batch=True,
        caches=_CACHES_2,
        sound=True,
        image_pipeline="LTX2ImageToVideoPipeline",
        video_pipeline=_CONDITION_2,
    ),
    PipelineFacts(
        "LTX2ImageToVideoPipeline",
        "ltx-2",
        "LTX2VideoTransformer3DModel",
        _TEXT,
        _ltx2,
        guidance_by_batch=True,
        caches=_CACHES_2,
        sound=True,
        takes_image=True,
    ),
    PipelineFacts(
        _CONDITION,
        "ltx-video",
        "LTXVideoTransformer3DModel",
        _TEXT,
        _ltx_condition,
        guidance_by_batch=True,
        fuses=True,
        takes_sigmas=False,
        image_pipeline=_CONDITION,
        video_pipeline=_CONDITION,
        continues=_CONTINUED,
    ),
    PipelineFacts(
        _CONDITION_2,
        "ltx-2",
        "LTX2VideoTransformer3DModel",
        _TEXT,
        _ltx2,
        guidance_by_batch=True,
        caches=_CACHES_2,
        sound=True,
        image_pipeline=_CONDITION_2,
        video_pipeline=_CONDITION_2,
        continues=_CONTINUED,
    ),
)
