"""The student sees what sampling sees, and gradient checkpointing changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan import tiny_pipeline

from vmonarch_cli.attention.meter import Meter
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.tune.lora import add_lora
from vmonarch_cli.tune.recorder import ForwardRecorder
from vmonarch_cli.tune.student import Student
from vmonarch_cli.tune.trajectories import Trajectories, sample, save_trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4


@pytest.fixture(scope="module")
def clip(tiny_wan_folder: Path) -> Plan:
    flags: dict[str, Any] = {"size": "48x32", "num_frames": 17, "steps": STEPS, "guidance_scale": 3.0}
    return resolve(GenerateRequest(model=str(tiny_wan_folder), **flags), needs_prompt=False)


def fast_with_all_turns() -> Preset:
    """`fast` with a turn for every frame of the clip in its first step. Where some have none, their residual is of 8
    bits and in use at once: one entry of 960 that rounds the other way makes 2e-3 out of a difference of 1e-7.
    """
    fast = load_preset("fast")
    assert fast.few_steps is not None
    return fast.model_copy(update={"few_steps": fast.few_steps.model_copy(update={"refresh": 1.0})})


def trajectory(pipeline: Any, clip: Plan, path: Path, preset: Preset, seed: int = 0) -> Path:
    """What a preset's own sampling took and gave, dense steps left out."""
    recorder = ForwardRecorder()
    sample(pipeline, clip, ["a red circle moving left"], [seed], preset, recorder)
    save_trajectory(
        path, [forward for forward in recorder.forwards if forward.step >= preset.dense_steps], recorder.guidance
    )
    return path


def gradients(pipeline: Any, preset: Preset, paths: list[Path], *, checkpointing: bool = False) -> tuple[Any, Any]:
    """(losses, gradients by name) of all steps of a batch of trajectories."""
    parameters = add_lora(pipeline, 4, preset.dense_layers, seed=0)
    with torch.no_grad():
        for index, value in enumerate(parameters.values()):  # B starts at zero, where A has no gradient
            value.normal_(std=0.02, generator=torch.Generator().manual_seed(index))
    for transformer in transformers_of(pipeline):
        transformer.train()
    runs = transformers_of(pipeline)
    student = Student(pipeline, preset, STEPS, runs=runs, scales=[3.0], checkpointing=checkpointing)
    with student.following(Trajectories(paths, torch.device("cpu"))) as losses:
        found = list(losses)
    return found, {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


@pytest.mark.parametrize("preset", ["paper", "fast", "balanced", "dense steps and layers"])
@pytest.mark.parametrize("two_stages", [False, True])
def test_an_untrained_student_repeats_the_sampling_of_its_preset(
    preset: str, two_stages: bool, clip: Plan, tmp_path: Path
) -> None:
    """At the states of the preset's own sampling it predicts what was predicted there: warm starts, corrections and
    turns are those of sampling. Dense predictions at the same states are far away.
    """
    chosen = load_preset(preset) if preset in ("paper", "balanced") else fast_with_all_turns()
    if preset == "balanced":  # its fields for few steps are too near to dense attention for the last line
        chosen = chosen.model_copy(update={"few_steps": None})
    if " " in preset:
        chosen = chosen.model_copy(update={"dense_steps": 1, "dense_layers": 1})
    pipeline = tiny_pipeline(two_stages=two_stages)
    path = trajectory(pipeline, clip, tmp_path / "own.safetensors", chosen)
    add_lora(pipeline, 4, chosen.dense_layers, seed=0)
    student = Student(pipeline, chosen, STEPS, runs=transformers_of(pipeline))
    with student.following(Trajectories([path], torch.device("cpu"))) as losses:
        own = list(losses)
    assert len(own) == STEPS - chosen.dense_steps
    assert max(own) < 1e-4  # states are kept in float16
    dense = trajectory(tiny_pipeline(two_stages=two_stages), clip, tmp_path / "dense.safetensors", load_preset("dense"))
    with student.following(Trajectories([dense], torch.device("cpu"))) as losses:
        assert max(list(losses)[chosen.dense_steps :]) > 1e-2


@pytest.mark.parametrize("preset", ["paper", "fast", "balanced", "exact"])
def test_gradient_checkpointing_gives_the_same_gradients(preset: str, clip: Plan, tmp_path: Path) -> None:
    """Layers that run again in the backward pass start from what they had started from."""
    dense = trajectory(tiny_pipeline(), clip, tmp_path / "dense.safetensors", load_preset("dense"))
    losses, plain = gradients(tiny_pipeline(), load_preset(preset), [dense])
    again, twice = gradients(tiny_pipeline(), load_preset(preset), [dense], checkpointing=True)
    assert again == losses
    assert plain.keys() == twice.keys()
    for name, value in plain.items():
        torch.testing.assert_close(twice[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_a_dense_call_that_warms_up_in_a_checkpointed_layer_keeps_nothing_for_it(
    clip: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the first dense call of a shape is preceded by one that is not timed."""
    warm_up, timed = Meter._warm_up, Meter._timed

    def dense(self: Meter, q: torch.Tensor, run: Any) -> torch.Tensor:
        warm_up(self, q, run)
        return timed(self, run, structured=False)

    monkeypatch.setattr(Meter, "dense", dense)
    preset = load_preset("paper").model_copy(update={"dense_layers": 1})
    path = trajectory(tiny_pipeline(), clip, tmp_path / "dense.safetensors", load_preset("dense"))
    pipeline = tiny_pipeline()
    for transformer in transformers_of(pipeline):
        transformer.train()
        transformer.requires_grad_(True)
    student = Student(pipeline, preset, STEPS, runs=transformers_of(pipeline), scales=[3.0], checkpointing=True)
    with student.following(Trajectories([path], torch.device("cpu"))) as losses:
        assert len(list(losses)) == STEPS


def test_kernels_that_compile_in_a_checkpointed_layer_keep_nothing_for_it(clip: Plan, tmp_path: Path) -> None:
    """A kernel's first run compiles it, before the call that counts."""
    preset = load_preset("paper").model_copy(update={"impl": "triton"})
    dense = trajectory(tiny_pipeline(), clip, tmp_path / "dense.safetensors", load_preset("dense"))
    gradients(tiny_pipeline(), preset, [dense], checkpointing=True)


def test_a_batch_has_the_mean_gradient_of_its_trajectories(clip: Plan, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    paths = [
        trajectory(pipeline, clip, tmp_path / f"{seed}.safetensors", load_preset("dense"), seed) for seed in range(2)
    ]
    both = gradients(tiny_pipeline(), fast_with_all_turns(), paths)[1]
    each = [gradients(tiny_pipeline(), fast_with_all_turns(), [path])[1] for path in paths]
    for name, value in both.items():
        torch.testing.assert_close(value, (each[0][name] + each[1][name]) / 2, rtol=1e-3, atol=1e-5, msg=name)
