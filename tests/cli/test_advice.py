"""What a sentence advises is something that the command takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.profile.calibrate.request import CalibrateRequest, resolve_calibrate
from vmonarch_cli.review.compare.runs import plan_comparison
from vmonarch_cli.tune.request import TuneRequest, resolve_tune

TAKE_DENSE = {"generate": ["-p", "red"], "plan": []}
REFUSE_DENSE = {
    "tune": ["-o", "a.safetensors", "--prompts-file", "p.txt"],
    "calibrate": ["-o", "a.toml", "--prompts-file", "p.txt"],
    "profile clip": [],
    "compare": ["-p", "red"],
}


def said(command: str, *flags: str) -> str:
    given = (TAKE_DENSE | REFUSE_DENSE)[command]
    result = CliRunner().invoke(app, [*command.split(), *given, *flags])
    return " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("".join(f"a cat {index}\n" for index in range(20)))


@pytest.mark.parametrize("command", [*TAKE_DENSE, *REFUSE_DENSE])
def test_dense_attention_is_a_way_out_only_where_it_is_taken(command: str) -> None:
    long = said(command, "-m", "wan2.1-1.3b", "--num-frames", "1201")
    assert "structured attention takes 256 at most: choose fewer frames" in long
    assert long.endswith(", or --preset dense") is (command in TAKE_DENSE)


def test_a_preset_that_costs_more_than_dense_is_said_without_it() -> None:
    clip = GenerateRequest(prompt="red", num_frames=5, preset="fast", device="cpu")
    made = resolve(clip)
    compared = plan_comparison(clip, ["fast"])[1]["fast"]
    clip = replace(clip, prompt=None, tuned="none")
    tuned = resolve_tune(TuneRequest(clip, output="a.safetensors"), None).clip
    calibrated = resolve_calibrate(CalibrateRequest(clip, output="a.toml"), None).clip
    assert [plan.warnings[-1].partition(" times as much: ")[2] for plan in (made, compared, tuned, calibrated)] == [
        "more frames, or --preset dense, would be better",
        *["more frames would be better"] * 3,
    ]


@pytest.mark.parametrize("command", ["tune", "calibrate"])
@pytest.mark.parametrize("model", ["wan2.1-i2v-480p", "cosmos-predict2.5-2b"])
def test_a_picture_is_not_asked_for_where_none_can_be_given(command: str, model: str) -> None:
    found = said(command, "-m", model)
    assert "--image" not in found
    assert found.startswith("error: ")
