"""The command line, called as a user does, in this process."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app


def call(*arguments: str, code: int = 0) -> Result:
    """What `vmonarch` gave for these arguments; AssertionError where it ended with another code."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result
