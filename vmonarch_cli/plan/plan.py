"""`Plan`: everything a run needs to know, resolved and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.media.paths import DEFAULT_QUALITY
from vmonarch_cli.models.base import Grid, ModelEntry
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.lora_facts import LoraFacts
from vmonarch_cli.plan.costs import Flops, StepCost, Work, branches_of
from vmonarch_cli.plan.noise_levels import OWN
from vmonarch_cli.plan.seeds import DRAWN
from vmonarch_cli.plan.setup import AUTO, DECIDED_LATER, AdapterFile, Setup
from vmonarch_cli.plan.small_calls import repays_fusing
from vmonarch_cli.presets import Preset, load_preset


class GivenFile(BaseModel):
    """A picture or a video that a clip is made from, as it was when that was planned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    """"image", "last image" or "video"."""
    file: str
    sha256: str


class Plan(BaseModel):
    """Everything a run needs to know, and where each value came from.

    `origins` maps a field (a preset's as `preset.band`) to "flag", "recipe", "preset", "few steps of the
    preset", "model default", "default" or a place of the user's own defaults (see `defaults.py`); a seed's ends in
    ", drawn" where it is random.
    Sizes are in pixels, `fps` in frames per second, `steps` in denoising steps, `grid` in tokens (T, H, W).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelEntry
    model_source: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    flow_shift: float | None
    recipe: str | None = None
    """Name of the recipe that gave what no flag did."""
    sampler: str = OWN
    sigmas: tuple[float, ...] = ()
    """As given; `noise_levels` is what they, or sampler and shift, come to."""
    noise_levels: tuple[float, ...] | None = None
    """Noise level at which each step begins; None where the model's own scheduler decides when it runs."""
    noise_levels_forced: bool = False
    """The scheduler is replaced, or held to these levels."""
    seed: int
    num_videos: int
    quality: int = DEFAULT_QUALITY
    """Of the clip's file, 1 to 10; see `media/encoders.py`."""
    preset: Preset
    preset_reason: str | None = None
    """Why `--preset auto` chose it; None for a preset that was named."""
    device: str
    dtype: str
    dense_every: int
    outputs: tuple[Path, ...]
    overwrite: bool
    grid: Grid
    tokens: int
    flops: Flops
    step_costs: tuple[StepCost, ...]
    """A row for each denoising step."""
    revision: str | None = None
    image: str | None = None
    last_image: str | None = None
    video: str | None = None
    given_files: tuple[GivenFile, ...] = ()
    """The files of these; empty in what earlier versions saved."""
    strength: float | None = None
    """How much of the noise schedule a given video goes through, from 0 to 1; None where none is noised, or where
    `sigmas` say so."""
    audio: bool | None = None
    """Whether the clip has the sound that its model makes; None for a model that makes none."""
    setup: Setup = Setup()
    tuned_note: str | None = None
    """Why none of the adapters that the model brings for the preset is used; None where it brings none."""
    loras: tuple[LoraFacts, ...] = ()
    """Of the LoRA files that lie on this disk; those of the hub are looked at when they are there."""
    origins: dict[str, str]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def given_frames(self) -> tuple[str, ...]:
        """Files of the frames that the clip is made around."""
        return tuple(path for path in (self.image, self.last_image) if path is not None)

    @property
    def pipeline(self) -> str:
        """The pipeline class that it runs in: the model's own, or the one that takes what is given."""
        given = self.model.video_pipeline if self.video else self.model.image_pipeline if self.image else None
        return given or self.model.pipeline

    @property
    def other_tokens(self) -> int:
        """Tokens that the self-attention of a packed sequence has beside those of the grid, the prompt's aside."""
        return self.model.other_tokens(self.height, self.width, self.num_frames, len(self.given_frames))

    @property
    def work(self) -> Work:
        """What the clip's attention depends on, beside its preset."""
        forwards = branches_of(self.model, self.guidance_scale)
        return Work(self.model, self.grid, self.steps, forwards, self.flow_shift, self.other_tokens, self.noise_levels)

    @property
    def tuned(self) -> AdapterFile | None:
        """The tuned adapter that it runs with, if any."""
        return self.setup.tuned[0] if self.setup.tuned else None

    @property
    def seed_was_drawn(self) -> bool:
        """Whether nobody chose the seed."""
        return self.origins.get("seed", "").endswith(DRAWN)

    @property
    def repays_fusing(self) -> bool:
        """Whether fused blocks are faster than stock ones on a GPU: the stream is long enough, and products are not in
        int8 under a compiler, beside which they have not been measured.
        """
        unmeasured = self.setup.compile and self.setup.quantize == "int8"
        return not unmeasured and repays_fusing(self.tokens, self.model.hidden_dim)

    @property
    def in_torch(self) -> bool:
        """Whether the preset's implementation is one that needs no Triton."""
        return self.preset.impl in ("torch", "reference")

    @property
    def fuses_unasked(self) -> bool:
        """Whether a GPU runs the transformer's blocks fused where nobody chooses."""
        return PIPELINES[self.pipeline].fuses and not self.in_torch and self.repays_fusing

    @property
    def vae_dtype_unasked(self) -> str:
        """What the VAE decodes in where nobody chooses: float32 for the families whose pipelines need it, and the
        transformer's dtype for all others.
        """
        return "float32" if self.model.vae_float32 and not PIPELINES[self.pipeline].vae_in_dtype else self.dtype

    def with_dense_costs(self) -> Plan:
        """The plan, with the costs that dense attention has."""
        dense = load_preset("dense")
        costs = tuple(self.work.step_costs(dense))
        return self.model_copy(update={"step_costs": costs, "flops": self.work.flops(dense, costs)})

    @classmethod
    def default_of(cls, name: str) -> Any:
        """What a setting is where nobody chooses, ready for JSON; None for one that each clip resolves."""
        if name in DECIDED_LATER:
            return AUTO
        field = Setup.model_fields.get(name) or cls.model_fields.get(name)
        if field is None or field.is_required():
            return None
        return list(field.default) if isinstance(field.default, tuple) else field.default

    def settings(self) -> dict[str, dict[str, Any]]:
        """Every setting as {"value", "origin"}, ready for JSON; preset fields are named `preset.FIELD`."""
        values: dict[str, Any] = {"model": self.model.alias}
        for name in self.origins:
            if name.startswith("preset."):
                values[name] = getattr(self.preset, name.removeprefix("preset."))
            elif name == "preset":
                values[name] = self.preset.name
            elif name == "output":
                values[name] = [str(path) for path in self.outputs]
            elif name == "tuned":
                values[name] = None if self.tuned is None else self.tuned.path
            elif name in Setup.model_fields:
                value = getattr(self.setup, name)
                values[name] = AUTO if value is None and name in DECIDED_LATER else value
            elif name != "model":
                values[name] = getattr(self, name)
        return {name: {"value": value, "origin": self.origins[name]} for name, value in values.items()}
