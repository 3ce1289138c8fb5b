"""`vmonarch calibrate`: a preset whose exact frames are where this model needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from vmonarch_cli.cli.options import (
    ATTENTION,
    MODEL,
    OUTPUT,
    Debug,
    Shown,
    number_option,
    option,
    takes_request,
    whole_option,
)
from vmonarch_cli.cli.phase_progress import PhaseProgress
from vmonarch_cli.cli.prompt_lines import prompts_of
from vmonarch_cli.cli.tables import table
from vmonarch_cli.clip.interrupts import Interrupted, stoppable
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.profile.calibrate.request import CalibratePlan, CalibrateRequest, resolve_calibrate
from vmonarch_cli.text import counted

if TYPE_CHECKING:
    from vmonarch_cli.profile.calibrate.run import CalibrateResult, PresetFigures, Row

_NOT_OF_A_CLIP = (
    "prompt",
    "fps",
    "num_videos",
    "dense_steps",
    "dense_layers",
    "dense_every",
    "dense_attention",
    "output",
    "overwrite",
    "image",
    "last_image",
    "video",
    "strength",
    "audio",
    "quality",
    "fuse",
    "graphs",
    "dense_below",
    "vae_tiling",
    "vae_dtype",
    "cache",
    "compile",
    "tuned",
)


@dataclass(frozen=True)
class CalibrateFlags:
    """What the preset may cost, or must reach, and where it goes."""

    prompts_file: Annotated[
        str | None,
        option("--prompts-file", panel=MODEL, help="One prompt per line. Default: the demo model's held-out prompts."),
    ] = None
    eval_prompts: Annotated[
        int | None,
        whole_option(
            "--eval-prompts", panel=MODEL, help="Last prompts, held out to verify the preset with. Default: 4."
        ),
    ] = None
    budget: Annotated[
        float | None,
        number_option(
            "--budget",
            panel=ATTENTION,
            help="Mean units of a call to stay within; dense attention is 4 a latent frame. Default: the preset's own.",
        ),
    ] = None
    error: Annotated[
        float | None,
        number_option("--error", panel=ATTENTION, help="Or the mean relative error of the final latents to reach."),
    ] = None
    preset_file: Annotated[
        str | None, option("--output", "-o", panel=OUTPUT, help="File of the preset, ends in .toml.")
    ] = None
    replace: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace the file if it exists.")] = False


@takes_request(*_NOT_OF_A_CLIP)
def calibrate(request: GenerateRequest, flags: CalibrateFlags, shown: Shown, debug: Debug = False) -> None:
    """Measure a model's layers and steps against dense attention, and write a preset that fits them.

    The preset spends its exact frames where they lower the error most. It is for this model and this number of steps,
    and carries what it rests on. Nothing is written before it was verified on held-out prompts.
    """
    out = shown.output()
    plan = _resolved(request, flags)
    out.note(*plan.clip.notes)
    out.warn(*plan.clip.warnings)

    from vmonarch_cli.pipeline.preflight import check_machine

    machine = check_machine(plan.clip)
    out.say(_header(plan))

    from vmonarch_cli.profile.calibrate.run import calibrate as run

    progress = PhaseProgress(out)
    try:
        with stoppable(out.insist), progress:
            result = run(plan, machine, on_phase=progress.phase)
    except Interrupted as error:
        raise typer.Exit(error.exit_code) from None
    if out.as_json:
        out.json(result.to_json())
    out.show(_tables(plan, result))
    if result.gains_nothing:
        out.warn(
            f"{result.before.preset} is as close to dense attention on the held-out prompts, for the same work or "
            f"less: {plan.output.name} gains nothing here; another --preset to start from, or a larger --budget, may"
        )
    out.paths(plan.output)


def _resolved(request: GenerateRequest, flags: CalibrateFlags) -> CalibratePlan:
    given = CalibrateRequest(
        clip=replace(request, tuned="none"),
        output=flags.preset_file,
        budget=flags.budget,
        error=flags.error,
        eval_prompts=flags.eval_prompts,
        overwrite=flags.replace,
    )
    return resolve_calibrate(given, prompts_of(flags.prompts_file, "calibration"))


def _header(plan: CalibratePlan) -> str:
    clip = plan.clip
    aim = f"at most {plan.budget:.1f} units" if plan.error is None else f"an error of {plan.error:g}"
    return (
        f"calibrating {clip.preset.name} for {clip.model.alias}: {clip.width}x{clip.height}, {clip.num_frames} frames, "
        f"{counted(clip.steps, 'step')}, guidance {clip.guidance_scale:g}; {aim} (dense is {4 * clip.grid[0]}), "
        f"{counted(len(plan.prompts), 'prompt')} measured, {len(plan.held_out)} held out"
    )


def _tables(plan: CalibratePlan, result: CalibrateResult) -> Any:
    steps = _measured("step", "frames exact a forward", result.steps)
    layers = _measured("layer", "weight", result.layers)
    return Group(steps, layers, _figures(plan, [result.before, result.after]))


def _measured(noun: str, title: str, rows: Sequence[Row]) -> Any:
    made = table(noun)
    for name in ("error alone", title):
        made.add_column(name, justify="right")
    for row in rows:
        name = f"{row.first}" if row.first == row.last else f"{row.first}-{row.last}"
        made.add_row(Text(name, style="bold"), f"{row.error:.4f}", f"{row.refresh:.2f}")
    return made


def _figures(plan: CalibratePlan, rows: Sequence[PresetFigures]) -> Any:
    made = table("preset")
    for name in ("units", "latent error, mean", "median"):
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            Text(row.preset, style="bold"), f"{row.units:.2f}", f"{row.error_mean:.4f}", f"{row.error_median:.4f}"
        )
    made.caption = f"{len(plan.held_out)} held-out prompts against dense ({4 * plan.clip.grid[0]} units)"
    return made
