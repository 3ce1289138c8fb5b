"""What `profile model` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmonarch_cli.plan.setup import AdapterFile
from vmonarch_cli.presets import Preset
from vmonarch_cli.profile.results import FUSED
from vmonarch_cli.profile.settings import ProfiledClips


@dataclass(frozen=True)
class ModelSettings(ProfiledClips):
    """What to measure on which model."""

    random_weights: bool
    flow_shift: float
    clip_steps: int
    """Denoising steps of a clip; the first `steps` of them are measured."""
    steps: int
    presets: Sequence[Preset]
    compile: bool
    prompt: str
    seed: int = 0
    of_layers: int | None = None
    """Layers of the whole model, of which the entry may have fewer; None for those of the entry."""
    backends: Sequence[str] = ()
    """Dense backends to measure; every one of the device when empty."""
    fused_impl: str | None = None
    """What fused blocks run with, "triton" or "torch", in rows of their own; None for no such rows."""
    quantize: str | None = None
    """What the projections of the blocks compute in, "fp8" or "int8", in every row; None for `dtype`."""
    tuned: Sequence[AdapterFile] = ()
    """Adapters that have a row of their own, with the preset that each was made for."""

    @property
    def fused_how(self) -> str:
        """How the names of rows with fused blocks end."""
        return FUSED if self.fused_impl == "triton" else f"{FUSED} in {self.fused_impl}"

    @property
    def fused_names(self) -> dict[str, Preset]:
        """Row of a preset with fused blocks -> the preset."""
        if self.fused_impl is None:
            return {}
        return {f"{preset.name}, {self.fused_how}": preset for preset in self.presets if preset.attention != "dense"}
