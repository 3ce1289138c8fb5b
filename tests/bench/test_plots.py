"""kernels/bench/plots.py: the guide's plots come from the records."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import BENCH, bench_script


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    return bench_script("plots")


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((BENCH / "results" / name).read_text())
    return found


def test_a_record_is_read_whole(plots: ModuleType) -> None:
    kernel, quality = record(plots.KERNEL), record(plots.QUALITY[0])
    assert [shape.to_json() for shape in plots.kernel_shapes(kernel)] == kernel["shapes"]
    read, there = plots.quality_profile(quality).to_json(), quality["quality"]
    assert tuple(read.pop("size")) == tuple(there["size"])
    assert read["rows"] == there["rows"]
    assert read["prompts"] == there["prompts"]


def test_each_length_is_a_panel(plots: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[list[int]] = []
    monkeypatch.setattr(plots, "plot_kernel", lambda *_: None)
    monkeypatch.setattr(plots, "plot_quality", lambda shown, *_: drawn.append([one.size[2] for one in shown]))
    short = record(plots.QUALITY[0])
    long = {**short, "quality": {**short["quality"], "size": [96, 96, 193]}}
    records = {plots.KERNEL: record(plots.KERNEL), plots.QUALITY[0]: short}
    plots.draw(records, tmp_path)
    plots.draw({**records, plots.QUALITY[1]: long}, tmp_path)
    assert drawn == [[49], [49, 193]]


def test_the_command_draws_both(plots: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plots.main(["--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"kernel.png", "frontier.png"}


def test_a_record_that_must_not_be_cited_is_refused(
    plots: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / plots.KERNEL).write_text(json.dumps({**record(plots.KERNEL), "checks_passed": False}))
    assert plots.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "checks failed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [plots.KERNEL]
