"""`vmonarch generate`: make clips from a prompt, and print what their attention cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vmonarch_cli.cli import batch, plan
from vmonarch_cli.cli.opening import Open, open_file
from vmonarch_cli.cli.options import OUTPUT, Debug, Shown, Stray, configured, option, refuse_stray, takes_request
from vmonarch_cli.cli.output import Output
from vmonarch_cli.clip.events import Event, LatentsSaved
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
    open_result: Open = False,
    debug: Debug = False,
    words: Stray = None,
) -> None:
    """Make clips from a prompt and print what the attention cost, step by step, against dense attention."""
    refuse_stray(words)
    request = configured(request)
    if options.prompts_file is not None:
        batch.run_prompts_file(request, options, shown, dry_run=dry_run, debug=debug, open_page=open_result)
        return
    out = shown.output(main=read_rank().is_main)
    if default_of(request, "seed") == RANDOM and read_rank().world > 1:
        raise InputError("--seed -1 would draw another seed in each process of a torchrun: give a seed")
    resolved = resolve(request)
    plan.tell_notes(resolved, out)
    if dry_run:
        plan.show_plan(resolved, out)
    else:
        paths = _run(resolved, out, options.retry_dense)
        if open_result and paths:
            open_file(paths[0], out)


def _run(resolved: Plan, out: Output, retry_dense: bool) -> list[Path]:
    """Run a plan: the header first, a report per clip, the paths last; returns these."""
    from vmonarch_cli.cli import report
    from vmonarch_cli.cli.progress import RunProgress
    from vmonarch_cli.pipeline.preflight import check_machine
    from vmonarch_cli.plan.history import remember

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

    def on_event(event: Event) -> None:
        if isinstance(event, LatentsSaved):
            saved.append(event.path)
        progress(event)

    try:
        with stoppable(out.insist) as interrupts, progress:
            results = run_generate(
                resolved, machine, retry_dense=retry_dense, finishing=interrupts.finishing, on_event=on_event
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
    out.paths(*(result.path for result in results))
    return [result.path for result in results]


def _name_saved_latents(saved: Sequence[Path], out: Output) -> None:
    """What a run that ended early has computed is not lost: say where it is."""
    for path in saved:
        if path.is_file():
            out.insist(f"latents are saved: vmonarch decode {shlex.quote(str(path))}")
