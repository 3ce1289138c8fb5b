"""kernels/bench/report.py: the results page comes from records, and from good ones only."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import bench_script
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app

ROOT = Path(__file__).parents[2]
SMALL = ("--shape", "3x16", "--heads", "1", "--head-dim", "16", "--repeats", "1", "--device", "cpu")
GOOD = {
    "schema": 1,
    "kind": "kernel",
    "checks_passed": True,
    "finished": "2026-01-01",
    "device": {"name": "x"},
    "versions": {"torch": "2"},
    "command": "vmonarch profile kernel",
}


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return bench_script("report")


@pytest.fixture
def records(tmp_path: Path, tiny_wan_folder: Path) -> Path:
    """One record of each kind, as the commands write them."""
    folder = tmp_path / "results"
    tiny = ("-m", str(tiny_wan_folder), "--size", "48x32", "--num-frames", "9", "--steps", "1", "--device", "cpu")
    for name, arguments in (("kernel", SMALL), ("model", tiny), ("quality", (*tiny, "--prompts", "1"))):
        target = str(folder / f"{name}.json")
        result = CliRunner().invoke(app, ["profile", name, *arguments, "--json", target])
        assert result.exit_code == 0, result.stderr
    return folder


def test_the_page_comes_from_the_records(report: ModuleType, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "RESULTS.md"
    assert report.main(["--results", str(records), "--out", str(out)]) == 0
    page = out.read_text()
    for words in ("## Kernel: CPU", "## Model: CPU", "## Quality: CPU", "| 3 x 16 | paper cold |", "torch ", "commit"):
        assert words in page
    for kind in ("kernel", "model", "quality"):
        assert f"Record `{kind}.json`" in page
    assert json.loads((records / "model.json").read_text())["verdicts"][0] in page
    assert report.main(["--results", str(records), "--out", str(out), "--check"]) == 0
    out.write_text(page + "and a figure from elsewhere\n")
    assert report.main(["--results", str(records), "--out", str(out), "--check"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checks_passed": False, "problems": ["check failed: paper at 3x16"]}, "checks failed (check failed: paper"),
        ({"checks_passed": None}, "checks failed"),
        ({"finished": None}, "did not finish"),
        ({"schema": 99}, "not a record of schema 1"),
        ({"kind": "weather"}, "of kind 'weather'"),
        ({"device": {}}, "does not say its device"),
    ],
)
def test_a_record_that_must_not_be_cited_is_refused(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**GOOD, **change}))
    out = tmp_path / "RESULTS.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_tuning_has_its_table(report: ModuleType, tmp_path: Path) -> None:
    spread = {"median": 4.46, "least": 4.45, "most": 4.6, "count": 4}
    record = {
        **GOOD,
        "kind": "tuning",
        "started": "2026-01-01T00:00:00",
        "settings": {
            "processes": 2, "model": "wan2.1-14b", "preset": "paper", "size": "832x480", "num_frames": 81,
            "dtype": "bfloat16", "layers": [4, 40], "rank": 64, "checkpointing": True,
        },
        "teacher_forward_s": {**spread, "median": 0.61},
        "step_s": spread,
        "peak_gib": 15.03,
    }  # fmt: skip
    (tmp_path / "tuning.json").write_text(json.dumps(record))
    out = tmp_path / "RESULTS.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    page = out.read_text()
    assert "4 of 40 layers" in page
    assert "| 2 | 610 | 4460 | 4450 to 4600 | 0.448 | 15.0 |" in page


def test_the_page_in_the_tree_is_up_to_date(report: ModuleType) -> None:
    assert report.main(["--check"]) == 0, "run python kernels/bench/report.py"
