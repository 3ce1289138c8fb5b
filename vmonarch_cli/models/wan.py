"""Wan 2.1, Wan 2.2 and Wan VACE: figures from the published configs, defaults from the official examples."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config

# The negative prompt that Wan's own generate.py uses when none is given; the models were evaluated with it.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

_VIDEO_TO_VIDEO = "WanVideoToVideoPipeline"

_UMT5_XXL_PARAMS = 5_680_910_336
_CLIP_H_PARAMS = 630_766_080  # image encoder of Wan 2.1 I2V
_VAE_21_PARAMS = 126_892_531
_VAE_22_PARAMS = 704_688_668

WAN21_1_3B = ModelEntry(
    alias="wan2.1-1.3b",
    title="Wan2.1-T2V-1.3B",
    hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    aliases=("wan2.1-t2v-1.3b", "wan-1.3b", "wan1.3b"),
    licence="Apache-2.0",
    video_pipeline=_VIDEO_TO_VIDEO,
    vae_float32=True,
    max_grid=(1024, 1024, 1024),
    heads=12,
    head_dim=128,
    layers=30,
    ffn_dim=8960,
    transformer_params=1_418_996_800,
    text_encoder_params=_UMT5_XXL_PARAMS,
    vae_params=_VAE_21_PARAMS,
    defaults=Defaults(
        height=480,
        width=832,
        num_frames=81,
        fps=16,
        steps=50,
        guidance_scale=5.0,
        flow_shift=3.0,
        negative_prompt=NEGATIVE_PROMPT,
    ),
)

WAN21_14B = WAN21_1_3B.model_copy(
    update={
        "alias": "wan2.1-14b",
        "title": "Wan2.1-T2V-14B",
        "hub_id": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "aliases": ("wan2.1-t2v-14b", "wan-14b", "wan14b"),
        "heads": 40,
        "layers": 40,
        "ffn_dim": 13824,
        "transformer_params": 14_288_491_584,
        "defaults": WAN21_1_3B.defaults.model_copy(update={"height": 720, "width": 1280, "flow_shift": 5.0}),
    }
)

WAN22_5B = WAN21_1_3B.model_copy(
    update={
        "alias": "wan2.2-5b",
        "title": "Wan2.2-TI2V-5B",
        "hub_id": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "aliases": ("wan2.2-ti2v-5b", "wan-5b", "wan5b"),
        "image_pipeline": "WanImageToVideoPipeline",
        "video_pipeline": None,
        "vae_spatial": 16,
        "latent_channels": 48,
        "heads": 24,
        "layers": 30,
        "ffn_dim": 14336,
        "transformer_params": 4_999_787_712,
        "vae_params": _VAE_22_PARAMS,
        "defaults": WAN21_1_3B.defaults.model_copy(
            update={"height": 704, "width": 1280, "num_frames": 121, "fps": 24, "flow_shift": 5.0}
        ),
    }
)

WAN22_A14B = WAN21_14B.model_copy(
    update={
        "alias": "wan2.2-a14b",
        "title": "Wan2.2-T2V-A14B",
        "hub_id": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "aliases": ("wan2.2-t2v-a14b", "wan-a14b"),
        "video_pipeline": None,
        "transformers": 2,
        "boundary_ratio": 0.875,
        "defaults": WAN21_14B.defaults.model_copy(
            update={"steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "flow_shift": 12.0}
        ),
    }
)

WAN21_I2V_480P = WAN21_14B.model_copy(
    update={
        "alias": "wan2.1-i2v-480p",
        "title": "Wan2.1-I2V-14B-480P",
        "pipeline": "WanImageToVideoPipeline",
        "hub_id": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "aliases": ("wan2.1-i2v-14b-480p",),
        "video_pipeline": None,
        "takes_image": True,
        "transformer_params": 16_394_878_784,
        "text_encoder_params": _UMT5_XXL_PARAMS + _CLIP_H_PARAMS,
        "defaults": WAN21_1_3B.defaults,
    }
)

WAN21_I2V_720P = WAN21_I2V_480P.model_copy(
    update={
        "alias": "wan2.1-i2v-720p",
        "title": "Wan2.1-I2V-14B-720P",
        "hub_id": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "aliases": ("wan2.1-i2v-14b-720p",),
        "defaults": WAN21_14B.defaults,
    }
)

WAN22_I2V_A14B = WAN22_A14B.model_copy(
    update={
        "alias": "wan2.2-i2v-a14b",
        "title": "Wan2.2-I2V-A14B",
        "pipeline": "WanImageToVideoPipeline",
        "hub_id": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "aliases": (),
        "takes_image": True,
        "boundary_ratio": 0.9,
        "transformer_params": 14_288_901_184,
        "defaults": WAN22_A14B.defaults.model_copy(
            update={"guidance_scale": 3.5, "guidance_scale_2": 3.5, "flow_shift": 5.0}
        ),
    }
)

# Self-attention layers of the VACE blocks are counted with those of the main stack.
WAN_VACE_1_3B = WAN21_1_3B.model_copy(
    update={
        "alias": "wan2.1-vace-1.3b",
        "title": "Wan2.1-VACE-1.3B",
        "pipeline": "WanVACEPipeline",
        "hub_id": "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        "aliases": ("wan-vace-1.3b",),
        "video_pipeline": "WanVACEPipeline",
        "layers": 30 + 15,
        "transformer_params": 2_153_972_032,
    }
)

WAN_VACE_14B = WAN21_14B.model_copy(
    update={
        "alias": "wan2.1-vace-14b",
        "title": "Wan2.1-VACE-14B",
        "pipeline": "WanVACEPipeline",
        "hub_id": "Wan-AI/Wan2.1-VACE-14B-diffusers",
        "aliases": ("wan-vace-14b",),
        "video_pipeline": "WanVACEPipeline",
        "layers": 40 + 8,
        "transformer_params": 17_337_592_896,
    }
)

ENTRIES = (
    WAN21_1_3B,
    WAN21_14B,
    WAN22_5B,
    WAN22_A14B,
    WAN21_I2V_480P,
    WAN21_I2V_720P,
    WAN22_I2V_A14B,
    WAN_VACE_1_3B,
    WAN_VACE_14B,
)


def figures(config: Config, vae: Config) -> dict[str, Any]:
    """Of a WanTransformer3DModel, with or without VACE blocks, and its VAE."""
    return {
        "patch": config.wholes("patch_size", 3, (1, 2, 2)),
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers") + config.length("vace_layers", ()),
        "ffn_dim": config.whole("ffn_dim"),
        "text_dim": config.whole("text_dim", 4096),
        "latent_channels": config.whole("out_channels", config.whole("in_channels", 16)),
        "vae_temporal": vae.whole("scale_factor_temporal", 4),
        "vae_spatial": vae.whole("scale_factor_spatial", 8),
        "vae_float32": True,
        "max_grid": (config.whole("rope_max_seq_len", 1024),) * 3,
    }


def transformer_config(entry: ModelEntry) -> dict[str, Any]:
    """Arguments of diffusers' WanTransformer3DModel that build one transformer of this entry, without its weights.

    What no entry varies is as in the published configs: RMS norm of q and k across heads, a norm before
    cross-attention.
    """
    return {
        "patch_size": entry.patch,
        "num_attention_heads": entry.heads,
        "attention_head_dim": entry.head_dim,
        "in_channels": entry.latent_channels,
        "out_channels": entry.latent_channels,
        "text_dim": entry.text_dim,
        "freq_dim": 256,
        "ffn_dim": entry.ffn_dim,
        "num_layers": entry.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }


_TEXT = ("prompt_embeds", "negative_prompt_embeds")

PIPELINES = (
    PipelineFacts(
        "WanPipeline",
        "wan",
        "WanTransformer3DModel",
        _TEXT,
        figures,
        image_pipeline="WanImageToVideoPipeline",
        video_pipeline=_VIDEO_TO_VIDEO,
        fuses=True,
        transformer_config=transformer_config,
    ),
    PipelineFacts(
        "WanImageToVideoPipeline", "wan", "WanTransformer3DModel", _TEXT, figures, takes_image=True, fuses=True
    ),
    PipelineFacts(
        _VIDEO_TO_VIDEO,
        "wan",
        "WanTransformer3DModel",
        _TEXT,
        figures,
        takes_video=True,
        video_pipeline=_VIDEO_TO_VIDEO,
        noises_video=True,
        fuses=True,
        caches=(),  # it names no cache_context for its forwards, without which the two would share one state
    ),
    PipelineFacts(
        "WanVACEPipeline",
        "wan",
        "WanVACETransformer3DModel",
        _TEXT,
        figures,
        video_pipeline="WanVACEPipeline",
        fuses=True,
    ),
)
