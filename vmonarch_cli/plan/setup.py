"""What may be done to a loaded pipeline beside its attention, as plain settings: memory, LoRA, caches, compilation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.base import PipelineFacts

OFFLOAD_MODES = ("auto", "none", "model", "group", "sequential")
QUANTIZATIONS = ("fp8", "int8")


class Setup(BaseModel):
    """How the pipeline is set up once its weights are read; the defaults change nothing but where weights are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    offload: str = "auto"
    vae_tiling: bool = False
    vae_dtype: str = "auto"
    """What the VAE decodes in: "auto", or a dtype by its torch name."""
    quantize: str | None = None
    loras: tuple[str, ...] = ()
    cache: str | None = None
    compile: bool = False


def check_additions(setup: Setup, facts: PipelineFacts) -> None:
    """InputError when diffusers has no LoRA, no such cache or no compilation for a pipeline."""
    if setup.loras and not facts.lora:
        raise InputError(f"--lora: diffusers loads no LoRA into a {facts.name}")
    if setup.cache is not None and setup.cache not in facts.caches:
        valid = f"only {' and '.join(facts.caches)} can" if facts.caches else "no cache can"
        raise InputError(f"--cache {setup.cache} does not run in a {facts.name} of diffusers: {valid}")
    if setup.compile and not facts.compiles:
        raise InputError(f"--compile: diffusers names no repeated blocks for {facts.transformer}")
    if setup.vae_dtype != "auto" and facts.vae_in_dtype:
        raise InputError(
            f"--vae-dtype: a {facts.name} of diffusers runs its VAE in the transformer's dtype, which --dtype chooses"
        )
