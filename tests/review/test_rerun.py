"""`vmonarch rerun`: a clip is made again from its record alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record import plan_again
from vmonarch_cli.clip.record_model import read_record


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_rerun_makes_identical_frames(tiny_record: Path, tmp_path: Path) -> None:
    result = call("rerun", str(tiny_record), "-o", str(tmp_path / "again.mp4"))
    assert result.exit_code == 0, result.stderr
    sentence, path = result.stdout.splitlines()
    assert sentence == "identical: every pixel of every frame is as in the record"
    assert path == str(tmp_path / "again.mp4")
    first, again = read_record(tiny_record), read_record(tmp_path / "again.json")
    assert again.frames == first.frames
    assert again.preset.model_dump() == {**first.preset.model_dump(), "impl": "torch"}
    resolved = {"preset.impl": "torch", "dtype": "float32"}
    assert first.device is not None
    assert again.settings_values() == {**first.settings_values(), **resolved, "device": first.device.name}


def test_rerun_says_when_frames_differ_and_what_else_does(tiny_record: Path, tmp_path: Path) -> None:
    record = json.loads(tiny_record.read_text())
    record["frames"]["sha256"] = "0" * 64
    record["versions"]["torch"] = "2.0.0"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(record))
    result = call("rerun", str(changed), "--json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert printed["identical"] is False
    assert [entry["what"] for entry in printed["differing"]] == ["torch"]
    assert Path(printed["path"]) == tmp_path / "changed-rerun.mp4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": {"count": 1}}, "is not the record of a clip: it has no frames.height"),
        ({"frames": {"count": 1, "height": 8, "width": 8, "fps": 8}}, "has no hash of its frames"),
        ({"preset": {"name": "x", "band": "wide"}}, "cannot be repeated"),
        ({"settings": []}, "is not the record of a clip: settings takes a table, got a list"),
        ({"retries": [{"with": "dense attention"}]}, "was made with a fallback (dense attention)"),
    ],
)
def test_rerun_refuses_what_it_cannot_repeat(tiny_record: Path, tmp_path: Path, change: Any, words: str) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps({**json.loads(tiny_record.read_text()), **change}))
    result = call("rerun", str(changed))
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [changed]


def test_every_setting_of_a_record_is_planned_again(tiny_record: Path, tmp_path: Path) -> None:
    plan = plan_again(tiny_record, str(tmp_path / "x.mp4"))
    record = json.loads(tiny_record.read_text())
    assert (plan.seed, plan.guidance_scale, plan.preset.band, plan.prompt) == (7, 3.0, 1, "a red circle")
    assert plan.flops.model_dump() == record["flops"]
    assert set(plan.origins.values()) == {"record"}
