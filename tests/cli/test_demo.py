"""`vmonarch demo`: one clip dense and structured, both timings live, a page and a verdict."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from command import call
from rich.console import Console

from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.race import RaceProgress, over_reference
from vmonarch_cli.clip.events import ClipStarted, Decoding, StepDone
from vmonarch_cli.timing import StepAttention


def step(index: int, step_s: float, attention_s: float, total: int = 2) -> StepAttention:
    return StepAttention(index, total, 1.0, step_s, attention_s, 8, 0)


def race(**console: object) -> str:
    """What is shown of a dense clip of two steps and a structured one that has made its first."""
    stream = io.StringIO()
    out = Output(stderr=Console(file=stream, width=120, **console))  # type: ignore[arg-type]
    with RaceProgress(out, ["dense", "fast"]) as progress:
        progress(ClipStarted(0, 2, 0, 2))
        for one in (step(0, 4.0, 3.0), step(1, 4.0, 3.0)):
            progress(StepDone(0, one))
        progress(Decoding(0))
        progress(ClipStarted(1, 2, 0, 2))
        progress(StepDone(0, step(0, 2.0, 1.0)))
        if progress._bar:
            progress._bar.refresh()
        else:
            progress(StepDone(0, step(1, 2.0, 0.5)))
            progress(Decoding(1))
    return stream.getvalue()


def test_a_terminal_sees_both_timings_and_the_gain_so_far() -> None:
    text = race(force_terminal=True, _environ={"TERM": "xterm"})
    row = next(line for line in reversed(text.splitlines()) if line.strip().startswith("fast") and "2.00x" in line)
    assert "3.00x" in row  # attention: 3 s of the reference's first step against 1 s
    assert "fast (2 of 2)" in text
    assert "attention 3.00x" in text  # in the bar


def test_a_pipe_gets_a_line_when_the_steps_of_a_clip_are_done() -> None:
    lines = race().splitlines()
    assert "dense: 2 steps in 8 s, attention 6 s" in lines
    assert "fast: 2 steps in 4 s, attention 1.5 s, 4.00x as fast as dense's" in lines


def test_only_steps_that_both_made_are_held_against_each_other() -> None:
    reference = [step(0, 4.0, 3.0), step(1, 8.0, 6.0)]
    assert over_reference(reference, [step(0, 2.0, 1.0)], "step_s") == 2
    assert over_reference(reference, [], "step_s") is None
    assert over_reference(reference, reference, "step_s") is None
    assert over_reference(reference[:1], [step(0, 2.0, 1.0), step(1, 2.0, 1.0)], "step_s") is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = call("demo", "--frames", "9", "--steps", "1", "--json", "-o", str(folder))
    return folder, json.loads(done.stdout)


def test_the_demo_makes_both_clips_and_the_page(made: tuple[Path, dict[str, object]], one_thread: None) -> None:
    folder, found = made
    names = {path.name for path in folder.iterdir()}
    assert {"dense.mp4", "fast.mp4", "side-by-side.mp4", "report.html", "compare.json"} <= names
    assert found["frames"] == {"count": 9, "height": 96, "width": 96}
    assert str(folder / "report.html") in found["files"]  # type: ignore[operator]
    gain, closeness = found["verdict"]  # type: ignore[misc]
    assert gain.startswith("fast ")
    assert "attention" in gain
    assert "PSNR" in closeness
    assert set(found["shows"]) == {"dense", "fast"}  # type: ignore[call-overload]


def test_bad_values_are_named_before_anything_is_loaded() -> None:
    assert "10 frames do not fit demo" in call("demo", "--frames", "10", code=2).stderr
    assert "preset other than dense" in call("demo", "--preset", "dense", code=2).stderr
    assert "a prompt goes after --prompt" in call("demo", "a red star", code=2).stderr
