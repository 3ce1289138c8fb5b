"""Paths that nobody should type, given to compare, gallery and rerun: one sentence and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app

ODD = {
    "a user that is not there": "~nosuchuser/x",
    "a long name": "x" * 300,
    "a long record": "x" * 300 + ".json",
    "a long clip": "x" * 300 + ".mp4",
    "a long path": "x/" * 3000 + "a.json",
    "NUL": "a\0b",
    "half a pair": "\ud800",
    "markup": "[/red]/x.json",
    "escapes": "\x1b[31mX\x1b]0;pwned\x07.json",
    "an endless device": "/dev/zero",
    "a clip that is a device": "/dev/zero/x.mp4",
    "nothing": "",
}


def check(arguments: list[str], folder: Path) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "unexpected" not in result.stderr
    assert not {"\x1b", "\x07"} & set(result.stderr)
    assert not list(folder.iterdir()), "nothing is written"


@pytest.mark.parametrize("kind", ODD)
def test_what_is_read(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["gallery", ODD[kind]], ["rerun", ODD[kind]], ["compare", ODD[kind], ODD[kind]]):
        check(command, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind not in ("markup", "escapes", "a clip that is a device")])
def test_where_it_is_written(
    tmp_path: Path, kind: str, tiny_record: Path, tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = str(tiny_record)
    check(["compare", "-m", str(tiny_wan_folder), "-p", "a cat", "--preset", "fast", "-o", ODD[kind]], tmp_path)
    check(["compare", record, record, "-o", ODD[kind]], tmp_path)
    check(["rerun", record, "-o", ODD[kind] + ("" if kind == "nothing" else "/x.mp4")], tmp_path)
