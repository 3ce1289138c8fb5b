"""The files of a comparison: side-by-side.mp4, contact-sheet.png, report.html and compare.json in one folder."""

from __future__ import annotations

import io
from pathlib import Path

from vmonarch_cli.errors import OutputError
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.media.write import write_clip, write_record
from vmonarch_cli.review.compare.page import report_page
from vmonarch_cli.review.compare.results import Comparison

FILM, SHEET, PAGE, FIGURES = "side-by-side.mp4", "contact-sheet.png", "report.html", "compare.json"


def write_comparison(comparison: Comparison, folder: Path, overwrite: bool = False) -> list[Path]:
    """Write all files and return their paths, the report last; pictures only where every clip has frames."""
    from vmonarch_cli.review.compare.pictures import contact_sheet, side_by_side

    written = []
    film = sheet = None
    if all(len(clip.frames) for clip in comparison.clips):
        film_frames, sound = side_by_side(comparison), comparison.reference.sound
        path = write_clip(film_frames, folder / FILM, comparison.fps, overwrite, sound=sound)
        film = path.read_bytes()
        stream = io.BytesIO()
        contact_sheet(comparison).save(stream, "PNG", optimize=True)
        sheet = stream.getvalue()
        written = [path, _write(folder / SHEET, sheet, overwrite)]
    written.append(write_record(folder / FIGURES, comparison.to_json(), overwrite))
    page = report_page(comparison, film, sheet).encode("utf-8")
    return [*written, _write(folder / PAGE, page, overwrite)]


def check_folder(folder: Path, overwrite: bool) -> None:
    """OutputError before anything is computed when one of the files is there already."""
    taken = [folder / name for name in (FILM, SHEET, PAGE, FIGURES) if (folder / name).exists()]
    if taken and not overwrite:
        raise OutputError(f"{taken[0]} exists already: pass --overwrite to replace it, or another --output")


def _write(path: Path, content: bytes, overwrite: bool) -> Path:
    with atomic(path, overwrite) as temporary:
        temporary.write_bytes(content)
    return path
