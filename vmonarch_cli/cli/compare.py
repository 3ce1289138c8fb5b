"""`vmonarch compare`: clips against dense ones, or against each other."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from vmonarch_cli import __version__
from vmonarch_cli.cli.completion import preset_names
from vmonarch_cli.cli.opening import Open, open_file
from vmonarch_cli.cli.options import ATTENTION, Debug, Shown, configured, option, takes_request
from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.tables import table
from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import output_path
from vmonarch_cli.plan.defaults import default_of
from vmonarch_cli.plan.request import GenerateRequest, flag_name
from vmonarch_cli.plan.seeds import RANDOM
from vmonarch_cli.text import listed
from vmonarch_cli.untrusted.files import user_path

if TYPE_CHECKING:
    from vmonarch_cli.review.compare.results import Comparison


@takes_request("preset", "num_videos")
def compare(
    request: GenerateRequest,
    shown: Shown,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Clips or records to compare, instead of making clips.", metavar="[FILES]..."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        option(
            "--preset",
            panel=ATTENTION,
            autocompletion=preset_names,
            help="What to hold against dense (repeatable). Default: the model's own.",
        ),
    ] = None,
    open_page: Open = False,
    debug: Debug = False,
) -> None:
    """Make one clip dense and with presets, with one seed, and measure how far apart they are and what each cost.

    Writes the clips, a labelled side-by-side video, a contact sheet and an HTML report. With two or more files,
    compares those: settings that differ, figures, and frames against the first.
    """
    from vmonarch_cli.review.compare.existing import compare_files
    from vmonarch_cli.review.compare.files import check_folder, write_comparison

    request = configured(request)
    out = shown.output()
    if files:
        if len(files) < 2:
            raise InputError("compare takes two or more clips or records, or none and a --prompt")
        if request.prompt is not None or preset:
            raise InputError("compare takes files, or --prompt and --preset to make clips, not both")
        if others := _of_clips(request):
            raise InputError(f"compare takes files as they are: leave out {listed(others)}, with which clips are made")
        folder = None if request.output is None else output_path(request.output)
        if folder is not None:
            check_folder(folder, request.overwrite)
        comparison = compare_files([user_path(str(file), "file") for file in files])
    else:
        folder, comparison = make_comparison(request, preset or [], out)
    written = [] if folder is None else write_comparison(comparison, folder, request.overwrite or not files)
    if out.as_json:
        out.json({"version": __version__, **comparison.to_json(), "files": [str(path) for path in written]})
    show_comparison(comparison, out)
    out.paths(*written)
    page = next((path for path in written if path.suffix == ".html"), None)
    if open_page and page is not None:
        open_file(page, out)


def _of_clips(request: GenerateRequest) -> list[str]:
    """The flags of a request that say how a clip is made."""
    given = request.given() - {"output", "overwrite", "defaults"}
    names = [field.name for field in fields(request) if field.name in given]
    return [f"--{'no-' if getattr(request, name) is False else ''}{flag_name(name)}" for name in names]


def make_comparison(request: GenerateRequest, presets: list[str], out: Output) -> tuple[Path, Comparison]:
    """Make the clips of a request, dense and with presets, in view of the user; (the folder that they are in, what was
    measured).

    Raises as `plan_comparison` and `run_comparison` do.
    """
    from vmonarch_cli.cli.race import RaceProgress
    from vmonarch_cli.cli.report import small_notes
    from vmonarch_cli.pipeline.preflight import check_machine_for
    from vmonarch_cli.plan.history import remember
    from vmonarch_cli.review.compare.runs import plan_comparison, run_comparison

    folder, plans = plan_comparison(request, presets)
    first = next(iter(plans.values()))
    out.note(*first.notes)
    if default_of(request, "seed") == RANDOM:
        out.note(f"seed {first.seed} was drawn: --seed {first.seed} makes the same clips")
    out.warn(*dict.fromkeys(sentence for plan in plans.values() for sentence in plan.warnings))
    machine = check_machine_for(list(plans.values()))
    out.note(*small_notes(list(plans.values()), machine))
    with RaceProgress(out, list(plans), lambda result, load_s: remember(result.record)) as progress:
        comparison, _ = run_comparison(plans, machine, progress)
    return folder, comparison


def show_comparison(comparison: Comparison, out: Output) -> None:
    """The figures of every clip, the settings that differ, and what else there is to say."""
    from vmonarch_cli.review.compare.page import figure_notes

    show_figures(comparison, out)
    if comparison.differing:
        settings = table("setting that differs")
        for clip in comparison.clips:
            settings.add_column(Text(clip.name), overflow="fold")
        for name, values in comparison.differing:
            settings.add_row(Text(name), *(Text(value) for value in values))
        out.show(settings)
    for note in (*figure_notes(comparison), *comparison.notes):
        out.show(Text(note, style="dim"))


def show_figures(comparison: Comparison, out: Output) -> None:
    """The figures of every clip, as the page has them."""
    from vmonarch_cli.review.compare.page import figure_rows

    rows = figure_rows(comparison)
    figures = table("clip")
    for title, _ in rows:
        figures.add_column(title, justify="right")
    for number, clip in enumerate(comparison.clips):
        figures.add_row(Text(clip.name, style="bold"), *(Text(values[number]) for _, values in rows))
    out.show(figures)
