"""Apply a `Setup` to a loaded pipeline: quantised weights, LoRA, fused blocks, step caches, compilation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vmonarch_cli.errors import InputError
from vmonarch_cli.families.registry import family_of
from vmonarch_cli.pipeline import step_cache
from vmonarch_cli.pipeline.fuse import fuse
from vmonarch_cli.pipeline.lora import ReadLora, load_loras
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.pipeline.quantize import compute_in
from vmonarch_cli.pipeline.tuned import load_adapters
from vmonarch_cli.plan.setup import COMPUTED, Setup

FIRST_BLOCK_THRESHOLD = 0.05
"""Relative change of the first block's output below which the others are skipped; diffusers' own default."""


def quantization_config(setup: Setup, components: tuple[str, ...]) -> Any:
    """What from_pretrained needs to store weights in int8 (torchao), or None."""
    if setup.quantize != "int8-storage":
        return None
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return PipelineQuantizationConfig(
        quant_mapping={name: TorchAoConfig(Int8WeightOnlyConfig()) for name in components}
    )


def prepare(
    pipeline: Any, setup: Setup, dtype: torch.dtype, device: torch.device, loras: Sequence[ReadLora] = ()
) -> None:
    """Everything that comes before the weights are placed; ModelError or InputError in one sentence.

    device: what converts weights to 8 bits. loras: the setup's, read.
    """
    load_loras(pipeline, loras)
    load_adapters(pipeline, setup.tuned, sums=setup.quantize is None and setup.offload == "none")
    if setup.fused_impl is not None:
        for transformer in transformers_of(pipeline):
            fuse(transformer, setup.fused_impl)
    for transformer in transformers_of(pipeline):
        if setup.quantize == "fp8-storage":
            transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        elif setup.quantize in COMPUTED:
            compute_in(transformer, setup.quantize, device, back=setup.offload != "none")
    if setup.vae_tiling or family_of(pipeline).always_tiled:
        if not hasattr(pipeline.vae, "enable_tiling"):
            raise InputError(f"--vae-tiling: {type(pipeline.vae).__name__} of this model cannot decode in tiles")
        pipeline.vae.enable_tiling()


def finish(pipeline: Any, setup: Setup) -> None:
    """Everything that comes after: hooks of a cache must see the modules that run, compiled blocks come last."""
    if setup.cache is not None:
        for transformer in transformers_of(pipeline):
            _enable_cache(pipeline, transformer, setup.cache)
    if setup.compile:
        for transformer in transformers_of(pipeline):
            compile_blocks(transformer)


def compile_blocks(transformer: Any) -> None:
    """Compile a transformer's repeated blocks; InputError where diffusers names none."""
    if not getattr(transformer, "_repeated_blocks", None):
        raise InputError(f"--compile: diffusers names no repeated blocks for {type(transformer).__name__}")
    transformer.compile_repeated_blocks()


def _enable_cache(pipeline: Any, transformer: Any, name: str) -> None:
    import diffusers

    if name == "first-block":
        config: Any = diffusers.FirstBlockCacheConfig(threshold=FIRST_BLOCK_THRESHOLD)
    elif name == "pab":
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: pipeline.current_timestep,
        )
    else:
        config = diffusers.TaylorSeerCacheConfig(
            cache_interval=5,
            disable_cache_before_step=3,
            max_order=1,
            cache_identifiers=[r".*blocks\.\d+\.attn\d?"],  # its own patterns miss attn1 and attn2
        )
    if not hasattr(transformer, "enable_cache"):
        raise InputError(f"--cache: diffusers has no cache for {type(transformer).__name__}")
    try:
        transformer.enable_cache(config)
        if name == "pab":
            step_cache.separate_branches(transformer)
    except Exception as error:
        raise InputError(f"--cache {name} does not work with {type(transformer).__name__}: {error}") from error
