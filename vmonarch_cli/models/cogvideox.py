"""CogVideoX 2b, 5b and 1.5. Sides are multiples of 16: the pipeline takes 8, and the patch of 2 then cuts."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.config import Config

_T5_XXL_PARAMS = 4_762_310_656

COGVIDEOX_2B = ModelEntry(
    alias="cogvideox-2b",
    title="CogVideoX-2b",
    family="cogvideox",
    pipeline="CogVideoXPipeline",
    hub_id="THUDM/CogVideoX-2b",
    aliases=("zai-org/CogVideoX-2b",),
    licence="Apache-2.0",
    has_flow_shift=False,
    heads=30,
    head_dim=64,
    layers=30,
    ffn_dim=4 * 1920,
    max_sequence_length=226,
    transformer_params=1_693_783_872,
    text_encoder_params=_T5_XXL_PARAMS,
    vae_params=215_583_907,
    defaults=Defaults(height=480, width=720, num_frames=49, fps=8, steps=50, guidance_scale=6.0),
)

COGVIDEOX_5B = COGVIDEOX_2B.model_copy(
    update={
        "alias": "cogvideox-5b",
        "title": "CogVideoX-5b",
        "hub_id": "THUDM/CogVideoX-5b",
        "aliases": ("zai-org/CogVideoX-5b",),
        "licence": "CogVideoX",
        "heads": 48,
        "layers": 42,
        "ffn_dim": 4 * 3072,
        "transformer_params": 5_570_283_072,
    }
)

COGVIDEOX_15 = COGVIDEOX_5B.model_copy(
    update={
        "alias": "cogvideox-1.5",
        "title": "CogVideoX1.5-5B",
        "hub_id": "THUDM/CogVideoX1.5-5B",
        "aliases": ("cogvideox1.5-5b", "zai-org/CogVideoX1.5-5B"),
        "patch": (2, 2, 2),
        "max_grid": (None, 150, 150),
        "transformer_params": 5_570_676_352,
        "defaults": COGVIDEOX_5B.defaults.model_copy(
            update={"height": 768, "width": 1360, "num_frames": 81, "fps": 16}
        ),
    }
)

COGVIDEOX_5B_I2V = COGVIDEOX_5B.model_copy(
    update={
        "alias": "cogvideox-5b-i2v",
        "title": "CogVideoX-5b-I2V",
        "pipeline": "CogVideoXImageToVideoPipeline",
        "hub_id": "THUDM/CogVideoX-5b-I2V",
        "aliases": ("zai-org/CogVideoX-5b-I2V",),
        "takes_image": True,
        "fixed_size": (480, 720),
        "transformer_params": 5_625_087_552,  # with the table of learned positions
    }
)

COGVIDEOX_15_I2V = COGVIDEOX_15.model_copy(
    update={
        "alias": "cogvideox-1.5-i2v",
        "title": "CogVideoX1.5-5B-I2V",
        "pipeline": "CogVideoXImageToVideoPipeline",
        "hub_id": "THUDM/CogVideoX1.5-5B-I2V",
        "aliases": ("cogvideox1.5-5b-i2v", "zai-org/CogVideoX1.5-5B-I2V"),
        "takes_image": True,
        "transformer_params": 5_571_594_880,
    }
)

ENTRIES = (COGVIDEOX_2B, COGVIDEOX_5B, COGVIDEOX_15, COGVIDEOX_5B_I2V, COGVIDEOX_15_I2V)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    hidden = config.whole("num_attention_heads") * config.whole("attention_head_dim")
    patch = config.whole("patch_size")
    spatial = 2 ** (vae.length("block_out_channels") - 1)
    learned = config.flag("use_learned_positional_embeddings")
    return {
        "patch": (config.whole("patch_size_t", 1), patch, patch),
        "heads": config.whole("num_attention_heads"),
        "head_dim": config.whole("attention_head_dim"),
        "layers": config.whole("num_layers"),
        "ffn_dim": 4 * hidden,
        "text_dim": config.whole("text_embed_dim"),
        "max_sequence_length": config.whole("max_text_seq_length", 226),
        "latent_channels": config.whole("out_channels"),
        "vae_temporal": vae.whole("temporal_compression_ratio", 4),
        "vae_spatial": spatial,
        "fixed_size": (config.whole("sample_height") * spatial, config.whole("sample_width") * spatial)
        if learned
        else None,
        "max_grid": _max_grid(config),
        "has_flow_shift": False,
    }


def _max_grid(config: Config) -> tuple[int | None, int | None, int | None]:
    """1.5 cuts its positions out of those of its largest size; 1.0 stretches them over any."""
    if config.whole("patch_size_t", 0, least=0) == 0:
        return None, None, None
    patch = config.whole("patch_size")
    return None, config.whole("sample_height") // patch, config.whole("sample_width") // patch


def transformer_config(entry: ModelEntry) -> dict[str, Any]:
    """Arguments of diffusers' CogVideoXTransformer3DModel that build this entry's transformer, without its weights."""
    temporal_patch = entry.patch[0] if entry.patch[0] > 1 else None
    return {
        "num_attention_heads": entry.heads,
        "attention_head_dim": entry.head_dim,
        "in_channels": entry.latent_channels,
        "out_channels": entry.latent_channels,
        "text_embed_dim": entry.text_dim,
        "num_layers": entry.layers,
        "patch_size": entry.patch[1],
        "patch_size_t": temporal_patch,
        "patch_bias": temporal_patch is None,
        "sample_height": 60 if temporal_patch is None else 300,
        "sample_width": 90 if temporal_patch is None else 300,
        "sample_frames": entry.defaults.num_frames,
        "max_text_seq_length": entry.max_sequence_length,
        "use_rotary_positional_embeddings": entry.alias != COGVIDEOX_2B.alias,
    }


_TEXT = ("prompt_embeds", "negative_prompt_embeds")

PIPELINES = (
    PipelineFacts(
        "CogVideoXPipeline",
        "cogvideox",
        "CogVideoXTransformer3DModel",
        _TEXT,
        _figures,
        guidance_by_batch=True,
        compiles=False,
        transformer_config=transformer_config,
    ),
    PipelineFacts(
        "CogVideoXImageToVideoPipeline",
        "cogvideox",
        "CogVideoXTransformer3DModel",
        _TEXT,
        _figures,
        guidance_by_batch=True,
        compiles=False,
        takes_image=True,
    ),
)
