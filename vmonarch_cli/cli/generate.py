"""`vmonarch generate`: make clips from a prompt, and print what their attention cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vmonarch_cli.cli import batch, plan
from vmonarch_cli.cli.opening import Open, open_file
from vmonarch_cli.cli.options import OUTPUT, Debug, Shown, configured, option, takes_request
from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.previews import ShownPreviews, WantsPreview, check_places
from vmonarch_cli.clip.events import ClipDone, ClipStarted, CompilingKernels, Event, LatentsSaved, StepDone
from vmonarch_cli.clip.interrupts import Interrupted, stoppable
from vmonarch_cli.errors import InputError
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.plan.defaults import default_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve, with_hub_loras
from vmonarch_cli.plan.seeds import RANDOM
from vmonarch_cli.timing import ClipResult


@takes_request()
def generate(
    request: GenerateRequest,
    shown: Shown,
    options: batch.BatchOptions,
    dry_run: Annotated[
        bool, option("--dry-run", panel=OUTPUT, help="Print the resolved settings and their origins; load nothing.")
    ] = False,
    preview: WantsPreview = False,
    open_result: Open = False,
    debug: Debug = False,
) -> None:
    """Make clips from a prompt and print what the attention cost, step by step, against dense attention."""
    request = configured(request)
    if options.prompts_file is not None:
        if preview:
            raise InputError("--preview shows the steps of one prompt's clips, and --prompts-file makes a batch")
        batch.run_prompts_file(request, options, shown, dry_run=dry_run, debug=debug, open_page=open_result)
        return
    out = shown.output(main=read_rank().is_main)
    if default_of(request, "seed") == RANDOM and read_rank().world > 1:
        raise InputError("--seed -1 would draw another seed in each process of a torchrun: give a seed")
    resolved = resolve(request)
    plan.tell_notes(resolved, out)
    out.warn(*options.without_file())
    if dry_run:
        plan.show_plan(resolved, out)
    else:
        paths = _run(resolved, out, options.retry_dense, preview)
        if open_result and paths:
            open_file(paths[0], out)


def _run(resolved: Plan, out: Output, retry_dense: bool, preview: bool) -> list[Path]:
    """Run a plan: the header first, a report per clip, the paths last; returns these."""
    from vmonarch_cli.cli import report
    from vmonarch_cli.cli.progress import RunProgress
    from vmonarch_cli.clip.preview import Preview, check_preview
    from vmonarch_cli.pipeline.preflight import check_machine
    from vmonarch_cli.plan.history import remember

    if preview:
        check_preview(resolved)
        check_places(resolved.outputs, out)
    resolved = with_hub_loras(resolved)
    machine = check_machine(resolved)
    out.show(report.header(resolved, machine))

    made: list[ClipResult] = []
    saved: list[Path] = []

    def on_clip(result: ClipResult, load_s: float | None) -> None:
        made.append(result)
        remember(result.record)
        title = f"clip {result.index + 1} of {resolved.num_videos}" if resolved.num_videos > 1 else ""
        out.show(lambda width: report.clip_report(result, load_s, title, width))

    from vmonarch_cli.clip.make import generate as run_generate

    progress = RunProgress(out, on_clip, live=report.step_table)

    shown = ShownPreviews(out, dict(enumerate(resolved.outputs)), progress.aside)

    try:
        with stoppable(out.insist) as interrupts, progress:

            def on_event(event: Event) -> None:
                if isinstance(event, LatentsSaved):
                    saved.append(event.path)
                if preview:
                    interrupts.may_stop_early = isinstance(event, ClipStarted | CompilingKernels | StepDone)
                    if isinstance(event, ClipDone):
                        shown.remove(event.result.index)
                progress(event)

            results = run_generate(
                resolved,
                machine,
                retry_dense=retry_dense,
                finishing=interrupts.finishing,
                on_event=on_event,
                preview=Preview(shown, lambda: interrupts.stops_early) if preview else None,
            )
    except BaseException as error:
        if progress.steps:
            out.show(lambda width: report.interrupted_report(progress.steps, width))
        _name_saved_latents(saved, out)
        if isinstance(error, Interrupted):
            out.paths(*(result.path for result in made))  # they are whole, whatever is missing
            raise typer.Exit(error.exit_code) from None
        raise
    if out.as_json:
        clips = [{"path": str(result.path), **result.record} for result in results]
        out.json({**plan.plan_json(resolved), "clips": clips})
    _tell_stopped(results, resolved, out)
    out.paths(*(result.path for result in results))
    return [result.path for result in results]


def _tell_stopped(results: Sequence[ClipResult], resolved: Plan, out: Output) -> None:
    """Of a run that the user stopped early: what its last clip is, and which were not begun."""
    done = len(results[-1].timing.steps) if results else resolved.steps
    if done >= resolved.steps:
        return
    left = resolved.num_videos - len(results)
    rest = f"; {left} more {'was' if left == 1 else 'were'} not begun" if left else ""
    out.insist(f"stopped after step {done} of {resolved.steps}: the clip is what that step predicts{rest}")


def _name_saved_latents(saved: Sequence[Path], out: Output) -> None:
    """What a run that ended early has computed is not lost: say where it is."""
    for path in saved:
        if path.is_file():
            out.insist(f"latents are saved: vmonarch decode {shlex.quote(str(path))}")
