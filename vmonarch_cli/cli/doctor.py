"""`vmonarch doctor`: whether this machine can do what vmonarch needs."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from vmonarch_cli import __version__
from vmonarch_cli.cli.options import AsJson, Debug
from vmonarch_cli.cli.output import Output
from vmonarch_cli.errors import EXIT_CLIP_FAILED

_STYLES = {"ok": "green", "note": "yellow", "broken": "red"}


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Examine this machine: versions, GPU, ffmpeg, disk, and the attention kernels against the reference.

    Exit 1 when something that vmonarch cannot do without is broken.
    """
    from vmonarch_cli.pipeline.doctor import examine

    out = Output(as_json=as_json)
    findings = examine()
    broken = [finding for finding in findings if finding.status == "broken"]
    if as_json:
        checks = [finding.to_json() for finding in findings]
        out.json({"version": __version__, "healthy": not broken, "checks": checks})
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for finding in findings:
        rows.add_row(Text(finding.status, _STYLES[finding.status]), Text(finding.name), Text(finding.value))
    out.show(rows)
    verdict = f"{len(broken)} broken" if broken else "everything that vmonarch needs works"
    out.show(Text(verdict, style="red" if broken else "bold"))
    if broken:
        raise typer.Exit(EXIT_CLIP_FAILED)
