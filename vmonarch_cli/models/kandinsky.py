"""Kandinsky 5 Lite, the dense five-second model (the ten-second and Pro models have a sparse attention of their own),
and Kandinsky 6, which makes sound with the frames and continues a first frame with the same weights.
"""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config
from vmonarch_cli.models.shapes import PackedRows

_MAX_GRID = (128, 128, 128)  # of diffusers' Kandinsky5RoPE3D and Kandinsky6RoPE3D, which no config changes
_SOUND_POSITIONS = 2048  # of diffusers' Kandinsky6RoPE1D
_SOUND_LATENTS_PER_SECOND = 44100 / 1024

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

_FIXED_6: dict[str, Any] = {
    "max_grid": _MAX_GRID,
    "max_sequence_length": 1024,
    "longest_sound": _SOUND_POSITIONS / _SOUND_LATENTS_PER_SECOND,
    "packed": PackedRows(per_position=1),  # a first frame's latents stand behind the clip's
}
"""What all Kandinsky 6 checkpoints have in common, and no config says."""

KANDINSKY_6_LITE = ModelEntry(
    alias="kandinsky-6-lite",
    title="Kandinsky 6.0 Lite 5s, distilled",
    family="kandinsky-6",
    pipeline="Kandinsky6TI2VAPipeline",
    image_pipeline="Kandinsky6TI2VAPipeline",
    hub_id="kandinskylab/Kandinsky-6.0-Lite-distill-5s-Diffusers",
    licence="MIT",
    heads=28,
    head_dim=64,
    layers=32,
    ffn_dim=7168,
    text_dim=3584,
    distilled=True,
    scheduler="PiflowScheduler",
    transformer_params=3_177_988_112,
    text_encoder_params=8_292_166_656 + 123_060_480,  # Qwen2.5-VL 7B, CLIP-L
    vae_params=246_478_803 + 305_479_682 + 122_152_752,  # of video and of sound, and the vocoder
    **_FIXED_6,
    defaults=Defaults(height=480, width=864, num_frames=121, fps=24, steps=10, guidance_scale=1.0),
)

KANDINSKY_6_PRO = KANDINSKY_6_LITE.model_copy(
    update={
        "alias": "kandinsky-6-pro",
        "title": "Kandinsky 6.0 Pro 5s",
        "hub_id": "kandinskylab/Kandinsky-6.0-Pro-sft-5s-Diffusers",
        "aliases": ("kandinsky-6",),
        "heads": 32,
        "head_dim": 128,
        "layers": 60,
        "ffn_dim": 16384,
        "distilled": False,
        "scheduler": None,
        "transformer_params": 30_136_326_248,
        "defaults": Defaults(
            height=480,
            width=864,
            num_frames=121,
            fps=24,
            steps=50,
            guidance_scale=5.0,
            negative_prompt=KANDINSKY_5_LITE.defaults.negative_prompt,
        ),
    }
)

ENTRIES = (KANDINSKY_5_LITE, KANDINSKY_6_LITE, KANDINSKY_6_PRO)


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


def _figures_6(config: Config, vae: Config) -> dict[str, Any]:
    """A distilled checkpoint predicts several velocities for each latent channel. A first frame needs the channels and
    the kind of frame that it comes with.
    """
    found = _figures(config, vae)
    channels = config.whole("in_visual_dim", 16)
    takes_image = config.flag("visual_cond") and config.whole("visual_token_type_num_embeddings", 0, least=0) >= 2
    return {
        **found,
        **_FIXED_6,
        "latent_channels": channels,
        "distilled": found["latent_channels"] != channels,
        "image_pipeline": "Kandinsky6TI2VAPipeline" if takes_image else None,
    }


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
    PipelineFacts(
        "Kandinsky6TI2VAPipeline",
        "kandinsky-6",
        "Kandinsky6Transformer3DModel",
        (
            *("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
            *("negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_attention_mask"),
        ),
        _figures_6,
        negative="apart",
        caches=("pab",),  # first-block does not know what these blocks return, taylorseer not what they are called
        lora=False,
        sound=True,
        image_pipeline="Kandinsky6TI2VAPipeline",
        needed=("transformer", "text_encoder", "vae", "audio_vae", "vocoder"),
    ),
)
