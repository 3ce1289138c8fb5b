"""`--preview`: strips of frames after each step, and a clip that ends with the step at hand."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from PIL import Image
from rich.console import Console

from vmonarch_cli.cli import previews
from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.previews import PROTOCOLS, ShownPreviews, protocol_of
from vmonarch_cli.clip.interrupts import EARLY, Interrupted, stoppable

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = ("generate", "-p", "a red star on a white background", "--size", "64x64", "--num-frames", "9", "--steps", "4")
QUICK = (*RUN, "--dense-every", "0")


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, np.ndarray]]:
    """What was in the preview's file after each step."""
    seen: list[tuple[Path, np.ndarray]] = []
    write = ShownPreviews.__call__

    def watched(self: ShownPreviews, index: int, picture: Any) -> None:
        write(self, index, picture)
        path = previews.preview_path(self._paths[index])
        with Image.open(path) as image:
            seen.append((path, np.asarray(image)))

    monkeypatch.setattr(ShownPreviews, "__call__", watched)
    return seen


def test_each_step_but_the_last_is_shown_and_changes_no_pixel(
    strips: list[tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    call(*QUICK, "-o", f"{tmp_path}/plain.mp4")
    call(*QUICK, "-o", f"{tmp_path}/a.mp4", "--preview")
    assert [path.name for path, _ in strips] == ["a.preview.png"] * 3
    assert all(picture.shape[0] >= 64 and picture.shape[1] == 3 * picture.shape[0] for _, picture in strips)
    red, green, blue = strips[-1][1].reshape(-1, 3).astype(int).T
    assert np.mean((red > 120) & (green > 120) & (blue > 120)) > 0.3  # the white background
    assert not (tmp_path / "a.preview.png").exists()  # the clip is there now
    plain, seen = (json.loads((tmp_path / name).read_text()) for name in ("plain.json", "a.json"))
    assert plain["frames"]["sha256"] == seen["frames"]["sha256"]
    assert seen["timing"]["preview_s"] > 0
    assert seen["timing"]["parts"]["previews_s"] == seen["timing"]["preview_s"]
    assert "preview_s" not in plain["timing"]
    assert "stopped_after" not in seen


def test_a_first_interrupt_ends_the_clip_with_its_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = ShownPreviews.__call__

    def interrupted(self: ShownPreviews, index: int, picture: Any) -> None:
        write(self, index, picture)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShownPreviews, "__call__", interrupted)
    done = call(*QUICK, "-o", f"{tmp_path}/a.mp4", "--num-videos", "2", "--preview")
    assert EARLY in done.stderr
    assert "stopped after step 1 of 4: the clip is what that step predicts; 1 more was not begun" in done.stderr
    (clip,) = tmp_path.glob("*.mp4")
    assert done.stdout.splitlines()[-1] == str(clip)
    record = json.loads(clip.with_suffix(".json").read_text())
    assert record["stopped_after"] == 1
    assert len(record["timing"]["steps"]) == 1
    assert record["frames"]["count"] == 9
    assert "stopped after step 1" in call("rerun", str(clip), code=2).stderr
    assert not list(tmp_path.glob("*.latents.safetensors"))


def test_without_preview_and_after_a_second_signal_a_run_ends_at_once() -> None:
    told: list[str] = []
    with stoppable(told.append) as interrupts:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
        interrupts.may_stop_early = True
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.stops_early
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    assert told == [EARLY]


def test_what_cannot_be_shown_is_refused_before_it_loads(tmp_path: Path) -> None:
    done = call("generate", "-m", "ltx-video", "-p", "a cat", "-o", f"{tmp_path}/a.mp4", "--preview", code=2)
    assert "--preview does not know latents of ltx-video" in done.stderr
    (tmp_path / "p.txt").write_text("red\n")
    done = call("generate", "--prompts-file", f"{tmp_path}/p.txt", "--preview", code=2)
    assert "--preview shows the steps of one prompt's clips" in done.stderr


@pytest.mark.parametrize("kind", ["picture", "folder", "text"])
def test_a_file_of_the_user_is_no_strip_and_stays(tmp_path: Path, kind: str) -> None:
    mine = tmp_path / "a.preview.png"
    if kind == "folder":  # as of `-o a.preview.png`
        mine.mkdir()
    elif kind == "text":
        mine.write_text("mine")
    else:
        Image.new("RGB", (4, 4)).save(mine)
    for flags in ((), ("--overwrite",)):
        done = call(*QUICK, "-o", f"{tmp_path}/a.mp4", "--preview", *flags, code=2)
        assert done.stderr.splitlines()[-1] == (
            f"error: {mine} exists already, and --preview would show its steps there: move it, or choose another "
            "--output"
        )
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]


def test_a_strip_that_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    paths = {0: tmp_path / "a.mp4"}
    ShownPreviews(Output(), paths, lambda write: write(), {})(0, np.zeros((4, 4, 3), np.uint8))
    assert (tmp_path / "a.preview.png").is_file()
    call(*QUICK, "-o", f"{tmp_path}/a.mp4", "--preview")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4"]


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-kitty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app", "TERM": "xterm-256color"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, None),
        ({"KITTY_WINDOW_ID": "1", "TERM": "tmux-256color", "TMUX": "socket"}, None),
    ],
)
def test_terminals_are_known_by_their_environment(environ: dict[str, str], protocol: str | None) -> None:
    assert protocol_of(environ) == protocol


def test_a_terminal_that_draws_gets_the_picture_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(stderr=Console(file=io.StringIO(), force_terminal=True))
    shown = ShownPreviews(out, {0: tmp_path / "a.mp4"}, lambda write: write(), {"TERM": "xterm-kitty"})
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    shown(0, picture)
    text = capsys.readouterr().err
    parts = [part.split(";", 1)[1] for part in text.strip().split("\x1b\\") if part]
    with Image.open(io.BytesIO(base64.b64decode("".join(parts)))) as image:
        assert np.array_equal(np.asarray(image), picture)
    assert not list(tmp_path.iterdir())


def test_sixels_hold_every_row_and_column() -> None:
    picture = np.zeros((7, 5, 3), np.uint8)
    picture[:, 2:] = (255, 0, 0)
    text = PROTOCOLS["sixel"](Image.fromarray(picture))
    assert text.startswith('\x1bPq"1;1;5;7')
    bands = text.rstrip("\n").removesuffix("\x1b\\").split("-")
    assert len([band for band in bands if band]) == 2
    assert chr(63 + 0b111111) * 3 in bands[0]  # six rows of three red columns
    assert chr(63 + 1) * 3 in bands[1]
