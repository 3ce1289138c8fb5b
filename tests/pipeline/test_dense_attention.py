"""What runs the dense calls of a clip: chosen, named, refused, and told in the record."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from command import call
from dense_packages import fit_everywhere, install
from tiny_wan import tiny_pipeline

from vmonarch_cli import PresetError, monarch
from vmonarch_cli.attention.meter import Meter
from vmonarch_cli.attention.steps import Step
from vmonarch_cli.pipeline.dense import fastest_first
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = "--size 48x32 --num-frames 17 --steps 2 --guidance-scale 1 --device cpu --dtype bf16"
CALLS = 3  # self-attention layers of the tiny model


def generate(model: Path, path: Path, *more: str, code: int = 0) -> Result:
    return call("generate", "-m", str(model), "-p", "red", *SHAPE.split(), "-o", str(path), *more, code=code)


def calls_of(module: str) -> list[Any]:
    found: list[Any] = importlib.import_module(module).calls
    return found


def test_dense_steps_run_by_the_package_and_the_record_says_so(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", monkeypatch, "fa4")
    fit_everywhere(monkeypatch)
    more = ("--preset", "paper", "--dense-steps", "1", "--dense-every", "1", "--dense-attention", "fa4")
    shown = generate(tiny_wan_folder, tmp_path / "x.png", *more).stdout
    assert "attention by torch, dense calls by fa4" in shown
    assert "dense: by fa4" in shown
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["dense_attention"] == "fa4"
    assert record["settings"]["dense_attention"] == {"value": "fa4", "origin": "flag"}
    assert record["coverage"]["dense"] == {"dense_steps": CALLS}
    assert [step["dense_call_by"] for step in record["timing"]["steps"]] == [None, "fa4"]
    assert len(calls_of("flash_attn.cute")) >= 1 + CALLS + 1, "the check, the dense step and a sample"
    assert "identical" in call("rerun", str(tmp_path / "x.json"), "-o", str(tmp_path / "again.png")).stdout
    sdpa = generate(tiny_wan_folder, tmp_path / "y.png", "--preset", "dense").stdout
    assert "attention by dense" in sdpa
    assert json.loads((tmp_path / "y.json").read_text())["dense_attention"] == "sdpa"


def test_a_quantised_one_is_named_so_and_samples_compare_with_an_exact_one(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", monkeypatch, "sage")
    fit_everywhere(monkeypatch)
    more = ("--preset", "paper", "--dense-steps", "1", "--dense-every", "1", "--dense-attention", "sage")
    assert "dense calls by sage (quantised)" in generate(tiny_wan_folder, tmp_path / "x.png", *more).stdout
    record = json.loads((tmp_path / "x.json").read_text())
    assert (record["dense_attention"], record["timing"]["steps"][1]["dense_call_by"]) == ("sage", "sdpa")


def test_what_is_missing_or_does_not_fit_is_refused_before_loading(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vmonarch_cli.clip.make.load_pipeline", loads)
    install(tmp_path / "packages", monkeypatch, "fa4")
    for name, said in {
        "fa3": "dense attention fa3 cannot run: it is not installed (pip install flash_attn_3)",
        "fa4": "dense attention fa4 cannot run: it needs an NVIDIA GPU and the device is cpu",
        "cudnn": "dense attention cudnn cannot run: it needs a GPU and the device is cpu",
        "fa5": "--dense-attention takes auto, sdpa, cudnn, flash, efficient, math, fa4, fa3, fa2 or sage, got 'fa5'",
    }.items():
        result = generate(tiny_wan_folder, tmp_path / "x.png", "--dense-attention", name, code=2)
        assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "x.png").exists()


def test_one_that_does_not_work_is_refused_in_one_sentence(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", monkeypatch, "fa4", change=("scale=scale)", "scale=None)"))
    fit_everywhere(monkeypatch)
    result = generate(tiny_wan_folder, tmp_path / "x.png", "--dense-attention", "fa4", code=2)
    said = " ".join(result.stderr.split())
    assert "dense attention fa4 (FlashAttention 4, flash-attn-4" in said
    assert "is wrong" in said
    assert "--dense-attention sdpa" in said
    assert not (tmp_path / "x.png").exists()
    assert not (tmp_path / "x.json").exists()


def test_a_plan_names_what_will_run(tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ("plan", "-m", str(tiny_wan_folder), *SHAPE.split())
    assert "dense calls" not in call(*plan).stdout
    assert "by sage, which is not installed here" in call(*plan, "--dense-attention", "sage").stdout
    install(tmp_path, monkeypatch, "fa4", "sage")
    assert "by sage (sageattention unknown version, quantised)" in call(*plan, "--dense-attention", "sage").stdout
    monkeypatch.setattr("vmonarch_cli.cli.plan_tables.will_use_gpu", lambda plan: True)
    shown = " ".join(call(*plan).stdout.split())
    assert "by fa4 (flash-attn-4 unknown version) where it takes this GPU, otherwise sdpa" in shown


def test_doctor_names_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmonarch_cli.pipeline.doctor import EXAMINATIONS

    install(tmp_path, monkeypatch, "fa4", "sage")
    found = {finding.name: finding for finding in EXAMINATIONS["dense attention"]()}
    assert set(found) == {"dense fa4", "dense sage"}
    assert found["dense fa4"].status == "note"
    assert "needs an NVIDIA GPU" in found["dense fa4"].value
    fit_everywhere(monkeypatch)
    found = {finding.name: finding for finding in EXAMINATIONS["dense attention"]()}
    assert found["dense fa4"].status == "ok"
    assert "agrees with softmax attention" in found["dense fa4"].value
    assert found["dense sage"].status == "ok"
    assert "quantised" in found["dense sage"].value
    install(tmp_path / "broken", monkeypatch, "fa4", change=("scale=scale)", "scale=None)"))
    found = {finding.name: finding for finding in EXAMINATIONS["dense attention"]()}
    assert found["dense fa4"].status == "broken"
    assert "is wrong" in found["dense fa4"].value


def test_a_script_may_choose_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "fa4")
    pipeline = tiny_pipeline().to(torch.bfloat16)
    arguments: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 1}
    with monarch(pipeline, "dense") as session:
        assert session.dense_attention == "auto"
        pipeline("red", output_type="latent", guidance_scale=1, **arguments)
        assert session.dense_attention == "sdpa"
    with monarch(pipeline, "dense", dense_attention="fa4") as session:
        pipeline("red", output_type="latent", guidance_scale=1, **arguments)
        assert session.dense_attention == "fa4"
    assert len(calls_of("flash_attn.cute")) == 1 + CALLS
    with pytest.raises(PresetError, match=r"dense_attention takes auto, sdpa, .*, got 'fa5'"):
        monarch(pipeline, "dense", dense_attention="fa5").__enter__()


def test_a_sample_takes_the_fastest_of_those_that_run() -> None:
    import time

    ran: list[str] = []
    q = torch.zeros(1, 4, 1, 8)

    def taking(name: str, seconds: float) -> Any:
        def run() -> torch.Tensor:
            ran.append(name)
            time.sleep(seconds)
            return q

        return run

    def cannot() -> torch.Tensor:
        raise RuntimeError("No available kernel")

    meter = Meter()
    runs = {"slow": taking("slow", 0.02), "fast": taking("fast", 0.0), "none": cannot}
    for _ in range(2):
        meter.begin_step(torch.device("cpu"))
        meter.structured(lambda: q)
        meter.sample(q, runs, q)
        step = meter.end_step(Step(0, {}), None, None)
        assert step.dense_call_by == "fast"
    assert ran == ["slow", "slow", "fast", "fast", "fast", "fast"], "compared once for a shape"
    assert step.dense_call_s is not None
    assert step.dense_call_s < 0.01


def test_a_comparison_takes_the_fastest_that_is_installed(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = "    import time\n    time.sleep(0.05)\n    calls.append"
    install(tmp_path, monkeypatch, "fa4", change=("    calls.append", pause))
    request = GenerateRequest(model=str(tiny_wan_folder), prompt="red", size="48x32", num_frames=17)
    machine = Machine("cpu", "CPU", "bfloat16", "torch", dense=("fa4", "sdpa"))
    assert fastest_first(resolve(request), machine).dense == ("sdpa", "fa4")
    named = resolve(replace(request, dense_attention="fa4"))
    assert fastest_first(named, machine) == machine, "what was asked for"
