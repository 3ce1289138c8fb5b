"""Cosmos-Predict 2.5, which makes a clip of text, of a first frame, or of the end of a video, with the same weights."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config

_PIPELINE = "Cosmos2_5_PredictBasePipeline"

COSMOS_25_2B = ModelEntry(
    alias="cosmos-predict2.5-2b",
    title="Cosmos-Predict2.5 2B",
    family="cosmos-2.5",
    pipeline=_PIPELINE,
    image_pipeline=_PIPELINE,
    video_pipeline=_PIPELINE,
    hub_id="nvidia/Cosmos-Predict2.5-2B",
    revision="diffusers/base/post-trained",
    aliases=("cosmos-2b", "cosmos"),
    licence="NVIDIA Open Model",
    max_grid=(128, 120, 120),
    has_flow_shift=False,
    heads=16,
    head_dim=128,
    layers=28,
    ffn_dim=4 * 2048,
    text_dim=28 * 3584,  # all layers of the text encoder, side by side
    transformer_params=2_059_174_912,
    text_encoder_params=8_292_166_656,  # Qwen2.5-VL 7B
    vae_params=126_892_531,
    defaults=Defaults(
        height=704,
        width=1280,
        num_frames=93,
        fps=16,
        steps=36,
        guidance_scale=7.0,
        negative_prompt=(
            "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, "
            "over-saturation, shaky footage, low resolution, grainy texture, pixelated images, poorly lit areas, "
            "underexposed and overexposed scenes, poor color balance, washed out colors, choppy sequences, jerky "
            "movements, low frame rate, artifacting, color banding, unnatural transitions, outdated special effects, "
            "fake elements, unconvincing visuals, poorly edited content, jump cuts, visual noise, and flickering. "
            "Overall, the video is of poor quality."
        ),
    ),
)

COSMOS_25_14B = COSMOS_25_2B.model_copy(
    update={
        "alias": "cosmos-predict2.5-14b",
        "title": "Cosmos-Predict2.5 14B",
        "hub_id": "nvidia/Cosmos-Predict2.5-14B",
        "aliases": ("cosmos-14b",),
        "heads": 40,
        "layers": 36,
        "ffn_dim": 4 * 5120,
        "transformer_params": 14_368_047_104,
    }
)

ENTRIES = (COSMOS_25_2B, COSMOS_25_14B)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    """Of the latents that the transformer takes one channel says which frames are given."""
    patch = config.wholes("patch_size", 3, (1, 2, 2))
    most = config.wholes("max_size", 3, (128, 240, 240))
    hidden = config.whole("num_attention_heads") * config.whole("attention_head_dim")
    doublings = vae.count_true("temperal_downsample")
    return {
        "patch": patch,
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers"),
        "ffn_dim": round(hidden * config.number("mlp_ratio")),
        "text_dim": config.whole("crossattn_proj_in_channels", 1024),
        "latent_channels": config.whole("out_channels", 16),
        "vae_temporal": 2**doublings,
        "vae_spatial": 2 ** vae.length("temperal_downsample"),
        "max_grid": tuple(size // side for size, side in zip(most, patch, strict=True)),
        "has_flow_shift": False,
    }


def transformer_config(entry: ModelEntry) -> dict[str, Any]:
    """Arguments of diffusers' CosmosTransformer3DModel that build this entry's transformer, without its weights.

    The published one puts a mask of padding beside its latents, for which it needs torchvision; here it is one of the
    channels that are given.
    """
    return {
        "in_channels": entry.latent_channels + 2,
        "out_channels": entry.latent_channels,
        "num_attention_heads": entry.heads,
        "attention_head_dim": entry.head_dim,
        "num_layers": entry.layers,
        "mlp_ratio": entry.ffn_dim / entry.hidden_dim,
        "patch_size": entry.patch,
        "rope_scale": (1.0, 3.0, 3.0),
        "concat_padding_mask": False,
        "extra_pos_embed_type": None,
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": entry.text_dim,
    }


PIPELINES = (
    PipelineFacts(
        _PIPELINE,
        "cosmos-2.5",
        "CosmosTransformer3DModel",
        ("prompt_embeds", "negative_prompt_embeds"),
        _figures,
        image_pipeline=_PIPELINE,
        video_pipeline=_PIPELINE,
        continues=5,
        caches=(),  # its transformer has none of diffusers' caches
        compiles=False,
        transformer_config=transformer_config,
    ),
)
