"""From raw flags to a `Plan`: every setting resolved, with its origin, before any weight loads and without torch.

Precedence is flag > preset > model default > default of the tool.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.errors import PresetError
from vmonarch_cli.media.paths import check_rate, resolve_targets
from vmonarch_cli.models.base import CACHES, Grid, ModelEntry, PipelineFacts
from vmonarch_cli.models.demo_vocabulary import unknown_words
from vmonarch_cli.models.families import PIPELINES
from vmonarch_cli.models.registry import DEMO_ALIAS, HOW_TO_GET_A_REAL_MODEL, find_model
from vmonarch_cli.plan import checks
from vmonarch_cli.plan import setup as setup_checks
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.presets import Preset, apply_overrides, load_preset, parse_assignment
from vmonarch_kernels.cost import dense_flops, l_bytes, monarch_flops, residual_bytes
from vmonarch_kernels.spec import Options

FLAG, PRESET, MODEL_DEFAULT, DEFAULT = "flag", "preset", "model default", "default"
DEMO_NOTE = f"no --model given: using the small demo model that comes with vmonarch; {HOW_TO_GET_A_REAL_MODEL}"
Value = TypeVar("Value")


@dataclass(frozen=True)
class GenerateRequest:
    """The flags of `vmonarch generate` as they came; None (or empty) means not given."""

    model: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    size: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    seed: int | None = None
    num_videos: int | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = field(default=())
    dense_steps: int | None = None
    dense_layers: int | None = None
    impl: str | None = None
    dense_every: int | None = None
    device: str | None = None
    dtype: str | None = None
    output: str | None = None
    overwrite: bool = False
    revision: str | None = None
    image: str | None = None
    offload: str | None = None
    vae_tiling: bool = False
    quantize: str | None = None
    loras: tuple[str, ...] = field(default=())
    cache: str | None = None
    compile: bool = False


class Flops(BaseModel):
    """Self-attention floating-point operations of one clip, all dense and as planned (a multiply-add counts as two)."""

    model_config = ConfigDict(frozen=True)

    dense_call: int
    """One dense self-attention call of one layer."""
    structured_call: int
    """The same call as the preset computes it in most steps (warm, where it starts warm)."""
    dense: int
    """All calls of the clip, dense."""
    planned: int
    """All calls of the clip as planned: cold and warm calls, dense steps and dense layers counted as such."""


class Plan(BaseModel):
    """Everything a run needs to know, and where each value came from.

    `origins` maps a field (a preset's as `preset.band`) to "flag", "preset", "model default" or "default".
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
    seed: int
    num_videos: int
    preset: Preset
    device: str
    dtype: str
    dense_every: int
    outputs: tuple[Path, ...]
    overwrite: bool
    grid: Grid
    tokens: int
    flops: Flops
    revision: str | None = None
    image: str | None = None
    setup: Setup = Setup()
    origins: dict[str, str]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

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
            elif name in Setup.model_fields:
                values[name] = getattr(self.setup, name)
            elif name != "model":
                values[name] = getattr(self, name)
        return {name: {"value": value, "origin": self.origins[name]} for name, value in values.items()}


def resolve(request: GenerateRequest) -> Plan:
    """Resolve and check a request; VmonarchError in one sentence for anything that cannot be done."""
    prompt = checks.prompt(request.prompt)
    origins: dict[str, str] = {}

    def take(name: str, given: Value | None, default: Value, otherwise: str = MODEL_DEFAULT) -> Value:
        origins[name] = otherwise if given is None else FLAG
        return default if given is None else given

    revision = take("revision", request.revision, None, DEFAULT)
    model, source = find_model(take("model", request.model, DEMO_ALIAS, DEFAULT), revision)
    defaults = model.defaults
    preset = _resolve_preset(request, defaults.preset, origins)

    height, width = checks.size(request.size, request.height, request.width)
    height = take("height", height, defaults.height)
    width = take("width", width, defaults.width)
    num_frames = take("num_frames", request.num_frames, defaults.num_frames)
    model.check_shape(height, width, num_frames)

    image = setup_checks.check_image(model, request.image)
    pipeline = model.pipeline if image is None else model.image_pipeline or model.pipeline

    checks.second_guidance(model, request.guidance_scale_2)
    seed = take("seed", checks.whole("--seed", request.seed, 0, 2**63 - 1), 0, DEFAULT)
    num_videos = take("num_videos", checks.whole("--num-videos", request.num_videos, 1, 1000), 1, DEFAULT)
    steps = take("steps", checks.whole("--steps", request.steps, 1, 1000), defaults.steps)
    grid = model.grid(height, width, num_frames)
    guidance = take(
        "guidance_scale", checks.number("--guidance-scale", request.guidance_scale, 0, 100), defaults.guidance_scale
    )
    fps = take("fps", checks.whole("--fps", request.fps, 1, 240), defaults.fps)
    outputs = resolve_targets(
        take("output", request.output, None, DEFAULT), prompt, seed, num_videos, request.overwrite
    )
    check_rate(outputs, fps)
    return Plan(
        model=model,
        model_source=source,
        prompt=prompt,
        negative_prompt=take("negative_prompt", request.negative_prompt, defaults.negative_prompt),
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=take(
            "guidance_scale_2",
            checks.number("--guidance-scale-2", request.guidance_scale_2, 0, 100),
            defaults.guidance_scale_2,
        ),
        flow_shift=take(
            "flow_shift", checks.number("--flow-shift", request.flow_shift, 0.01, 100), defaults.flow_shift
        ),
        seed=seed,
        num_videos=num_videos,
        preset=preset,
        device=take("device", checks.device(request.device), "auto", DEFAULT),
        dtype=take("dtype", checks.dtype(request.dtype), "auto", DEFAULT),
        dense_every=take(
            "dense_every", checks.whole("--dense-every", request.dense_every, 0, 1000), defaults.dense_every
        ),
        outputs=outputs,
        overwrite=request.overwrite,
        grid=grid,
        tokens=grid[0] * grid[1] * grid[2],
        flops=count_flops(model, grid, preset, steps, branches=branches_of(model, guidance)),
        revision=revision,
        image=take("image", image, None, DEFAULT),
        setup=_resolve_setup(request, PIPELINES[pipeline], origins),
        origins={"prompt": FLAG, **origins},
        notes=(DEMO_NOTE,) if model.alias == DEMO_ALIAS and request.model is None else (),
        warnings=tuple(_warnings(model, prompt, (height, width, num_frames))),
    )


def _resolve_setup(request: GenerateRequest, facts: PipelineFacts, origins: dict[str, str]) -> Setup:
    """What is done to the pipeline beside its attention; InputError for what it cannot have."""
    given = {
        "offload": setup_checks.one_of("--offload", request.offload, setup_checks.OFFLOAD_MODES),
        "vae_tiling": request.vae_tiling or None,
        "quantize": setup_checks.one_of("--quantize", request.quantize, setup_checks.QUANTIZATIONS),
        "loras": request.loras or None,
        "cache": setup_checks.one_of("--cache", request.cache, CACHES),
        "compile": request.compile or None,
    }
    for text in request.loras:
        setup_checks.parse_lora(text)
    chosen = {name: value for name, value in given.items() if value is not None}
    origins |= {name: FLAG if name in chosen else DEFAULT for name in given}
    setup = Setup.model_validate(chosen)
    setup_checks.check_additions(setup, facts)
    return setup


def branches_of(model: ModelEntry, guidance_scale: float) -> int:
    """Forwards of one denoising step (or samples of one forward): two where guidance compares two prompts."""
    return 2 if guidance_scale > 1 and not model.embedded_guidance else 1


def _resolve_preset(request: GenerateRequest, default: str, origins: dict[str, str]) -> Preset:
    """The preset with `--set`, `--dense-steps`, `--dense-layers` and `--impl` applied, and the origin of each field."""
    preset = load_preset(default if request.preset is None else request.preset)
    origins["preset"] = MODEL_DEFAULT if request.preset is None else FLAG
    overrides: dict[str, tuple[str, Any]] = {}
    for text in request.overrides:
        name, value = parse_assignment(text)
        if name in overrides:
            raise PresetError(f"--set: field '{name}' is given twice")
        overrides[name] = ("--set", value)
    for name in ("dense_steps", "dense_layers", "impl"):
        value = getattr(request, name)
        if value is not None:
            if name in overrides:
                raise PresetError(f"field '{name}' is given twice, by --set and by --{name.replace('_', '-')}")
            overrides[name] = (f"--{name.replace('_', '-')}", value)
    resolved = apply_overrides(preset, overrides)
    for name in Preset.model_fields:
        if name not in ("name", "description"):
            written = PRESET if name in preset.model_fields_set else DEFAULT
            origins[f"preset.{name}"] = FLAG if name in overrides else written
    return resolved


def count_flops(model: ModelEntry, grid: Grid, preset: Preset, steps: int, branches: int) -> Flops:
    """Self-attention operations of a clip; `branches` is the number of forwards per step (2 with guidance)."""
    dense_call = dense_flops(grid, model.heads, model.head_dim)
    dense = dense_call * model.layers * branches * steps
    if preset.attention == "dense":
        return Flops(dense_call=dense_call, structured_call=dense_call, dense=dense, planned=dense)

    def call(warm: bool) -> int:
        return monarch_flops(
            grid,
            model.heads,
            model.head_dim,
            options=Options(1 if warm else preset.num_steps, preset.c_floor, preset.first_frame, preset.band),
            warm=warm,
            refresh=preset.refresh,
        )

    structured_layers = max(0, model.layers - preset.dense_layers)
    structured_steps = max(0, steps - preset.dense_steps)
    # Every transformer starts cold once; without warm start every step is cold.
    cold_steps = min(model.transformers, structured_steps) if preset.warm_start else structured_steps
    warm_steps = structured_steps - cold_steps
    structured = structured_layers * (cold_steps * call(False) + warm_steps * call(True))
    remaining = (model.layers * steps - structured_layers * structured_steps) * dense_call
    return Flops(
        dense_call=dense_call,
        structured_call=call(preset.warm_start),
        dense=dense,
        planned=(structured + remaining) * branches,
    )


def kept_bytes(plan: Plan) -> int:
    """Bytes kept from step to step by a clip as planned; see ``kept_by``."""
    return kept_by(plan.model, plan.grid, plan.preset, plan.guidance_scale)


def kept_by(model: ModelEntry, grid: Grid, preset: Preset, guidance_scale: float) -> int:
    """Bytes kept from step to step, one per entry of L (warm start) and of the output (frame refresh), for every layer
    and guidance branch of the transformer at work; corrections that the branches share once.
    """
    if preset.attention == "dense":
        return 0
    layers = max(0, model.layers - preset.dense_layers)
    branches = branches_of(model, guidance_scale)
    call = l_bytes(grid, model.heads) * branches if preset.warm_start else 0
    if preset.refresh:
        call += residual_bytes(grid, model.heads, model.head_dim) * (1 if preset.shared_refresh else branches)
    return call * layers


def _warnings(model: ModelEntry, prompt: str, shape: tuple[int, int, int]) -> list[str]:
    """Sentences about what will work less well than the user may expect."""
    found: list[str] = []
    if model.alias != DEMO_ALIAS:
        return found
    unknown = unknown_words(prompt)
    if unknown:
        words = ", ".join(f"'{word}'" for word in unknown[:8]) + (" and others" if len(unknown) > 8 else "")
        found.append(f"the demo model was not trained on {words}: those words will not show in the clip")
    trained = (model.defaults.height, model.defaults.width, model.defaults.num_frames)
    if model.trained_only_at_default and shape != trained:
        found.append(
            f"the demo model was trained at {trained[1]}x{trained[0]} with {trained[2]} frames only: "
            f"{shape[1]}x{shape[0]} with {shape[2]} will look worse"
        )
    return found
