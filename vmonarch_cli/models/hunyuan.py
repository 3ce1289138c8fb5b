"""HunyuanVideo and HunyuanVideo-1.5: figures from diffusers' class defaults, which are the published configs."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config

_LICENCE = "Tencent Hunyuan"
_CLIP_L_PARAMS = 123_060_480
_SIGLIP_PARAMS = 428_225_600  # image encoder of 1.5

HUNYUAN_VIDEO = ModelEntry(
    alias="hunyuan-video",
    title="HunyuanVideo",
    family="hunyuan-video",
    pipeline="HunyuanVideoPipeline",
    hub_id="hunyuanvideo-community/HunyuanVideo",
    aliases=("hunyuanvideo",),
    licence=_LICENCE,
    heads=24,
    head_dim=128,
    layers=20 + 40,
    ffn_dim=4 * 3072,
    max_sequence_length=256,
    embedded_guidance=True,
    transformer_params=12_821_012_544,
    text_encoder_params=7_505_186_816 + _CLIP_L_PARAMS,  # Llama 3 8B without its output layer, CLIP-L
    vae_params=246_478_803,
    defaults=Defaults(height=720, width=1280, num_frames=129, fps=24, steps=50, guidance_scale=6.0, flow_shift=7.0),
)

HUNYUAN_VIDEO_I2V = HUNYUAN_VIDEO.model_copy(
    update={
        "alias": "hunyuan-video-i2v",
        "title": "HunyuanVideo-I2V",
        "pipeline": "HunyuanVideoImageToVideoPipeline",
        "hub_id": "hunyuanvideo-community/HunyuanVideo-I2V",
        "aliases": ("hunyuanvideo-i2v",),
        "takes_image": True,
        "text_encoder_params": 8_355_272_704 + _CLIP_L_PARAMS,  # Llava on Llama 3 8B, CLIP-L
    }
)

HUNYUAN_VIDEO_15 = ModelEntry(
    alias="hunyuan-video-1.5",
    title="HunyuanVideo-1.5 480p",
    family="hunyuan-video-1.5",
    pipeline="HunyuanVideo15Pipeline",
    hub_id="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
    aliases=("hunyuanvideo-1.5", "hunyuan-video-1.5-480p"),
    licence=_LICENCE,
    patch=(1, 1, 1),
    vae_spatial=16,
    latent_channels=32,
    heads=16,
    head_dim=128,
    layers=54,
    ffn_dim=4 * 2048,
    text_dim=3584,
    max_sequence_length=1000,
    transformer_params=8_326_608_160,
    text_encoder_params=7_070_619_136 + 218_900_000,  # Qwen2.5-VL 7B without its image side and output layer, ByT5
    vae_params=1_260_634_115,
    defaults=Defaults(height=480, width=832, num_frames=121, fps=24, steps=50, guidance_scale=6.0, flow_shift=5.0),
)

HUNYUAN_VIDEO_15_I2V = HUNYUAN_VIDEO_15.model_copy(
    update={
        "alias": "hunyuan-video-1.5-i2v",
        "title": "HunyuanVideo-1.5 480p I2V",
        "pipeline": "HunyuanVideo15ImageToVideoPipeline",
        "hub_id": "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
        "aliases": ("hunyuanvideo-1.5-i2v", "hunyuan-video-1.5-i2v-480p"),
        "takes_image": True,
        "text_encoder_params": HUNYUAN_VIDEO_15.text_encoder_params + _SIGLIP_PARAMS,
    }
)

ENTRIES = (HUNYUAN_VIDEO, HUNYUAN_VIDEO_I2V, HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_15_I2V)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    hidden = config.whole("num_attention_heads") * config.whole("attention_head_dim")
    patch = config.whole("patch_size")
    return {
        "patch": (config.whole("patch_size_t"), patch, patch),
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers") + config.whole("num_single_layers", 0, least=0),
        "ffn_dim": int(config.number("mlp_ratio") * hidden),
        "text_dim": config.whole("text_embed_dim"),
        "latent_channels": config.whole("out_channels"),
        "vae_temporal": vae.whole("temporal_compression_ratio", 4),
        "vae_spatial": vae.whole("spatial_compression_ratio", 8),
    }


def _distilled(config: Config, vae: Config) -> dict[str, Any]:
    return {
        **_figures(config, vae),
        "embedded_guidance": config.flag("guidance_embeds"),
        "max_sequence_length": 256,
    }


def _token_replace(config: Config, vae: Config) -> dict[str, Any]:
    """Of HunyuanVideo-I2V; not of its first release, whose pipeline keeps one latent frame to itself."""
    if config.text("image_condition_type") != "token_replace":
        raise ModelError(
            "this HunyuanVideo-I2V has 33 input channels, and its pipeline returns neither all of its latents nor as "
            f"many frames as it was asked for: use {HUNYUAN_VIDEO_I2V.hub_id}, which replaced it"
        )
    return _distilled(config, vae)


def transformer_config(entry: ModelEntry) -> dict[str, Any]:
    """Arguments of diffusers' HunyuanVideoTransformer3DModel that build its transformer, without its weights.

    A third of its layers project video and text separately, two thirds together.
    """
    return {
        "in_channels": entry.latent_channels,
        "out_channels": entry.latent_channels,
        "num_attention_heads": entry.heads,
        "attention_head_dim": entry.head_dim,
        "num_layers": entry.layers // 3,
        "num_single_layers": entry.layers - entry.layers // 3,
        "patch_size": entry.patch[1],
        "patch_size_t": entry.patch[0],
        "guidance_embeds": entry.embedded_guidance,
        "text_embed_dim": entry.text_dim,
    }


_TEXT = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
_TEXT_15 = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")

_CACHES_15 = ("pab", "taylorseer")  # first-block does not know what these blocks return

PIPELINES = (
    PipelineFacts(
        "HunyuanVideoPipeline",
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        _TEXT,
        _distilled,
        negative="never",
        fuses=True,
        transformer_config=transformer_config,
    ),
    PipelineFacts(
        "HunyuanVideoImageToVideoPipeline",
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        _TEXT,
        _token_replace,
        negative="never",
        takes_image=True,
        text_with_image=True,
        caches=("pab",),  # the others keep their state in cache_context, which the pipeline does not enter
    ),
    PipelineFacts(
        "HunyuanVideo15Pipeline",
        "hunyuan-video-1.5",
        "HunyuanVideo15Transformer3DModel",
        _TEXT_15,
        _figures,
        negative="apart",
        guider=True,
        caches=_CACHES_15,
        lora=False,
        fuses=True,
    ),
    PipelineFacts(
        "HunyuanVideo15ImageToVideoPipeline",
        "hunyuan-video-1.5",
        "HunyuanVideo15Transformer3DModel",
        _TEXT_15,
        _figures,
        negative="apart",
        takes_image=True,
        guider=True,
        caches=_CACHES_15,
        lora=False,
        fuses=True,
    ),
)
