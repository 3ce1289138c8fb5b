"""The progress bar: it counts steps, names phases and stays off where it does not belong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fakes
import pytest
from rich.console import Console

from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.progress import RunProgress
from vmonarch_cli.cli.report import step_table
from vmonarch_cli.clip.events import StepDone
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve


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
