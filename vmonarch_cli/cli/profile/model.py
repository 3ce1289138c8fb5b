"""`vmonarch profile model`: whole denoising steps of one model, dense and structured in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from vmonarch_cli.cli.options import (
    ATTENTION,
    MODEL,
    SAMPLING,
    Debug,
    number_option,
    option,
    takes_request,
    whole_option,
)
from vmonarch_cli.cli.profile import request
from vmonarch_cli.cli.profile.flags import FlowShift, Guidance, Presets, RunFlags, ShapeFlags, TunedFiles
from vmonarch_cli.cli.profile.model_table import model_table, verdicts
from vmonarch_cli.cli.profile.run import ProfileRun
from vmonarch_cli.errors import InputError
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.setup import COMPUTED, AdapterFile, Setup, check_additions
from vmonarch_cli.plan.tuned import NONE
from vmonarch_cli.presets import Preset
from vmonarch_cli.profile.plot import plot_model
from vmonarch_cli.profile.remember import remember_profile
from vmonarch_cli.profile.results import KernelShape, ModelProfile, OutputCheck

if TYPE_CHECKING:
    from vmonarch_cli.profile.model_settings import ModelSettings


@dataclass(frozen=True)
class ModelFlags:
    """How the model is made, and what is measured of it."""

    random_weights: Annotated[
        bool,
        option("--random-weights", panel=MODEL, help="Build the true transformer with random weights; load nothing."),
    ] = False
    layers: Annotated[
        int | None,
        whole_option(
            "--layers", panel=MODEL, help="Build only so many layers, of a model that does not fit or takes long."
        ),
    ] = None
    prompt: Annotated[str | None, option("--prompt", "-p", panel=MODEL, help="What the clip should show.")] = None
    steps: Annotated[
        int | None, whole_option("--steps", panel=SAMPLING, help="Denoising steps to measure, of the model's own.")
    ] = None
    guidance_scale: Guidance = None
    flow_shift: FlowShift = None
    presets: Presets = None
    backend: Annotated[
        list[str] | None,
        option(
            "--backend",
            panel=ATTENTION,
            help="Dense attention to compare with: cudnn, flash, efficient, math, fa4, fa3, fa2 or sage (repeatable). "
            "Default: all fast ones that are installed.",
        ),
    ] = None
    tuned: TunedFiles = None
    compile_: Annotated[
        bool, option("--compile", panel=ATTENTION, help="Compile the transformer's blocks, for every row alike.")
    ] = False
    quantize: Annotated[
        str | None,
        option(
            "--quantize", panel=ATTENTION, help="fp8 or int8: linear layers compute in 8 bits, for every row alike."
        ),
    ] = None
    fuse: Annotated[
        bool | None,
        option(
            "--fuse/--no-fuse",
            panel=ATTENTION,
            help="Add a row for every preset with fused blocks (on a CPU: in torch). Default: on a GPU.",
        ),
    ] = None
    fail_below: Annotated[
        float | None,
        number_option(
            "--fail-below", panel=ATTENTION, help="Exit 1 when a preset's speedup on a step over dense is less."
        ),
    ] = None


@takes_request()
def model(shape: ShapeFlags, flags: ModelFlags, where: RunFlags, debug: Debug = False) -> None:
    """Time whole denoising steps, dense and structured in turn on the same inputs, and say whether it is worth it."""
    whole = request.model_shape(shape, random=flags.random_weights)
    clip = request.fewer_layers(whole, flags.layers, random=flags.random_weights)
    chosen = request.presets(flags.presets, (clip.entry.defaults.preset,))
    request.check_sampling(clip.entry, flags.steps, flags.guidance_scale, flags.flow_shift)
    backends = request.backends(flags.backend)
    tuned, warnings = _adapters(flags, clip, chosen)
    checks.one_of("--quantize", flags.quantize, tuple(COMPUTED))
    request.check_frames(clip, chosen)
    prompt = checks.prompt(checks.EXAMPLE_PROMPT if flags.prompt is None else flags.prompt)
    additions = Setup(fuse=flags.fuse, compile=flags.compile_, quantize=flags.quantize)
    check_additions(additions, PIPELINES[clip.entry.pipeline])
    run = ProfileRun("model", where, flags.fail_below)
    run.warn(warnings)

    from vmonarch_cli.pipeline.quantize import check_quantize
    from vmonarch_cli.profile.model import run_model
    from vmonarch_kernels import dense_obstacle

    check_quantize(flags.quantize, run.device, run.dtype)
    settings = replace(
        _settings(flags, clip, chosen, backends, prompt, run),
        tuned=tuned,
        fused_impl=_fused(flags, clip, run),
        of_layers=whole.entry.layers,
    )
    if backends and not run.on_gpu:
        raise InputError(f"--backend chooses among a GPU's backends, and the device is {run.device}: leave it out")
    for name in backends:
        obstacle = dense_obstacle(name, run.device, run.dtype, clip.entry.head_dim)
        if obstacle is not None:
            raise InputError(f"--backend {name}: {obstacle}")
    run.start(_recorded(settings), "")

    def on_result(found: ModelProfile, verified: list[OutputCheck], lengths: list[KernelShape]) -> None:
        run.save(
            model=found.to_json(),
            lengths=[length.to_json() for length in lengths],
            checks=[check.to_json() for check in verified],
            verdicts=verdicts(found),
        )

    with run.working():
        chip = run.measure_chip()
        found, verified, _ = run_model(settings, chip, run.budget, on_result, run.work)
    run.show(lambda columns: model_table(found, run.caption, columns))
    if run.plot is not None:
        plot_model(found, run.caption, run.plot)
    failures = [f"{check.against}: error {check.error:.2g}" for check in verified if not check.passed]
    failures += [row.name for row in found.rows if row.failure and row.kind == "structured"]
    if not failures and settings.quantize is None:
        remember_profile(found, clip.entry, clip.source, chosen, str(run.device), run.dtype_name)
    run.finish([], failures, _too_slow(found, flags.fail_below), measured=any(row.step for row in found.rows))


def _adapters(
    flags: ModelFlags, clip: request.ModelShape, chosen: Sequence[Preset]
) -> tuple[list[AdapterFile], list[str]]:
    """The adapters to measure; random weights have none."""
    if flags.random_weights:
        if set(flags.tuned or ()) - {NONE}:
            raise InputError("--tuned needs the weights that an adapter was tuned on: leave out --random-weights")
        return [], []
    defaults = clip.entry.defaults
    guidance = defaults.guidance_scale if flags.guidance_scale is None else flags.guidance_scale
    return request.adapters(flags.tuned, clip, chosen, defaults.steps, guidance)


def _fused(flags: ModelFlags, clip: request.ModelShape, run: ProfileRun) -> str | None:
    """What the rows with fused blocks run with; None for no such rows."""
    facts = PIPELINES[clip.entry.pipeline]
    if flags.fuse is False or (flags.fuse is None and not (run.on_gpu and facts.fuses)):
        return None
    from vmonarch_kernels import resolve_fused_impl

    return resolve_fused_impl("auto", run.device, run.dtype)


def _settings(
    flags: ModelFlags,
    clip: request.ModelShape,
    presets: Sequence[Preset],
    backends: tuple[str, ...],
    prompt: str,
    run: ProfileRun,
) -> ModelSettings:
    from vmonarch_cli.profile.model_settings import ModelSettings

    defaults = clip.entry.defaults
    return ModelSettings(
        entry=clip.entry,
        source=clip.source,
        random_weights=flags.random_weights,
        device=run.device,
        dtype=run.dtype,
        height=clip.height,
        width=clip.width,
        num_frames=clip.num_frames,
        guidance_scale=defaults.guidance_scale if flags.guidance_scale is None else flags.guidance_scale,
        flow_shift=flags.flow_shift or defaults.flow_shift or 1.0,
        clip_steps=defaults.steps,
        steps=flags.steps or min(defaults.steps, 5),
        presets=presets,
        compile=flags.compile_,
        quantize=flags.quantize,
        prompt=prompt,
        seed=run.seed,
        backends=backends,
    )


def _recorded(settings: ModelSettings) -> dict[str, object]:
    """The settings as the record keeps them."""
    return {
        "model": settings.entry.alias,
        "random_weights": settings.random_weights,
        "layers": settings.entry.layers,
        "guidance_scale": settings.guidance_scale,
        "flow_shift": settings.flow_shift,
        "steps": settings.steps,
        "compile": settings.compile,
        "quantize": settings.quantize,
        "fused": settings.fused_impl,
        "presets": [preset.model_dump() for preset in settings.presets],
        "tuned": [tuned.facts() for tuned in settings.tuned],
    }


def _too_slow(found: ModelProfile, least: float | None) -> list[str]:
    if least is None:
        return []
    sentences = []
    for row in found.rows:
        if row.kind != "structured" or row.note == "cold":
            continue
        gain = found.speedup(row)
        if gain is None:
            sentences.append(f"--fail-below {least:g}: {row.name} has no speedup")
        elif gain < least:
            sentences.append(f"--fail-below {least:g}: {row.name} is {gain:.2f}x dense")
    return sentences
