"""The progress bar: it counts steps, names phases and stays off where it does not belong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fakes
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.phase_progress import PhaseProgress
from vmonarch_cli.cli.progress import RunProgress
from vmonarch_cli.cli.report import step_table
from vmonarch_cli.clip.events import ClipDone, ClipStarted, Decoding, FramesDecoded, ModelLoading, StepDone
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.tune.loop import TrainStep


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return resolve(GenerateRequest(prompt="a cat", model="wan2.1-1.3b", steps=3, output=f"{tmp_path}/x.mp4"))


def shown(plan: Plan, quiet: bool = False, **console: Any) -> tuple[str, list[Any]]:
    stream = io.StringIO()
    clips: list[Any] = []
    out = Output(quiet=quiet, stderr=Console(file=stream, width=80, **console))
    bar = RunProgress(out, lambda *clip: clips.append(clip))

    def refresh(event: Any) -> None:
        bar(event)
        if bar._bar:
            bar._bar.refresh()

    with bar:
        fakes.generate(plan, Machine("cpu", "CPU", "float32", "torch"), on_event=refresh)
    return stream.getvalue(), clips


def test_a_terminal_gets_a_bar_with_counts(plan: Plan) -> None:
    text, clips = shown(plan, force_terminal=True, _environ={"TERM": "xterm"})
    for words in ("loading the model", "denoising", "compiling kernels, once", "3/3", "decoding"):
        assert words in text
    decoding = [line for line in text.replace("\r", "\n").splitlines() if "decoding" in line]
    assert decoding
    assert not any("/3" in line for line in decoding)
    assert [(clip.seed, load_s) for clip, load_s in clips] == [(0, 1.5)]


def test_a_pipe_gets_one_plain_line_per_phase(plan: Plan) -> None:
    text, _ = shown(plan)
    assert text == "loading the model\ndenoising (3 steps)\ndenoising: compiling kernels, once\ndecoding\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_silent(plan: Plan, terminal: bool) -> None:
    text, clips = shown(plan, quiet=True, force_terminal=terminal)
    assert (text, len(clips)) == ("", 1)


def test_a_terminal_sees_the_rows_of_the_step_table_while_they_come(plan: Plan) -> None:
    stream = io.StringIO()
    out = Output(stderr=Console(file=stream, width=80, height=30, force_terminal=True, _environ={"TERM": "xterm"}))
    seen: list[str] = []
    bar = RunProgress(out, live=step_table)

    def follow(event: Any) -> None:
        bar(event)
        if isinstance(event, StepDone):
            stream.seek(0)
            stream.truncate()
            if bar._bar:
                bar._bar.refresh()
            seen.append(stream.getvalue())

    with bar:
        fakes.generate(plan, Machine("cpu", "CPU", "float32", "torch"), on_event=follow)
    rows = [sum(f"0.{digits}" in text for digits in ("667", "333")) + ("1.000" in text) for text in seen]
    assert rows == [1, 2, 3]
    assert bar.steps == []


class Told:
    """A run whose clock stands still until a test moves it, and what its bar says."""

    def __init__(self, width: int = 120, terminal: bool = True, **extra: Any) -> None:
        self.time = 0.0
        self.stream = io.StringIO()
        console = Console(file=self.stream, width=width, force_terminal=terminal, _environ={"TERM": "xterm"})
        self.bar = RunProgress(Output(stderr=console), now=lambda: self.time, **extra)

    def after(self, seconds: float, event: Any) -> str:
        """What the bar shows when an event comes after some seconds."""
        self.time += seconds
        self.stream.seek(0)
        self.stream.truncate()
        self.bar(event)
        if self.bar._bar:
            self.bar._bar.refresh()
        return self.stream.getvalue()


def test_the_bar_says_how_long_a_step_takes_what_attention_gained_and_what_is_left(plan: Plan) -> None:
    run = Told()
    steps = fakes.steps(10, dense=0, attention_s=0.5)
    with run.bar:
        run.after(0, ModelLoading("x"))
        run.after(30, ClipStarted(0, 1, 0, 10))
        first = run.after(9, StepDone(0, steps[0]))
        assert all(words in first for words in ("1/10, 2 s a step, attention 3.20x", "0:39, 0:18 left"))
        later = run.after(3, StepDone(0, steps[1]))
        assert "2/10" in later
        assert "0:42, 0:24 left" in later  # eight steps of three seconds, without the text and the compiling before
        run.time += 5
        assert run.bar._clock.words() == "0:47, 0:19 left"  # one clock, which goes on between the steps
        run.after(0, Decoding(0))
        assert run.bar._clock.words() == "0:47"
        decoding = run.after(4, FramesDecoded(0, 10, 50))
        assert all(words in decoding for words in ("10/50 frames", "0:51, 0:16 left"))


def test_several_clips_share_one_clock_and_one_time_left(tmp_path: Path) -> None:
    plan = resolve(GenerateRequest(prompt="a cat", steps=2, num_videos=3, output=f"{tmp_path}/x.mp4"))
    run = Told()
    with run.bar:
        run.after(0, ClipStarted(0, 3, 0, 2))
        for step in fakes.steps(2):
            text = run.after(10, StepDone(0, step))
        assert "0:08 left" in text  # two clips, of two seconds a step
        run.after(20, ClipDone(fakes.result(plan, 0)))
        run.after(0, ClipStarted(1, 3, 1, 2))
        text = run.after(10, StepDone(1, fakes.steps(2)[0]))
        assert "clip 2 of 3" in text
        assert "0:50, 1:10 left" in text  # thirty seconds of this one, forty of the next
        run.bar.drop_clip(1)
        run.after(0, ClipStarted(2, 3, 2, 2))
        assert "0:50, 0:40 left" in run.after(0, StepDone(2, fakes.steps(2)[0]))


def test_a_clip_that_is_done_beside_the_next_leaves_its_steps_alone(tmp_path: Path) -> None:
    plan = resolve(GenerateRequest(prompt="a cat", steps=2, num_videos=3, output=f"{tmp_path}/x.mp4"))
    run = Told()
    with run.bar:
        run.after(0, ClipStarted(0, 3, 0, 2))
        for step in fakes.steps(2):
            run.after(10, StepDone(0, step))
        run.after(0, ClipStarted(1, 3, 1, 2))
        run.after(10, StepDone(1, fakes.steps(2)[0]))
        run.after(0, ClipDone(fakes.result(plan, 0)))
        assert [step.index for step in run.bar.steps] == [0]
        run.after(10, StepDone(1, fakes.steps(2)[1]))
        run.after(0, ClipStarted(2, 3, 2, 2))
        run.after(0, ClipDone(fakes.result(plan, 1)))
        run.after(10, StepDone(2, fakes.steps(2)[0]))
        run.bar.drop_clip(1)
        assert [step.index for step in run.bar.steps] == [0], "nor does one that is dropped"


def test_a_narrow_terminal_keeps_the_clock() -> None:
    run = Told(width=60)
    with run.bar:
        run.after(0, ClipStarted(0, 1, 0, 4))
        text = run.after(3, StepDone(0, fakes.steps(4, dense=0)[0]))
    assert "0:03, 0:06 left" in text
    assert "attention" not in text


def test_a_pipe_hears_of_a_long_phase_now_and_then() -> None:
    run = Told(terminal=False)
    steps = fakes.steps(4, dense=0)
    with run.bar:
        assert run.after(0, ClipStarted(0, 1, 0, 4)) == "denoising (4 steps)\n"
        assert run.after(20, StepDone(0, steps[0])) == ""
        assert run.after(20, StepDone(0, steps[1])) == (
            "denoising: 2/4, 2 s a step, attention 3.40x; 0:40, 0:40 left\n"
        )
        assert run.after(20, StepDone(0, steps[2])) == ""
        run.after(20, Decoding(0))
        assert run.after(31, FramesDecoded(0, 1, 3)) == "decoding: 1/3 frames; 1:51, 1:02 left\n"


def test_decoding_counts_frames_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[FramesDecoded] = []
    whole = RunProgress.__call__

    def follow(self: RunProgress, event: Any) -> None:
        if isinstance(event, FramesDecoded):
            seen.append(event)
        whole(self, event)

    monkeypatch.setattr(RunProgress, "__call__", follow)
    words = ["generate", "-p", "a red circle", "--size", "32x32", "--num-frames", "9", "--steps", "1", "-o"]
    result = CliRunner().invoke(app, [*words, f"{tmp_path}/x.gif"])
    assert result.exit_code == 0, result.output
    assert [event.total for event in seen] == [9] * len(seen)
    assert [event.done for event in seen][-1] == 9


def test_training_says_what_is_left_on_the_same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    time = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    stream = io.StringIO()
    bar = PhaseProgress(Output(stderr=Console(file=stream, width=120)))
    with bar:
        bar.phase("sampling the teacher", 0, 4)
        time[0] += 40
        bar.phase("sampling the teacher", 1, 4)
        bar.step(TrainStep(1, 4, 0.5, 1e-3, 0.25, 10.0))
        time[0] += 60
        bar.step(TrainStep(2, 4, 0.5, 1e-3, 0.5, 70.0))
    assert stream.getvalue().splitlines() == [
        "sampling the teacher (4)",
        "sampling the teacher: 1/4; 0:40, 2:00 left",
        "training: step 1/4, loss 0.5, lr 0.001; 0:40",
        "training: step 2/4, loss 0.5, lr 0.001; 1:40, 2:00 left",
    ]
