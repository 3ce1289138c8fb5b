"""What the shell offers, without torch, and `--open`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import call

from vmonarch_cli.cli import opening


@pytest.mark.parametrize(
    ("typed", "offered", "absent"),
    [
        ("generate --preset b", ["balanced"], ["fast"]),
        ("generate --preset a", ["auto"], ["paper"]),
        ("compare --preset f", ["fast"], []),
        ("demo --preset f", ["fast"], []),
        ("profile kernel --preset p", ["paper"], []),
        ("plan --recipe wan2.1-l", ["wan2.1-lightx2v-4step"], ["wan2.2"]),
        ("generate -m wan2.1", ["wan2.1-1.3b", "wan2.1-14b"], ["demo"]),
    ],
)
def test_names_are_offered_without_torch(typed: str, offered: list[str], absent: list[str]) -> None:
    code = (
        "import sys\n"
        "from vmonarch_cli.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n    print({'torch', 'numpy', 'diffusers'} & set(sys.modules) or 'light')\n"
    )
    asked = {"_VMONARCH_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": f"vmonarch {typed}"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert all(name in done.stdout for name in offered), done
    assert not any(name in done.stdout for name in absent)
    assert "light" in done.stdout


# --open


SMALL = ("--size", "32x32", "--num-frames", "5", "--steps", "1")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_thread: None) -> list[str]:
    """What the platform was asked to open."""
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def launch(url: str) -> int:
        asked.append(url)
        return 0

    monkeypatch.setattr(opening.typer, "launch", launch)
    return asked


def test_nothing_is_opened_where_there_is_no_terminal(opened: list[str]) -> None:
    result = call("generate", "-p", "red", *SMALL, "-o", "x.gif", "--open")
    assert opened == []
    assert "note: x.gif is not opened: --open works in a terminal alone" in result.stderr


def test_a_terminal_gets_the_clip_and_the_pages(
    opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_is_terminal", lambda out: True)
    call("generate", "-p", "red", *SMALL, "-o", "x.gif", "--open", "-q")
    Path("p.txt").write_text("red\n")
    call("generate", "--prompts-file", "p.txt", *SMALL, "-o", "out/", "--open", "-q")
    call("compare", "-p", "red", *SMALL, "-o", "c/", "--preset", "fast", "--open", "-q")
    call("gallery", "out", "--open")
    call("generate", "-p", "red", *SMALL, "-o", "y.gif", "-q")
    report = next(Path(tmp_path / "c").glob("*.html"))
    assert opened == [str(tmp_path / name) for name in ("x.gif", "out/index.html", report, "out/index.html")]
    monkeypatch.setattr(opening.typer, "launch", lambda url: 1)
    assert "warning: out/index.html could not be opened" in call("gallery", "out", "--open").stderr
