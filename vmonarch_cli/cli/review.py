"""Commands that look at what was made: compare, gallery, rerun and doctor. `app` registers them, as it does its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmonarch_cli import __version__
from vmonarch_cli.cli.options import ATTENTION, OUTPUT, AsJson, Debug, Quiet, option, takes_request
from vmonarch_cli.cli.output import Output
from vmonarch_cli.errors import EXIT_CLIP_FAILED, InputError
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest

Folder = Annotated[Path, typer.Argument(help="A folder of clips with their records.", metavar="FOLDER")]
Record = Annotated[Path, typer.Argument(help="The .json record beside a clip, or the clip.", metavar="RECORD")]


@takes_request("preset", "num_videos")
def compare(
    request: GenerateRequest,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Clips or records to compare, instead of making clips.", metavar="[FILES]..."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        option("--preset", panel=ATTENTION, help="What to hold against dense (repeatable). Default: the model's own."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make one clip dense and with presets, with one seed, and measure how far apart they are and what each cost.

    Writes the clips, a labelled side-by-side video, a contact sheet and an HTML report. With two or more files,
    compares those: settings that differ, figures, and frames against the first.
    """
    from vmonarch_cli.review.compare.existing import compare_files
    from vmonarch_cli.review.compare.files import check_folder, write_comparison

    if files:
        if len(files) < 2:
            raise InputError("compare takes two or more clips or records, or none and a --prompt")
        if request.prompt is not None or preset:
            raise InputError("compare takes files, or --prompt and --preset to make clips, not both")
        folder = Path(request.output).expanduser() if request.output else None
        if folder is not None:
            check_folder(folder, request.overwrite)
        comparison = compare_files(files)
    else:
        folder, comparison = _make(request, preset or [], silent=as_json or quiet)
    written = [] if folder is None else write_comparison(comparison, folder, request.overwrite or not files)
    if as_json:
        _print_json({"version": __version__, **comparison.to_json(), "files": [str(path) for path in written]})
        return
    if not quiet:
        _show_comparison(comparison)
    for path in written:
        typer.echo(path)


def _make(request: GenerateRequest, presets: list[str], silent: bool) -> tuple[Path, Any]:
    from vmonarch_cli.cli.progress import RunProgress
    from vmonarch_cli.pipeline.preflight import check_machine_for
    from vmonarch_cli.plan.history import remember
    from vmonarch_cli.review.compare.runs import plan_comparison, run_comparison

    folder, plans = plan_comparison(request, presets)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    first = next(iter(plans.values()))
    for sentence in first.notes if not silent else ():
        errors.print(f"note: {sentence}", style="dim", markup=False)
    for sentence in first.warnings:
        errors.print(f"warning: {sentence}", style="yellow", markup=False)
    machine = check_machine_for(list(plans.values()))
    with RunProgress(Output(quiet=silent), lambda result, load_s: remember(result.record)) as progress:
        comparison, _ = run_comparison(plans, machine, progress)
    return folder, comparison


def _show_comparison(comparison: Any) -> None:
    from vmonarch_cli.review.compare.page import figure_rows

    out = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("clip")
    rows = figure_rows(comparison)
    for title, _ in rows:
        table.add_column(title, justify="right")
    for number, contender in enumerate(comparison.contenders):
        table.add_row(Text(contender.name, style="bold"), *(Text(values[number]) for _, values in rows))
    out.print(table)
    if comparison.differing:
        settings = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        settings.add_column("setting that differs")
        for contender in comparison.contenders:
            settings.add_column(Text(contender.name), overflow="fold")
        for name, values in comparison.differing:
            settings.add_row(Text(name), *(Text(value) for value in values))
        out.print(settings)
    for note in comparison.notes:
        out.print(Text(note, style="dim"))


def gallery(folder: Folder, as_json: AsJson = False, debug: Debug = False) -> None:
    """Write index.html for a folder of clips: poster frames, videos, prompts and figures. Opens from the file."""
    from vmonarch_cli.review.gallery import find_clips, write_gallery

    path = write_gallery(folder)
    if as_json:
        _print_json({"version": __version__, "path": str(path), "clips": len(find_clips(folder))})
    else:
        typer.echo(path)


def rerun(
    record: Record,
    output: Annotated[
        str | None, option("--output", "-o", panel=OUTPUT, help="File of the new clip. Default: NAME-rerun.")
    ] = None,
    device: Annotated[str | None, option("--device", panel=OUTPUT, help="Another device than the record's.")] = None,
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace files that exist.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make the clip of a record again, with every setting as it was, and say whether the frames are identical.

    Exit 0 when every pixel is the same, 1 when not.
    """
    from vmonarch_cli.cli.progress import RunProgress
    from vmonarch_cli.clip.record import plan_again
    from vmonarch_cli.media.paths import ENDINGS, record_path
    from vmonarch_cli.pipeline.preflight import check_machine
    from vmonarch_cli.review.rerun import check_record, repeat

    file = record_path(record) if record.suffix.lower() in ENDINGS else record
    before = check_record(file)
    plan: Plan = plan_again(file, output, overwrite, device)
    machine = check_machine(plan)
    with RunProgress(Output(quiet=as_json or quiet)) as progress:
        repetition = repeat(plan, machine, before, progress)
    if as_json:
        _print_json({"version": __version__, **repetition.to_json()})
    else:
        if not quiet:
            typer.echo(repetition.sentence)
        typer.echo(repetition.result.path)
    if not repetition.identical:
        raise typer.Exit(EXIT_CLIP_FAILED)


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Examine this machine: versions, GPU, ffmpeg, disk, and the attention kernels against the reference.

    Exit 1 when something that vmonarch cannot do without is broken.
    """
    from vmonarch_cli.pipeline.doctor import examine

    checks = examine()
    broken = [check for check in checks if check.status == "broken"]
    if as_json:
        entries = [check.to_json() for check in checks]
        _print_json({"version": __version__, "healthy": not broken, "checks": entries})
    else:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        styles = {"ok": "green", "note": "yellow", "broken": "red"}
        for check in checks:
            table.add_row(Text(check.status, styles[check.status]), Text(check.name), Text(check.value))
        out = Console(highlight=False)
        out.print(table)
        verdict = f"{len(broken)} broken" if broken else "everything that vmonarch needs works"
        out.print(Text(verdict, style="red" if broken else "bold"))
    if broken:
        raise typer.Exit(EXIT_CLIP_FAILED)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
