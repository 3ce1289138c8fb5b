"""What may be done to a loaded pipeline beside its attention, as plain settings: memory, LoRA, caches, compilation."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.tuned import TunedAdapter
from vmonarch_cli.text import listed, with_article

OFFLOAD_MODES = ("auto", "none", "model", "group", "sequential")


class QuantizeFacts(NamedTuple):
    """What 8-bit arithmetic of one kind needs and keeps."""

    capability: tuple[int, int]
    """The least compute capability of an NVIDIA GPU."""
    dtype: str
    """What the products of linear layers take, by its torch name."""


COMPUTED = {"fp8": QuantizeFacts((8, 9), "float8_e4m3fn"), "int8": QuantizeFacts((8, 0), "int8")}
"""Kinds of `--quantize` that compute in 8 bits, with scales for each token and each output channel."""
STORED = ("fp8-storage", "int8-storage")
"""Kinds that store weights in 8 bits and compute in the transformer's dtype."""
QUANTIZATIONS = (*COMPUTED, *STORED)
EARLIER_NAMES = {"fp8": "fp8-storage", "int8": "int8-storage"}
"""What `--quantize` took before anything computed in 8 bits -> its name now."""
NEEDS_TORCHAO = (*COMPUTED, "int8-storage")
"""Kinds that torchao does; fp8-storage is diffusers' own."""
DENSE_ATTENTION = ("auto", "sdpa", "cudnn", "flash", "efficient", "math", "fa4", "fa3", "fa2", "sage")
"""Names of dense attention, those of `vmonarch_kernels.dense_attention`."""
QUANTISED_DENSE = ("sage",)
"""Those that compute in 8 bit: never chosen unless named."""


DECIDED_LATER = ("fuse", "dense_below")
"""Settings that are None until the machine of a run decides them, and shown as `AUTO`."""
AUTO = "auto"
ADAPTER_NAME = "vmonarch_tuned"
"""Begins the names that peft knows the layers of tuned adapters by."""


class AdapterFile(BaseModel):
    """A tuned adapter that a run uses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    """Of the file."""
    adapter: TunedAdapter
    """What the file says of itself."""

    @property
    def layer_name(self) -> str:
        """What peft knows its layers by: a model may have several, for presets that take turns."""
        return f"{ADAPTER_NAME}_{self.sha256[:12]}"

    def facts(self) -> dict[str, Any]:
        """What a record keeps: the file, and what it was made for."""
        said = self.adapter
        return {
            "path": self.path,
            "sha256": self.sha256,
            "preset": said.preset_name,
            "model": said.model,
            "fingerprint": said.fingerprint,
            "steps": said.steps,
            "guidance_scale": said.guidance_scale,
            "size": said.size,
            "num_frames": said.num_frames,
        }


class Setup(BaseModel):
    """How the pipeline is set up once its weights are read; the defaults change nothing but where weights are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    offload: str = "auto"
    vae_tiling: bool = False
    vae_dtype: str = "auto"
    """What the VAE decodes in: "auto", or a dtype by its torch name."""
    quantize: str | None = None
    """What the transformer's weights are in, see `QUANTIZATIONS`."""
    loras: tuple[str, ...] = ()
    cache: str | None = None
    compile: bool = False
    fuse: bool | None = None
    """The arithmetic between the products of the transformer's blocks runs in fused passes; None: where that repays."""
    fused_impl: str | None = None
    """What these run with, "triton" or "torch", once a machine has decided it."""
    graphs: bool = False
    """Structured calls that are small are recorded and replayed, where a GPU runs them."""
    dense_below: int | None = None
    """Structured calls of fewer tokens run dense; None: those that a GPU computes dense in less time."""
    dense_attention: str = "auto"
    """What computes the calls that run dense; "auto" is the expected fastest of all that are installed and fit."""
    tuned: tuple[AdapterFile, ...] = ()
    """Adapters to load; a plan has one at most, a model that serves several plans those of all."""
    transformer: str | None = None
    """A file whose weights take the place of the model's transformer."""
    transformer_2: str | None = None
    """The same for the second transformer."""

    @property
    def linear_dtype(self) -> str | None:
        """What the projections of the transformer's blocks compute in, by its torch name; None for its own dtype."""
        return COMPUTED[self.quantize].dtype if self.quantize in COMPUTED else None

    @property
    def single_files(self) -> dict[str, str]:
        """Component -> the file that its weights come from, of those that have one of their own."""
        files = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        return {name: file for name, file in files.items() if file is not None}


WHOLE_OFFLOAD = ("none", "model")
"""Offload modes that move a transformer as a whole, with the weights that take turns with its own."""


def check_tuned_weights(setup: Setup) -> None:
    """InputError where adapters of whole weights would have to take turns with weights that are not whole."""
    weights = next((tuned.path for tuned in setup.tuned if tuned.adapter.kind == "weights"), None)
    if weights is None:
        return
    if setup.quantize is not None:
        raise InputError(
            f"--quantize {setup.quantize}: adapter {weights} holds whole weights, which take turns with those of the "
            "model, and quantised ones cannot be put back to the bit; a LoRA can be tuned for them"
        )
    if setup.offload not in ("auto", *WHOLE_OFFLOAD):
        raise InputError(
            f"--offload {setup.offload}: adapter {weights} holds whole weights, which take turns with those of the "
            f"model, and this mode moves those piece by piece: valid are {' and '.join(WHOLE_OFFLOAD)}"
        )


def offload_modes(quantize: str | None) -> tuple[str, ...]:
    """The offload modes that `--quantize` leaves: computed in 8 bits a weight is a pair of values and scales, which the
    mode that moves single tensors does not know.
    """
    return tuple(mode for mode in OFFLOAD_MODES if mode != "sequential" or quantize not in COMPUTED)


def check_additions(setup: Setup, facts: PipelineFacts) -> None:
    """InputError for what a pipeline has not: LoRA, such a cache or compilation in diffusers, fused blocks here."""
    if setup.loras and not facts.lora:
        raise InputError(f"--lora: diffusers loads no LoRA into {with_article(facts.name)}")
    check_tuned_weights(setup)
    if setup.offload not in (modes := offload_modes(setup.quantize)):
        raise InputError(
            f"--offload {setup.offload} moves single tensors, and with --quantize {setup.quantize} a weight is a pair "
            f"of values and scales: valid are {listed(modes)}"
        )
    if setup.cache is not None and setup.cache not in facts.caches:
        valid = f"only {' and '.join(facts.caches)} can" if facts.caches else "no cache can"
        raise InputError(f"--cache {setup.cache} does not run in {with_article(facts.name)} of diffusers: {valid}")
    if setup.compile and not facts.compiles:
        raise InputError(f"--compile: diffusers names no repeated blocks for {facts.transformer}")
    if setup.fuse and not facts.fuses:
        raise InputError(f"--fuse: the blocks of {with_article(facts.name)} have no fused form: leave it out")
    if setup.vae_dtype != "auto" and facts.vae_in_dtype:
        raise InputError(
            f"--vae-dtype: {with_article(facts.name)} of diffusers runs its VAE in the transformer's dtype, "
            "which --dtype chooses"
        )
