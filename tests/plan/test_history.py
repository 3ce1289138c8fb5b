"""`vmonarch plan`: what a run is expected to take, from the clips of this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record import plan_again
from vmonarch_cli.machine import hardware
from vmonarch_cli.plan import history
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.profile.remember import remember_profile
from vmonarch_cli.profile.results import ModelProfile, Spread, StepRow


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(history.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_plan_takes_the_flags_of_generate_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from vmonarch_cli.cli.app import app\n"
        "try:\n    app(['plan', '-m', 'wan2.1-1.3b', '-p', 'a cat', '--preset', 'fast', '--steps', '20'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32,760 tokens" in done.stdout
    assert "no record of this model on" in " ".join(done.stdout.split())


def test_plan_of_a_prompts_file_says_what_is_to_be_made(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue ring\n")
    result = call("plan", "-m", "wan2.1-1.3b", "--prompts-file", str(prompts), "-o", f"{tmp_path}/out", "--json")
    assert result.exit_code == 0, result.stderr
    assert "a-blue-ring-s0.mp4" in result.stdout
    assert not (tmp_path / "out").exists()


def test_plan_expects_what_a_clip_took(tiny_record: Path, cache: Path, tmp_path: Path) -> None:
    record = json.loads(tiny_record.read_text())
    again = plan_again(tiny_record, str(tmp_path / "x.mp4"))
    flags = {"preset": again.preset.model_copy(update={"impl": "auto"})}
    assert history.expect(again) is None
    history.remember(record)
    exact = history.expect(again.model_copy(update=flags))
    assert exact is not None
    timing = record["timing"]
    assert exact.exact
    assert exact.clip_s == pytest.approx(sum(timing[k] for k in ("text_encode_s", "denoise_s", "decode_s", "write_s")))
    double = history.expect(again.model_copy(update={**flags, "steps": 6}))
    assert double is not None
    assert not double.exact
    assert double.peak_memory_bytes is None
    assert history.expect(resolve(GenerateRequest(model="wan2.1-1.3b", prompt="a cat", device="cpu"))) is None


@pytest.mark.parametrize("change", [{"stopped_after": 1}, {"retries": [{"stage": "decode", "with": "tiling"}]}])
def test_times_of_a_clip_that_did_not_run_as_planned_are_not_expected(
    tiny_record: Path, cache: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    history.remember({**json.loads(tiny_record.read_text()), **change})
    assert history.expect(plan_again(tiny_record, str(tmp_path / "x.mp4"))) is None
    assert not cache.exists()


def test_a_cache_that_cannot_be_used_costs_nothing(tiny_record: Path, cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (cache / "timings.jsonl").write_bytes(b"\xff\xfe not JSON\n[]\n{}\n")
    assert history.expect(plan_again(tiny_record, str(tmp_path / "x.mp4"))) is None
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    history.remember(json.loads(tiny_record.read_text()))
    history.remember({"schema": 1})


def test_gpus_are_named_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    monkeypatch.setattr(hardware, "_NVIDIA", tmp_path)
    hardware.gpu_names.cache_clear()
    try:
        assert hardware.gpu_names() == ("NVIDIA H100 80GB HBM3",) * 2
        assert hardware.device_key("cuda:1") == "NVIDIA H100 80GB HBM3"
        assert hardware.device_key("cuda:7") == "cuda:7"
    finally:
        hardware.gpu_names.cache_clear()


def test_a_profile_is_remembered_too(cache: Path) -> None:
    plan = resolve(GenerateRequest(model="wan2.1-1.3b", prompt="a cat", device="cpu", preset="fast"))
    rows = [
        StepRow("fast", "structured", "cold", Spread(9, 9, 9, 1)),
        StepRow("fast", "structured", "warm", Spread(2, 2, 2, 5), attention_s=0.5, clip_s=100.0),
        StepRow("flash", "dense", "", Spread(4, 4, 4, 5), clip_s=200.0),
        StepRow("none", "skipped", "", Spread(1, 1, 1, 5)),
    ]
    size = (plan.width, plan.height, plan.num_frames)
    profile = ModelProfile("wan", False, False, size, plan.grid, 2, plan.steps, rows, [], 1.0, 9.0)
    remember_profile(profile, plan.model, plan.model_source, [plan.preset], "cpu", "float32")
    found = history.expect(plan)
    assert found is not None
    assert (found.exact, found.clip_s) == (True, 110.0)
    dense = history.expect(resolve(GenerateRequest(model="wan2.1-1.3b", prompt="a cat", device="cpu", preset="dense")))
    assert dense is not None
    assert dense.clip_s == 210.0
