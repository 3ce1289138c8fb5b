"""Allegro: its VAE encodes groups of four frames and no first frame alone: 88 frames are 22 latent frames."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config
from vmonarch_cli.models.shapes import Tiles


def _tiles(sample_size: int) -> Tiles:
    """Of diffusers' AutoencoderKLAllegro, which takes no others: 24 frames, tiles overlap by 8 frames, 120 rows and 80
    columns.
    """
    return Tiles(tile=(24, sample_size, sample_size), stride=(16, sample_size - 120, sample_size - 80))


ALLEGRO = ModelEntry(
    alias="allegro",
    title="Allegro",
    family="allegro",
    pipeline="AllegroPipeline",
    hub_id="rhymes-ai/Allegro",
    licence="Apache-2.0",
    frame_offset=0,
    decoder_tiles=_tiles(320),
    has_flow_shift=False,
    vae_float32=True,
    latent_channels=4,
    heads=24,
    head_dim=96,
    layers=32,
    ffn_dim=4 * 2304,
    transformer_params=2_771_907_856,
    text_encoder_params=4_762_310_656,
    vae_params=174_955_751,
    defaults=Defaults(height=720, width=1280, num_frames=88, fps=15, steps=100, guidance_scale=7.5),
)

ENTRIES = (ALLEGRO,)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    patch = config.whole("patch_size")
    hidden = config.whole("num_attention_heads") * config.whole("attention_head_dim")
    return {
        "patch": (config.whole("patch_size_t"), patch, patch),
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers"),
        "ffn_dim": 4 * hidden,
        "text_dim": config.whole("caption_channels"),
        "latent_channels": config.whole("in_channels"),
        "vae_temporal": vae.whole("temporal_compression_ratio", 4),
        "vae_spatial": 2 ** (vae.length("block_out_channels") - 1),
        "frame_offset": 0,
        "has_flow_shift": False,
        "decoder_tiles": _tiles(vae.whole("sample_size", 320, least=121)),
        "vae_float32": True,
    }


_TEXT = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")

PIPELINES = (
    PipelineFacts(
        "AllegroPipeline",
        "allegro",
        "AllegroTransformer3DModel",
        _TEXT,
        _figures,
        guidance_by_batch=True,
        caches=("pab",),
        lora=False,
        compiles=False,
    ),
)
