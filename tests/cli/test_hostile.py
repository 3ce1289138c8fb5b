"""Presets of strangers through the whole command: one sentence and exit code 2 each, whatever they hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app

PRESETS = {
    "ansi": 'name = "\\u001b[31mX\\u001b]0;pwned\\u0007"\n',
    "markup": 'name = "[/red]"\n',
    "bigint": f"num_steps = {'9' * 5000}\n",
    "bighex": f"num_steps = 0x{'f' * 5000}\n",
    "deep": f"band = {'[' * 3000}{']' * 3000}\n",
    "nul": 'impl = "\\u0000"\n',
    "a field of markup": '"[red]" = 1\n',
    "a long field": f"{'x' * 5000} = 1\n",
    "a table": "[band]\nx = 1\n",
    "no text": "\x00\x01",
}
COMMANDS = (
    ("presets", "check"),
    ("presets", "show"),
    ("plan", "-m", "wan2.1-1.3b", "-p", "a cat", "--preset"),
    ("profile", "kernel", "--device", "cpu", "--preset"),
)


def one_sentence(result: Result) -> str:
    """The one line on stderr of a call that did nothing."""
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "unexpected" not in lines[0]
    assert lines[0].isprintable()
    assert len(lines[0]) < 500
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, command: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / f"{name}.toml"
    file.write_text(PRESETS[name])
    one_sentence(CliRunner().invoke(app, [*command, str(file)]))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_what_is_no_regular_file(command: tuple[str, ...], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    paths = ["/dev/zero", "~nosuchuser/x.toml", "a\0b.toml", "\ud800/b.toml", f"{'x' * 300}.toml"]
    paths += [str(tmp_path / name) for name in ("pipe.toml", "folder.toml", "loop.toml", "missing.toml")]
    for path in paths:
        one_sentence(CliRunner().invoke(app, [*command, path]))


@pytest.mark.parametrize(
    "value",
    [
        f"num_steps={'9' * 5000}",
        f"num_steps=0x{'f' * 5000}",
        f"band={'[' * 3000}{']' * 3000}",
        "impl=\x1b[31m",
        "impl=[red]x[/red]",
        "impl=\ud800",
        "band=1\nimpl='torch'",
        "name=x",
        f"{'x' * 5000}=1",
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_assignments(value: str) -> None:
    one_sentence(CliRunner().invoke(app, ["plan", "-m", "wan2.1-1.3b", "-p", "a cat", "--set", value]))


@pytest.mark.parametrize("flag", ["--steps", "--seed", "--height", "--guidance-scale", "--dense-steps", "--num-videos"])
@pytest.mark.parametrize("value", ["9" * 4000, "9" * 5000, "1e999", "nan", "0x10", "\x1b[31m", ""])
def test_numbers(flag: str, value: str) -> None:
    if flag == "--guidance-scale" and value == "0x10":
        value = "-inf"
    one_sentence(CliRunner().invoke(app, ["plan", "-m", "wan2.1-1.3b", "-p", "a cat", flag, value]))
