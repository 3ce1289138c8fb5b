"""`vmonarch gallery`: one page of a folder of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmonarch_cli import __version__
from vmonarch_cli.cli.opening import Open, open_file
from vmonarch_cli.cli.options import AsJson, Debug
from vmonarch_cli.cli.output import Output
from vmonarch_cli.untrusted.files import user_path


def gallery(
    folder: Annotated[Path, typer.Argument(help="A folder of clips with their records.", metavar="FOLDER")],
    as_json: AsJson = False,
    open_page: Open = False,
    debug: Debug = False,
) -> None:
    """Write index.html for a folder of clips: poster frames, videos, prompts and figures. Opens from the file."""
    from vmonarch_cli.review.gallery import write_gallery

    out = Output(as_json=as_json)
    page = write_gallery(user_path(str(folder), "folder"))
    out.warn(*(f"a clip is left out: {sentence}" for sentence in page.left_out))
    if as_json:
        about = {"path": str(page.path), "clips": page.clips, "left_out": page.left_out}
        out.json({"version": __version__, **about})
    out.paths(page.path)
    if open_page:
        open_file(page.path, out)
