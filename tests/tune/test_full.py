"""`vmonarch tune --full`: all weights are trained, and the file does in every command what was evaluated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_wan import tiny_pipeline
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.machine.group import Group
from vmonarch_cli.models.tuned import read_adapter
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.tune import loop, run
from vmonarch_cli.tune.request import TunePlan, TuneRequest, resolve_tune
from vmonarch_cli.tune.trained import TrainedWeights

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ("a red circle moving left", "a blue circle moving right", "a red square moving left", "a blue square")
CPU = Machine("cpu", "CPU", "float32", "torch")
SHAPE = "--size 48x32 --num-frames 17 --guidance-scale 3"


def planned(folder: Path, output: Path, **given: Any) -> TunePlan:
    clip = {"preset": "paper", "steps": 3, "size": "48x32", "num_frames": 17, "guidance_scale": 3.0}
    clip |= {name: given.pop(name) for name in ("overrides",) if name in given}
    request = GenerateRequest(model=str(folder), **clip)  # type: ignore[arg-type]
    defaults: dict[str, Any] = {"steps": 6, "eval_prompts": 1, "full": True}
    return resolve_tune(TuneRequest(request, output=str(output), **{**defaults, **given}), PROMPTS)


def test_the_command_trains_all_weights_and_other_commands_use_them(tiny_wan_folder: Path, tmp_path: Path) -> None:
    file, prompts = tmp_path / "own.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = f"--preset paper --set dense_layers=1 --sampler-steps 3 {SHAPE} --steps 6 --full --lr 1e-3 --eval-prompts 1"
    result = CliRunner().invoke(
        app, ["tune", "-m", str(tiny_wan_folder), *f"{flags} -o {file} --prompts-file {prompts}".split()]
    )
    assert result.exit_code == 0, result.stderr
    assert "all weights, lr 0.001" in result.stdout
    adapter, weights = read_adapter(file), load_file(file)
    assert adapter.kind == "weights"
    assert "rank" not in adapter.training
    names = {f"transformer.{name}" for name, _ in tiny_pipeline().transformer.named_parameters()}
    assert weights.keys() == {name for name in names if not name.startswith("transformer.blocks.0.")}
    assert adapter.gain is not None
    assert adapter.gain[0] != adapter.gain[1]
    assert not file.with_suffix(".tune").exists()

    def made(name: str, *more: str) -> dict[str, Any]:
        arguments = ["generate", "-m", str(tiny_wan_folder), "-p", PROMPTS[0], *SHAPE.split(), "--steps", "3"]
        arguments += ["--preset", "paper", "--set", "dense_layers=1", "-o", str(tmp_path / f"{name}.gif"), *more]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.stderr
        record: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return record

    record = made("tuned", "--tuned", str(file))
    assert record["tuned"]["path"] == str(file)
    made("plain")
    frames = [(tmp_path / f"{name}.gif").read_bytes() for name in ("tuned", "plain")]
    assert frames[0] != frames[1]
    again = CliRunner().invoke(app, ["rerun", str(tmp_path / "tuned.json"), "-o", str(tmp_path / "again.gif")])
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "again.gif").read_bytes() == frames[0]
    flags = f"-m {tiny_wan_folder} {SHAPE} --steps 3 --preset paper --set dense_layers=1 --tuned {file}"
    shown = CliRunner().invoke(app, ["plan", *flags.split()])
    assert shown.exit_code == 0, shown.stderr
    assert "own.safetensors" in shown.stdout


def test_training_lowers_the_loss(tiny_wan_folder: Path, tmp_path: Path) -> None:
    tuned = run.tune(planned(tiny_wan_folder, tmp_path / "a.safetensors", steps=60, lr=1e-3, eval_prompts=0), CPU)
    assert tuned is not None
    assert sum(tuned.losses[-12:]) < 0.7 * sum(tuned.losses[:12])


def test_a_stopped_run_comes_to_the_same_weights(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    whole = planned(tiny_wan_folder, tmp_path / "whole.safetensors", steps=9)
    run.tune(whole, CPU)
    plan = planned(tiny_wan_folder, tmp_path / "parts.safetensors", steps=9)

    def stop(step: loop.TrainStep) -> None:
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.tune(plan, CPU, on_step=stop)
    run.tune(dataclasses.replace(plan, resume=True), CPU)
    expected, found = load_file(whole.output), load_file(plan.output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_narrow_weights_learn_in_float32(tiny_wan_folder: Path, tmp_path: Path) -> None:
    """Steps that bfloat16 would round away add up in the optimiser's copies."""
    plan = planned(tiny_wan_folder, tmp_path / "a.safetensors")
    pipeline = tiny_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    before = pipeline.transformer.proj_out.weight.detach().clone()
    trained = TrainedWeights(pipeline, plan, Group())
    name = "transformer.proj_out.weight"
    assert trained.parameters[name].dtype == torch.float32
    optimizer = torch.optim.SGD(trained.parameters.values(), lr=float(before.abs().max()) / 4096)
    for _ in range(64):
        pipeline.transformer.proj_out.weight.grad = torch.ones_like(before)
        trained.gather()
        optimizer.step()
        trained.spread()
    after = pipeline.transformer.proj_out.weight
    assert after.dtype == torch.bfloat16
    assert trained.dtypes[name] == torch.bfloat16
    expected = before.float() - float(before.abs().max()) / 64
    torch.testing.assert_close(after.float(), expected, rtol=1e-2, atol=1e-3)


def test_a_rank_with_all_weights_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "--full", "--rank", "4", "-o", str(tmp_path / "a.safetensors")])
    assert result.exit_code == 2
    assert "--rank 4 is of a LoRA, and --full trains all weights" in result.stderr
