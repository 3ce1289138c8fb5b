"""`vmonarch tune`, whole runs on a tiny model: what it writes, what it learns, and that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import student_of
from safetensors.torch import load_file
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import InputError, NonFiniteError
from vmonarch_cli.models.tuned import fingerprint, read_adapter
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.pipeline.tuned import load_tuned
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.setup import ADAPTER_NAME
from vmonarch_cli.presets import at_steps, load_preset
from vmonarch_cli.tune import loop, run, student
from vmonarch_cli.tune.evaluate import evaluate, read_figures
from vmonarch_cli.tune.request import TunePlan, TuneRequest, resolve_tune
from vmonarch_cli.tune.trajectories import sample, sample_trajectories, side_by_side, trajectory_path

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ("a red circle moving left", "a blue circle moving right", "a red square moving left", "a blue square")
CPU = Machine("cpu", "CPU", "float32", "torch")


def planned(folder: Path, output: Path, **given: Any) -> TunePlan:
    """A plan for the tiny model: preset fast, three sampler steps, three trajectories, one held-out prompt."""
    clip = {"preset": "fast", "steps": 3, "size": "48x32", "num_frames": 17, "guidance_scale": 3.0}
    clip |= {name: given.pop(name) for name in ("preset", "overrides", "guidance_scale") if name in given}
    request = GenerateRequest(model=str(folder), **clip)  # type: ignore[arg-type]
    defaults: dict[str, Any] = {"steps": 6, "rank": 4, "eval_prompts": 1}
    return resolve_tune(TuneRequest(request, output=str(output), **{**defaults, **given}), PROMPTS)


def test_the_command_writes_one_adapter_and_says_what_it_is_for(tiny_wan_folder: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "own.safetensors", tmp_path / "loss.svg"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = "--preset fast --set band=1 --sampler-steps 3 --size 48x32 --num-frames 17 --guidance-scale 3 --steps 4"
    pupil = student_of(tiny_wan_folder, tmp_path / "student")
    flags += f" --rank 2 --eval-prompts 1 --also-for {pupil} --json"
    result = CliRunner().invoke(
        app,
        ["tune", "-m", str(tiny_wan_folder), *f"{flags} -o {file} --plot {plot} --prompts-file {prompts}".split()],
    )
    assert result.exit_code == 0, result.stderr
    said, adapter = json.loads(result.stdout), read_adapter(file)
    assert said["path"] == str(file)
    assert len(said["losses"]) == 4
    assert adapter.preset == at_steps(load_preset("fast").model_copy(update={"band": 1}), 3).model_dump()
    assert (adapter.steps, adapter.guidance_scale, adapter.size, adapter.num_frames) == (3, 3.0, "48x32", 17)
    assert adapter.fingerprint == fingerprint(tiny_wan_folder)
    assert adapter.also_for == said["also_for"] == {str(pupil): fingerprint(pupil)}
    assert adapter.training["prompts"] == 3
    assert set(adapter.evaluation["before"]) == {"latent_error_mean", "latent_error_median", "psnr", "ssim"}
    layers = {name.rpartition(".lora_")[0] for name in load_file(file)}
    parts = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
    assert layers == {f"transformer.blocks.{block}.{part}" for block in range(3) for part in parts}
    assert "<svg" in plot.read_text()
    assert not file.with_suffix(".tune").exists(), "the work folder goes when the adapter is there"


def test_an_adapter_that_brings_clips_no_closer_is_written_with_a_warning(
    tiny_wan_folder: Path, tmp_path: Path
) -> None:
    file, prompts = tmp_path / "own.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = "--preset fast --sampler-steps 2 --size 48x32 --num-frames 17 --guidance-scale 1 --steps 4 --eval-prompts 1"
    command = ["tune", "-m", str(tiny_wan_folder), *flags.split(), "--prompts-file", str(prompts), "-o", str(file)]
    result = CliRunner().invoke(app, [*command, "--lr", "0.3"])
    assert result.exit_code == 0, result.stderr
    evaluation = read_adapter(file).evaluation
    before, after = (evaluation[when]["latent_error_mean"] for when in ("before", "after"))
    assert before < after
    said = f"no closer to dense: latent error {before:.3f} before, {after:.3f} after 4 steps with --batch 1"
    assert said in " ".join(result.stderr.split())


def test_the_learning_rate_falls_with_the_clips_of_a_step(tiny_wan_folder: Path, tmp_path: Path) -> None:
    def rate(world: int = 1, **given: Any) -> float:
        request = GenerateRequest(model=str(tiny_wan_folder), preset="fast", steps=3, size="48x32", num_frames=17)
        asked = TuneRequest(request, output=str(tmp_path / "a.safetensors"), eval_prompts=1, **given)
        return resolve_tune(asked, PROMPTS, world=world).lr

    assert rate(batch=16) == rate(batch=48) == rate(world=4, batch=4) == 1e-3
    assert rate() == pytest.approx(2.5e-4)
    assert rate(world=2, batch=2) == pytest.approx(5e-4)
    assert rate(lr=0.01) == 0.01
    assert rate(full=True) == 1e-5


def test_prompts_of_the_demo_model_tell_as_many_motions_as_its_clips_have_time_for(tmp_path: Path) -> None:
    for frames, several in ((49, False), (97, True)):
        request = GenerateRequest(preset="fast", num_frames=frames)
        plan = resolve_tune(TuneRequest(request, output=str(tmp_path / "a.safetensors")), None)
        for texts in (plan.prompts, plan.held_out):
            assert any(" then " in text for text in texts) == several
        assert not set(plan.prompts) & set(plan.held_out)


def test_an_adapter_goes_with_models_of_the_same_shapes_alone(
    tiny_wan_folder: Path, tiny_wan_two_stage_folder: Path, tmp_path: Path
) -> None:
    pupil = student_of(tiny_wan_folder, tmp_path / "student")
    file = tmp_path / "x.safetensors"
    assert planned(tiny_wan_folder, file, also_for=(str(pupil),)).also_for == {str(pupil): fingerprint(pupil)}
    twin = shutil.copytree(tiny_wan_folder, tmp_path / "twin")
    for other, full, sentence in (
        (
            tiny_wan_two_stage_folder,
            False,
            r"is no model of the same base: .* not at all, and it",
        ),
        (twin, False, "has the very weights that are tuned"),
        (pupil, True, "goes with a LoRA, and --full writes whole weights"),
        ("wan2.1-14b", False, "those of wan2.1-14b are not on this machine yet"),
    ):
        more: dict[str, Any] = {"full": True, "rank": None} if full else {}
        with pytest.raises(InputError, match=sentence):
            planned(tiny_wan_folder, file, also_for=(str(other),), **more)


def test_training_lowers_the_loss_and_the_file_does_what_was_evaluated(tiny_wan_folder: Path, tmp_path: Path) -> None:
    plan = planned(tiny_wan_folder, tmp_path / "a.safetensors", steps=72, lr=3e-3, preset="paper")
    tuned = run.tune(plan, CPU)
    assert tuned is not None
    assert tuned.before is not None
    assert tuned.after is not None
    assert sum(tuned.losses[-9:]) < 0.8 * sum(tuned.losses[:9])
    assert tuned.after != tuned.before
    pipeline = load_pipeline(str(tiny_wan_folder), device=torch.device("cpu"), dtype=torch.float32)
    load_tuned(pipeline, tuned.path)
    preset, teacher = plan.clip.preset, load_preset("dense")
    made = sample(pipeline, plan.clip, plan.held_out[:1], [plan.seed], preset, adapter=ADAPTER_NAME)
    dense = sample(pipeline, plan.clip, plan.held_out[:1], [plan.seed], teacher, adapter=ADAPTER_NAME)
    error = float((made - dense).norm() / dense.norm())
    assert error == pytest.approx(tuned.after.latent_error_mean, rel=1e-3)


class Stop(Exception):
    """Ends a run as if it had been killed."""


def stopped_in_phase(plan: TunePlan, words: str, done: int) -> None:
    def on_phase(now: str, count: int, total: int | None) -> None:
        if now == words and count == done:
            raise Stop

    with pytest.raises(Stop):
        run.tune(plan, CPU, on_phase=on_phase)


def stopped_at_step(plan: TunePlan, number: int) -> None:
    def on_step(step: loop.TrainStep) -> None:
        if step.step == number:
            raise Stop

    with pytest.raises(Stop):
        run.tune(plan, CPU, on_step=on_step)


def test_a_run_that_was_stopped_in_every_phase_comes_to_the_same_bytes(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    whole = planned(tiny_wan_folder, tmp_path / "whole.safetensors", steps=12)
    run.tune(whole, CPU)
    plan = planned(tiny_wan_folder, tmp_path / "parts.safetensors", steps=12)
    stopped_in_phase(plan, "sampling the teacher", 2)
    assert [trajectory_path(plan, i).exists() for i in range(3)] == [True, True, False]
    made = trajectory_path(plan, 1).stat().st_mtime_ns
    again = dataclasses.replace(plan, resume=True)
    stopped_at_step(again, 8)
    assert trajectory_path(plan, 1).stat().st_mtime_ns == made, "what is there is not made again"
    seen: list[int] = []
    run.tune(again, CPU, on_step=lambda step: seen.append(step.step))
    assert seen == list(range(7, 13)), "training goes on from the checkpoint after the second trajectory"
    expected, found = load_file(whole.output), load_file(plan.output)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found.keys() == expected.keys()
    assert read_adapter(plan.output).evaluation == read_adapter(whole.output).evaluation


def test_resume_refuses_other_settings(tiny_wan_folder: Path, tmp_path: Path) -> None:
    stopped_in_phase(planned(tiny_wan_folder, tmp_path / "a.safetensors"), "sampling the teacher", 0)
    other = planned(tiny_wan_folder, tmp_path / "a.safetensors", rank=8, resume=True)
    with pytest.raises(InputError, match=r"begun with rank 4, and now it is 8:"):
        run.tune(other, CPU)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    plan = planned(tiny_wan_folder, tmp_path / "a.safetensors", guidance_scale=1.0)
    calls = 0
    honest = student.velocity_loss

    def loss(made: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return honest(made, teacher) * (float("nan") if calls == 5 else 1.0)

    monkeypatch.setattr(student, "velocity_loss", loss)
    with pytest.raises(NonFiniteError, match=r"the loss stopped being finite in step 5 of training.*--resume") as error:
        run.tune(plan, CPU)
    assert error.value.exit_code == 1
    assert not plan.output.exists()
    monkeypatch.setattr(student, "velocity_loss", honest)
    seen: list[int] = []
    run.tune(dataclasses.replace(plan, resume=True), CPU, on_step=lambda step: seen.append(step.step))
    assert seen[0] == 4, "three steps, one trajectory, were kept"
    assert plan.output.exists()


def test_clips_made_side_by_side_are_those_made_one_by_one(tiny_wan_folder: Path, tmp_path: Path) -> None:
    """The teacher's trajectories, and the held-out clips."""
    plans = [
        planned(tiny_wan_folder, tmp_path / f"{batch}.safetensors", batch=batch, eval_prompts=2) for batch in (1, 2)
    ]
    pipeline = load_pipeline(str(tiny_wan_folder), device=torch.device("cpu"), dtype=torch.float32)
    for plan in plans:
        (plan.work / "trajectories").mkdir(parents=True)
        (plan.work / "evaluation").mkdir()
        for some in side_by_side(pipeline, plan, [0, 1]):
            assert len(some) == plan.batch
            sample_trajectories(pipeline, plan, some)
        evaluate(pipeline, plan, "before", [0, 1], lambda number: None)
    for number in (0, 1):
        one, two = (load_file(trajectory_path(plan, number)) for plan in plans)
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name].shape == value.shape
            torch.testing.assert_close(two[name], value, rtol=2e-2, atol=4e-3, msg=name)
    found = [read_figures(plan, "before") for plan in plans]
    assert found[0] is not None
    assert found[1] is not None
    assert found[1].latent_error_mean == pytest.approx(found[0].latent_error_mean, rel=1e-3)
