"""The one place that prints: what goes where, text that is not ours, and streams that break."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmonarch_cli.cli.output import Output, steady_streams

HOSTILE = "\x1b[31mred\x1b[0m \x9b31m \u202eabc \ud800 [red]x[/red] :cat:"
HARMLESS = "\\x1b[31mred\\x1b[0m \\x9b31m \\u202eabc \\ud800 [red]x[/red] :cat:"


def on_terminal() -> tuple[Output, io.StringIO, io.StringIO]:
    """An Output on two terminals that are 200 columns wide."""
    files = io.StringIO(), io.StringIO()
    stdout, stderr = (
        Console(
            file=file, width=200, force_terminal=True, color_system=None, highlight=False, markup=False, emoji=False
        )
        for file in files
    )
    return Output(stdout=stdout, stderr=stderr), *files


def test_text_of_strangers_cannot_steer_a_terminal() -> None:
    out, results, words = on_terminal()
    table = Table()
    table.add_column(Text(HOSTILE))
    table.add_row(HOSTILE)
    out.show(table)
    out.say(HOSTILE)
    for tell in (out.note, out.warn, out.fail, out.error, out.tell, out.insist, out.retry):
        tell(HOSTILE)
    assert results.getvalue().count(HARMLESS) == 3
    assert words.getvalue().count(HARMLESS) == 7
    assert not {"\x1b", "\x9b", "\u202e"} & set(results.getvalue() + words.getvalue())


@pytest.mark.parametrize(
    ("out", "told", "shown"),
    [
        (Output(), "note: n\nwarning: w\nfailed: f\nerror: e\nt\ni\n", "s\np\n"),
        (Output(quiet=True), "warning: w\nfailed: f\nerror: e\ni\n", "p\n"),
        (Output(as_json=True), "warning: w\nfailed: f\nerror: e\ni\n", ""),
        (Output(main=False), "failed: f\nerror: e\ni\n", ""),
    ],
    ids=["all", "quiet", "json", "another rank"],
)
def test_what_is_left_out_when(out: Output, told: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    out.note("n", "n")
    out.warn("w")
    out.fail("f")
    out.error("e")
    out.tell("t")
    out.insist("i")
    out.say("s")
    out.paths("p")
    found = capsys.readouterr()
    assert (found.err, found.out) == (told, shown)


def test_a_thousand_errors_that_are_alike_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error(*(f"line {number} is\nwrong" for number in range(1000)))
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), lines[0], lines[-1]) == (101, "error: line 0 is wrong", "error: and 900 more like these")


# Streams that break: in processes of their own, since this one's streams are pytest's

SAY = "from vmonarch_cli.cli.output import Output, steady_streams\nimport sys\nout = Output()\n"


def run(code: str, stdout: Any = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    inside = "".join(f"    {line}\n" for line in code.splitlines())
    return subprocess.run(
        [sys.executable, "-c", f"{SAY}with steady_streams():\n{inside}"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_reader_that_leaves_costs_nothing(tmp_path: Path) -> None:
    code = f"for i in range(9999): out.say('x' * 99)\nopen({str(tmp_path / 'made')!r}, 'w').close()"
    reader, writer = os.pipe()
    os.close(reader)
    done = run(code, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "made").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_at_the_end_and_not_before(tmp_path: Path) -> None:
    code = f"for i in range(9999): out.say('x' * 99)\nopen({str(tmp_path / 'made')!r}, 'w').close()"
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = run(code, stdout=full)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert (tmp_path / "made").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_of_a_full_disk_a_command_says_one_sentence() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [sys.executable, "-m", "vmonarch_cli", "presets"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "error: standard output could not be written: No space left on device; files that were made are whole\n"
    )


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "said"),
    [
        (">&-", "presets", 0, b""),
        ("2>&-", "presets", 0, b"balanced"),
        ("2>&-", "presets show nope", 2, b""),
        (">&-", "presets show nope", 2, b"error: there is no preset 'nope'"),
        ("<&- >&- 2>&-", "presets", 0, b""),
        ("<&-", "generate --prompts-file - --dry-run", 2, b"error: stdin"),
    ],
)
def test_a_stream_that_was_closed_before_the_start_costs_nothing(
    closed: str, arguments: str, code: int, said: bytes
) -> None:
    command = f"{shlex.quote(sys.executable)} -m vmonarch_cli {arguments} {closed}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False)
    assert said in done.stdout + done.stderr


def test_a_stdout_that_is_not_utf8_gets_what_it_can_take() -> None:
    done = run(
        "out.say('13 · 4 µs ✓ 猫')\nout.json({'cat': '猫 µ'}, indent=None)\nout.paths('/猫.mp4')",
        PYTHONIOENCODING="ascii",
    )
    said, printed, path = done.stdout.splitlines()
    assert (done.returncode, said) == (0, rb"13 - 4 us + \u732b")
    assert json.loads(printed) == {"cat": "猫 µ"}
    assert path == "/猫.mp4".encode()  # the bytes of its name: a script opens it by them


def test_the_streams_are_the_old_ones_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with steady_streams():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
