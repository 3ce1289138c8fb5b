"""Small calls run dense where that is faster, by the GPU and the tokens: shown, recorded, repeated, switched off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan import latents_of
from typer.testing import CliRunner, Result

from vmonarch_cli.cli import plan_tables
from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record import plan_again
from vmonarch_cli.errors import PresetError
from vmonarch_cli.library import monarch
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan import small_calls_here
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.small_calls import AS_THEY_ARE, dense_below

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = Machine("cuda:0", "NVIDIA H200", "bfloat16", "triton")
CLIP = ("-p", "a red circle", "--size", "48x32", "--num-frames", "17", "--steps", "2", "--device", "cpu")


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def planned(**more: Any) -> Plan:
    return resolve(GenerateRequest(**{"prompt": "x", "output": "x.mp4", "overwrite": True, **more}))


def test_the_threshold_follows_the_chip_and_the_channels() -> None:
    assert 6_000 < dense_below("NVIDIA H200", 1536) < 7_800, "at 7,800 tokens structured attention was faster"
    assert dense_below("NVIDIA H200", 3072) < 6_160, "and with twice the heads at 6,160"
    assert dense_below("NVIDIA H200", 256) > dense_below("NVIDIA H200", 1536)
    assert dense_below("NVIDIA GH200 480GB", 256) == dense_below("NVIDIA H100 80GB HBM3", 256)
    slower = [dense_below(f"NVIDIA {name}", 256) for name in ("H200", "A100-SXM4-80GB", "H20", "GeForce RTX 3060")]
    assert slower == sorted(slower, reverse=True)
    assert len(set(slower)) == 4


def test_what_a_machine_does_with_small_calls() -> None:
    demo, wan = planned(model="demo"), planned(model="wan2.1-1.3b")
    assert GPU.small_of(demo).dense_below == dense_below("NVIDIA H200", 256) > demo.tokens
    assert GPU.runs_dense(demo)
    assert not GPU.runs_dense(wan)
    assert not GPU.runs_dense(planned(model="demo", preset="dense"))
    assert not GPU.runs_dense(planned(model="demo", dense_below=0))
    assert not GPU.runs_dense(planned(model="demo", impl="triton")), "what was named runs"
    assert not GPU.runs_dense(planned(model="demo", graphs=True)), "what is to be replayed is"
    assert GPU.runs_dense(planned(model="wan2.1-1.3b", dense_below=40_000))
    assert Machine("cpu", "CPU", "float32", "torch").small_of(demo) == AS_THEY_ARE


def test_a_plan_says_which_calls_a_gpu_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_calls_here, "device_key", lambda device: "NVIDIA H200")
    monkeypatch.setattr(small_calls_here, "uses_gpu", lambda device: True)

    def rows(**more: Any) -> list[str]:
        return [str(words) for _, words in plan_tables._small_rows(planned(**more))]

    below = dense_below("NVIDIA H200", 256)
    assert rows(model="demo") == [
        f"calls of 1,872 tokens run dense: below {below:,} tokens dense attention takes this GPU less time than the "
        "launches of a structured call; --dense-below 0 runs them structured"
    ]
    assert rows(model="demo", graphs=True) == [], "what is to be replayed runs"
    assert rows(model="demo", dense_below=0) == rows(model="demo", preset="dense") == rows(model="wan2.1-1.3b") == []
    monkeypatch.setattr(small_calls_here, "uses_gpu", lambda device: False)
    assert rows(model="demo") == []


def test_calls_below_the_limit_run_dense_and_a_rerun_repeats_it(tmp_path: Path, tiny_wan_folder: Path) -> None:
    def record(name: str, *flags: str) -> dict[str, Any]:
        shown = call("generate", "-m", str(tiny_wan_folder), *CLIP, *flags, "-o", str(tmp_path / f"{name}.gif")).output
        said = "tokens run dense, as --dense-below" in " ".join(shown.split())
        assert said == (name == "small")
        found: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return found

    dense, small, at = (record("dense", "--preset", "dense"), record("small", "--dense-below", "31"), 30)
    assert small["tokens"] == at
    whole = record("whole", "--dense-below", "30")
    assert small["frames"]["sha256"] == dense["frames"]["sha256"] != whole["frames"]["sha256"]
    calls = small["coverage"]["calls"]
    assert small["coverage"] == {"calls": calls, "structured": 0, "dense": {"dense_below": calls}}
    assert (small["dense_below"], small["flops"]["planned"]) == (31, small["flops"]["dense"])
    assert all(row["dense"] for row in small["schedule"])
    assert whole["coverage"]["structured"] > 0
    assert "dense_below" not in whole
    call("rerun", str(tmp_path / "small.json"), "-o", str(tmp_path / "again.gif"))
    (tmp_path / "small.json").write_text(json.dumps({**small, "dense_below": 0}))
    assert plan_again(tmp_path / "small.json", str(tmp_path / "y.gif")).setup.dense_below == 0, "as it ran then"


def test_a_script_chooses_the_limit(tiny_wan_folder: Path) -> None:
    pipeline = load_pipeline(str(tiny_wan_folder), device=torch.device("cpu"), dtype=torch.float32)
    with monarch(pipeline, "paper", dense_below=31) as session:
        dense = latents_of(pipeline, steps=1)
        assert session.coverage.structured == 0
        assert set(session.coverage.dense) == {"dense_below"}
    with monarch(pipeline, "dense"):
        assert torch.equal(latents_of(pipeline, steps=1), dense)
    with monarch(pipeline, "paper", dense_below=30) as session:
        latents_of(pipeline, steps=1)
        assert session.coverage.dense == {}
    for fault, given in (
        ("dense_below takes a whole number from 0, got -1", {"dense_below": -1}),
        ("fuse takes True or False, got 'no'", {"fuse": "no"}),
    ):
        with pytest.raises(PresetError, match=fault), monarch(pipeline, "paper", **given):
            pass


def test_a_plan_counts_the_operations_of_calls_that_run_dense() -> None:
    def attention(*flags: str) -> str:
        shown = call("plan", "-p", "x", "--num-frames", "9", "--preset", "paper", *flags).stdout
        return next(line for line in shown.splitlines() if line.startswith("attention "))

    assert "per clip, all dense" in attention("--dense-below", "5000")
    assert "per clip against" in attention("--dense-below", "0")


def test_what_is_no_number_of_tokens_is_refused() -> None:
    sentence = "error: --dense-below takes a whole number from 0 to 1000000, got -1\n"
    assert call("plan", "-p", "x", "--dense-below", "-1", code=2).stderr == sentence
