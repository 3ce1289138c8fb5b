"""`vmonarch rerun`: the clip of a record once more, and whether it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmonarch_cli import __version__
from vmonarch_cli.cli.options import OUTPUT, Debug, Shown, option, takes_request
from vmonarch_cli.errors import EXIT_CLIP_FAILED
from vmonarch_cli.untrusted.files import user_path


@takes_request()
def rerun(
    record: Annotated[Path, typer.Argument(help="The .json record beside a clip, or the clip.", metavar="RECORD")],
    shown: Shown,
    output: Annotated[
        str | None, option("--output", "-o", panel=OUTPUT, help="File of the new clip. Default: NAME-rerun.")
    ] = None,
    device: Annotated[str | None, option("--device", panel=OUTPUT, help="Another device than the record's.")] = None,
    vae_dtype: Annotated[
        str | None, option("--vae-dtype", panel=OUTPUT, help="Another dtype to decode in than the record's.")
    ] = None,
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace files that exist.")] = False,
    debug: Debug = False,
) -> None:
    """Make the clip of a record again, with every setting as it was, and say whether the frames are identical.

    Exit 0 when every pixel is the same, 1 when not.
    """
    from vmonarch_cli.cli.progress import RunProgress
    from vmonarch_cli.clip.record import plan_again
    from vmonarch_cli.clip.record_model import record_file
    from vmonarch_cli.pipeline.preflight import check_machine
    from vmonarch_cli.review.rerun import check_record, repeat

    out = shown.output()
    file = record_file(user_path(str(record), "record"))
    before = check_record(file)
    plan = plan_again(file, output, overwrite, device, vae_dtype)
    out.note(*plan.notes)
    machine = check_machine(plan)
    with RunProgress(out) as progress:
        repetition = repeat(plan, machine, before, progress)
    if out.as_json:
        out.json({"version": __version__, **repetition.to_json()})
    out.say(repetition.sentence)
    out.paths(repetition.result.path)
    if not repetition.identical:
        raise typer.Exit(EXIT_CLIP_FAILED)
