"""`generate --prompts-file` and `decode`: from flags to a batch, and from what became of it to lines and exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vmonarch_cli import __version__
from vmonarch_cli.batch.events import BatchEvent, ClipFailed, ClipTakenOver, OverlapDone, WaitingForOthers
from vmonarch_cli.batch.folder import Batch
from vmonarch_cli.batch.prompts import FORMATS
from vmonarch_cli.batch.request import BatchFlags, BatchPlan, plan_batch
from vmonarch_cli.batch.worker import leave_group
from vmonarch_cli.cli import batch_tables as report
from vmonarch_cli.cli.opening import open_file
from vmonarch_cli.cli.options import OUTPUT, Debug, Shown, option, takes_request, whole_option
from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.plan_tables import overlap_rows, totals_json, totals_rows
from vmonarch_cli.cli.tables import facts
from vmonarch_cli.clip.interrupts import Interrupted, stoppable
from vmonarch_cli.errors import EXIT_CLIP_FAILED, VmonarchError
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.pipeline.overlap import Overlap, overlap_of
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
Overlapped = Annotated[
    bool | None,
    option(
        "--overlap/--no-overlap",
        panel=BATCH,
        help="Decode and write a clip while the next one is denoised. Default: on a GPU whose free memory takes both; "
        "--overlap does so wherever it can be done, also on a CPU.",
    ),
]


@dataclass(frozen=True)
class PlannedBatchOptions:
    """The flags of a batch that decide what is to be made."""

    prompts_file: PromptsFile = None
    prompts_format: PromptsFormat = None
    resume: Resume = None
    retry_failed: RetryFailed = False
    overlap: Overlapped = None

    def without_file(self) -> list[str]:
        """Sentences about flags of a batch that were given where no prompts file is."""
        given = {
            "--prompts-format": self.prompts_format is not None,
            "--resume": self.resume is True,
            "--no-resume": self.resume is False,
            "--retry-failed": self.retry_failed,
            "--overlap": self.overlap is True,
            "--no-overlap": self.overlap is False,
        }
        return [f"{flag} changes nothing without --prompts-file" for flag, is_given in given.items() if is_given]


@dataclass(frozen=True)
class BatchOptions(PlannedBatchOptions):
    """Every flag of a batch; `retry_dense` is of single clips, too."""

    max_failures: MaxFailures = None
    retry_dense: RetryDense = True

    def without_file(self) -> list[str]:
        """The same, with what decides how a batch is made."""
        more = [] if self.max_failures is None else ["--max-failures changes nothing without --prompts-file"]
        return [*super().without_file(), *more]

    def flags(self, overwrite: bool) -> BatchFlags:
        """The same for the batch itself."""
        return BatchFlags(
            source=self.prompts_file or "",
            format=self.prompts_format,
            resume=self.resume,
            retry_failed=self.retry_failed,
            max_failures=self.max_failures,
            retry_dense=self.retry_dense,
            overlap=self.overlap,
            overwrite=overwrite,
        )


def run_prompts_file(
    request: GenerateRequest,
    options: BatchOptions,
    shown: Shown,
    *,
    dry_run: bool,
    debug: bool,
    vram: float | None = None,
    open_page: bool = False,
) -> None:
    """Plan a batch and make it, or with `dry_run` show it, also for a card of `vram` GiB; `open_page` opens its page.

    Exits with 1 when a clip failed or was left unmade.
    """
    rank = read_rank()
    leave_group()
    flags = options.flags(request.overwrite)
    planned = plan_batch(request, flags, rank)
    from vmonarch_cli.cli.report import small_notes

    out = shown.output(main=rank.is_main)
    _tell_notes(planned, out)
    if dry_run:
        _show_plan(planned.open(dry=True), flags.overlap, out, vram)
        return
    machine = check_machine_for([clip.plan for clip in planned.clips])  # before the folder is touched
    overlap = overlap_of([clip.plan for clip in planned.clips], machine, flags.overlap)
    opened = planned.open(on_wait=out.insist, facts={"overlap": asdict(overlap)})
    if out.main:
        out.warn(*opened.notes)
        out.note(*small_notes([clip.plan for clip in planned.clips], machine))
    _run(opened, _Way(machine, overlap), flags, out, debug=debug, open_page=open_page)


@dataclass(frozen=True)
class _Way:
    """How a batch is made on this machine."""

    machine: Machine
    overlap: Overlap


def _run(batch: Batch, way: _Way, flags: BatchFlags, out: Output, *, debug: bool, open_page: bool) -> None:
    from vmonarch_cli.batch.runner import Limits, run_batch
    from vmonarch_cli.cli.progress import RunProgress
    from vmonarch_cli.plan.history import remember

    def on_clip(result: ClipResult, load_s: float | None) -> None:
        remember(result.record)
        out.tell(report.clip_line(result, len(batch.clips)))

    due = sum(report.to_do(clip, batch.before[clip.key]) in ("make", "decode") for clip in batch.clips)
    if due > 1 and out.main:
        out.tell(report.overlap_line(way.overlap))
    ended: list[OverlapDone] = []
    with stoppable(out.insist) as interrupts, RunProgress(out, on_clip, clips=due) as progress:

        def on_event(event: BatchEvent) -> None:
            match event:
                case ClipFailed(clip=clip, line=line, path=path, sentence=sentence, trace=trace):
                    progress.drop_clip(clip)
                    out.fail(f"line {line}: {path.name}: {sentence}")
                    if debug:
                        out.insist(trace)
                case ClipTakenOver(clip=clip, line=line, path=path, owner=owner):
                    progress.drop_clip(clip)
                    out.warn(f"line {line}: {path.name} was taken over by {owner or 'another process'}")
                case WaitingForOthers(count=count, owners=owners):
                    words = f" ({', '.join(owners)})" if owners else ""
                    out.tell(f"waiting for {count} clips that others are making{words}")
                case OverlapDone():
                    ended.append(event)
                case _:
                    progress(event)

        try:
            limits = Limits(flags.retry_dense, flags.max_failures, way.overlap.on)
            entries = run_batch(batch, way.machine, limits, interrupts, on_event=on_event)
        except Interrupted as stop:
            if not out.silent:
                out.tell(report.standing(batch, batch.manifest.read()))
                without = " (without --overwrite or --no-resume)" if flags.terms.again else ""
                out.tell(f"the same command{without} goes on from here")
            raise typer.Exit(stop.exit_code) from None
    if out.main:
        page = _write_page(batch, entries, out)
        _show_end(batch, entries, out, report.Overlapped(way.overlap, *ended))
        if open_page and page is not None:
            open_file(page, out)
    if any(entry.status != "done" for entry in entries.values()):
        raise typer.Exit(EXIT_CLIP_FAILED)


def _write_page(batch: Batch, entries: dict[str, Any], out: Output) -> Path | None:
    """The folder's index.html; the clips are what the user asked for, so a page that fails is a warning."""
    if not any(entry.status == "done" for entry in entries.values()):
        return None
    from vmonarch_cli.review.gallery import write_gallery

    try:
        gallery = write_gallery(batch.folder)
    except VmonarchError as error:
        out.warn(f"the gallery was not written: {error}")
        return None
    _warn_of([f"a clip is left out of the gallery: {sentence}" for sentence in gallery.left_out], out)
    return gallery.path


def _show_end(batch: Batch, entries: dict[str, Any], out: Output, overlap: report.Overlapped) -> None:
    if out.as_json:
        out.json({"version": __version__, **report.batch_json(batch, entries), "overlap": overlap.to_json()})
        return
    failures = report.failures(batch, entries)
    if out.silent:
        out.fail(*failures)
    elif failures:
        out.tabulate_failures(report.failure_table(batch, entries))
    if overlap.hidden:
        out.tell(overlap.hidden)
    out.tell(report.standing(batch, entries))
    out.paths(*(clip.path for clip in batch.clips if clip.key in entries and entries[clip.key].status == "done"))


def _show_plan(batch: Batch, overlap: bool | None, out: Output, vram: float | None) -> None:
    left = [clip.plan for clip in batch.clips if report.to_do(clip, batch.before[clip.key]) == "make"]
    if out.as_json:
        told = report.batch_json(batch, batch.before)
        out.json({"dry_run": True, "version": __version__, **told, "totals": totals_json(left, vram)})
    elif out.silent:
        out.paths(*(clip.path for clip in batch.clips))
    else:
        out.show(report.batch_table(batch))
        if left:
            out.show(facts([*totals_rows(left, vram), *overlap_rows(left, overlap, vram)]))
        out.say(report.standing(batch, batch.before))


def _tell_notes(planned: BatchPlan, out: Output) -> None:
    out.note(*planned.notes)
    _warn_of(planned.warnings, out)


def _warn_of(found: Sequence[str], out: Output) -> None:
    out.warn(*found[:_MAX_WARNINGS])
    if len(found) > _MAX_WARNINGS:
        out.warn(f"and {len(found) - _MAX_WARNINGS} more like these")


@takes_request()
def decode_latents(
    files: Annotated[list[Path], typer.Argument(help="Files ending in .latents.safetensors, or folders of them.")],
    output: Annotated[
        Path | None, option("--output", "-o", panel=OUTPUT, help="Folder for the clips. Default: beside the latents.")
    ] = None,
    device: Annotated[str | None, option("--device", panel=OUTPUT, help="auto, cpu, cuda or cuda:N.")] = None,
    vae_dtype: Annotated[
        str | None,
        option(
            "--vae-dtype",
            panel=OUTPUT,
            help="auto, float32, bfloat16 or float16: what the VAE decodes in. Default: as the run had it.",
        ),
    ] = None,
    keep: Annotated[bool, option("--keep", panel=OUTPUT, help="Do not remove the latents afterwards.")] = False,
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace files that exist.")] = False,
    *,
    shown: Shown,
    debug: Debug = False,
) -> None:
    """Decode latents that an interrupted or failed run saved, and write their clips and records."""
    from vmonarch_cli.batch.decoding import decode_files, find_files
    from vmonarch_cli.cli.progress import RunProgress

    found = find_files(files)
    out = shown.output()
    made: list[Path] = []
    with (
        stoppable(out.insist) as interrupts,
        RunProgress(out, lambda result, load_s: made.append(result.path), clips=len(found)) as progress,
    ):
        try:
            outcomes = decode_files(
                found,
                output,
                device=device,
                vae_dtype=vae_dtype,
                keep=keep,
                overwrite=overwrite,
                interrupts=interrupts,
                on_event=progress,
            )
        except Interrupted as stop:
            out.paths(*made)
            raise typer.Exit(stop.exit_code) from None
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    out.fail(*(f"{outcome.latents}: {outcome.error}" for outcome in failed))
    if out.as_json:
        out.json({"version": __version__, "clips": [outcome.to_json() for outcome in outcomes]})
    out.paths(*(outcome.path for outcome in outcomes if outcome.path is not None))
    if failed:
        raise typer.Exit(EXIT_CLIP_FAILED)
