"""`generate --prompts-file` and `decode`: from flags to a batch, and from what became of it to lines and exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vmonarch_cli import __version__
from vmonarch_cli.batch.events import BatchEvent, ClipFailed, WaitingForOthers
from vmonarch_cli.batch.folder import Batch
from vmonarch_cli.batch.prompts import FORMATS
from vmonarch_cli.batch.request import BatchFlags as BatchFlags
from vmonarch_cli.batch.request import BatchPlan, plan_batch
from vmonarch_cli.batch.worker import leave_group
from vmonarch_cli.cli.batch_tables import batch_json, batch_table, clip_line, failure_table, failures, standing
from vmonarch_cli.cli.options import OUTPUT, AsJson, Debug, Quiet, option, whole_option
from vmonarch_cli.clip.interrupts import Interrupted, stoppable
from vmonarch_cli.errors import EXIT_CLIP_FAILED, VmonarchError
from vmonarch_cli.machine.torchrun import Rank, read_rank
from vmonarch_cli.pipeline.preflight import Machine, check_machine_for
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.timing import ClipResult

BATCH = "Batch"
_MAX_WARNINGS = 10

PromptsFile = Annotated[
    str | None,
    option(
        "--prompts-file",
        "--from-file",
        panel=BATCH,
        metavar="FILE",
        help="Make a clip per line: .txt, .csv, .jsonl or .yaml; - is stdin. A line may set any field of its clip; "
        "flags beat lines.",
    ),
]
PromptsFormat = Annotated[
    str | None,
    option("--prompts-format", panel=BATCH, help=f"{', '.join(FORMATS)}. Default: by the ending; txt for stdin."),
]
Resume = Annotated[
    bool | None,
    option(
        "--resume/--no-resume",
        panel=BATCH,
        help="Go on with the batch in the output folder: skip what is done, decode what is denoised. Default: when the "
        "folder's manifest has clips of this request. --no-resume makes all clips again, under new names; "
        "--overwrite makes them again in place.",
    ),
]
RetryFailed = Annotated[
    bool, option("--retry-failed", panel=BATCH, help="Try again the clips that failed in an earlier run.")
]
MaxFailures = Annotated[
    int | None, whole_option("--max-failures", panel=BATCH, help="Stop after this many failed clips. Default: never.")
]
RetryDense = Annotated[
    bool,
    option(
        "--retry-dense/--no-retry-dense",
        panel=BATCH,
        help="Make a clip whose latents are not finite once more with dense attention. Default: yes.",
    ),
]


def run_prompts_file(
    request: GenerateRequest, flags: BatchFlags, *, dry_run: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Plan a batch and make it, or with `dry_run` show it. Exits with 1 when a clip failed or was left unmade."""
    rank = read_rank()
    leave_group()
    planned = plan_batch(request, flags, rank)
    silent = as_json or quiet or rank.rank > 0
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    if rank.rank == 0:
        _show_notes(planned, errors, silent)
    if dry_run:
        _show_dry_run(planned.open(dry=True), as_json, quiet)
        return
    machine = check_machine_for([clip.plan for clip in planned.clips])  # before the folder is touched
    _run(planned.open(), machine, flags, rank, errors, as_json=as_json, silent=silent, debug=debug)


def _run(
    batch: Batch,
    machine: Machine,
    flags: BatchFlags,
    rank: Rank,
    errors: Console,
    *,
    as_json: bool,
    silent: bool,
    debug: bool,
) -> None:
    from vmonarch_cli.batch.runner import Limits, run_batch
    from vmonarch_cli.cli.progress import RunProgress
    from vmonarch_cli.plan.history import remember

    def on_clip(result: ClipResult, load_s: float | None) -> None:
        remember(result.record)
        if not silent:
            errors.print(clip_line(result, len(batch.clips)), markup=False)

    with stoppable() as interrupts, RunProgress(Console(stderr=True, highlight=False), on_clip, silent) as progress:

        def on_event(event: BatchEvent) -> None:
            match event:
                case ClipFailed(line=line, path=path, sentence=sentence, trace=trace):
                    errors.print(f"failed: line {line}: {path.name}: {sentence}", style="red", markup=False)
                    if debug:
                        errors.print(trace, markup=False)
                case WaitingForOthers(count=count, owners=owners):
                    if not silent:
                        words = f" ({', '.join(owners)})" if owners else ""
                        errors.print(f"waiting for {count} clips that others are making{words}", markup=False)
                case _:
                    progress(event)

        try:
            limits = Limits(flags.retry_dense, flags.max_failures)
            entries = run_batch(batch, machine, limits, interrupts, on_event=on_event)
        except Interrupted as stop:
            if not silent:
                entries = batch.manifest.read()
                again = " (without --overwrite or --no-resume)" if flags.overwrite or flags.resume is False else ""
                errors.print(standing(batch, entries), markup=False)
                errors.print(f"the same command{again} goes on from here", markup=False)
            raise typer.Exit(stop.exit_code) from None
    left = [entry for entry in entries.values() if entry.status != "done"]
    if rank.rank == 0:
        _write_page(batch, entries, errors)
        _show_end(batch, entries, errors, as_json=as_json, silent=silent)
    if left:
        raise typer.Exit(EXIT_CLIP_FAILED)


def _write_page(batch: Batch, entries: dict[str, Any], errors: Console) -> None:
    """The folder's index.html; the clips are what the user asked for, so a page that fails is a warning."""
    if not any(entry.status == "done" for entry in entries.values()):
        return
    from vmonarch_cli.review.gallery import write_gallery

    try:
        write_gallery(batch.folder)
    except VmonarchError as error:
        errors.print(f"warning: the gallery was not written: {error}", markup=False)


def _show_end(batch: Batch, entries: dict[str, Any], errors: Console, *, as_json: bool, silent: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"version": __version__, **batch_json(batch, entries)}, indent=2))
        return
    sentences = failures(batch, entries)
    if silent:
        for sentence in sentences:
            errors.print(f"failed: {sentence}", markup=False)
    else:
        if sentences:
            Console(stderr=True, highlight=False).print(failure_table(batch, entries))
        errors.print(standing(batch, entries), markup=False)
    for clip in batch.clips:
        if clip.key in entries and entries[clip.key].status == "done":
            typer.echo(clip.path)


def _show_dry_run(batch: Batch, as_json: bool, quiet: bool) -> None:
    if as_json:
        about = {"dry_run": True, "version": __version__, **batch_json(batch, batch.before)}
        typer.echo(json.dumps(about, indent=2))
    elif quiet:
        for clip in batch.clips:
            typer.echo(clip.path)
    else:
        console = Console(highlight=False)
        console.print(batch_table(batch))
        console.print(standing(batch, batch.before), markup=False)


def _show_notes(planned: BatchPlan, errors: Console, silent: bool) -> None:
    found = planned.warnings
    for sentence in planned.notes if not silent else ():
        errors.print(f"note: {sentence}", style="dim", markup=False)
    for sentence in found[:_MAX_WARNINGS]:
        errors.print(f"warning: {sentence}", style="yellow", markup=False)
    if len(found) > _MAX_WARNINGS:
        errors.print(f"warning: and {len(found) - _MAX_WARNINGS} more like these", style="yellow", markup=False)


def decode_latents(
    files: Annotated[list[Path], typer.Argument(help="Files ending in .latents.safetensors, or folders of them.")],
    output: Annotated[
        Path | None, option("--output", "-o", panel=OUTPUT, help="Folder for the clips. Default: beside the latents.")
    ] = None,
    device: Annotated[str | None, option("--device", panel=OUTPUT, help="auto, cpu, cuda or cuda:N.")] = None,
    keep: Annotated[bool, option("--keep", panel=OUTPUT, help="Do not remove the latents afterwards.")] = False,
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace files that exist.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Decode latents that an interrupted or failed run saved, and write their clips and records."""
    from vmonarch_cli.batch.decoding import decode_files, find_files
    from vmonarch_cli.cli.progress import RunProgress

    found = find_files(files)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    silent = as_json or quiet
    with stoppable() as interrupts, RunProgress(errors, lambda *_: None, silent) as progress:
        try:
            outcomes = decode_files(
                found,
                output,
                device=device,
                keep=keep,
                overwrite=overwrite,
                interrupts=interrupts,
                on_event=progress,
            )
        except Interrupted as stop:
            raise typer.Exit(stop.exit_code) from None
    for outcome in outcomes:
        if outcome.error is not None:
            errors.print(f"failed: {outcome.latents}: {outcome.error}", style="red", markup=False)
    if as_json:
        typer.echo(json.dumps({"version": __version__, "clips": [outcome.to_json() for outcome in outcomes]}, indent=2))
    else:
        for outcome in outcomes:
            if outcome.path is not None:
                typer.echo(outcome.path)
    if any(outcome.error is not None for outcome in outcomes):
        raise typer.Exit(EXIT_CLIP_FAILED)
