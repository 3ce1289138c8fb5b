"""What the student sees of each family that can be tuned: the forwards of its own pipeline, with all that they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import TINY

from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.presets import load_preset
from vmonarch_cli.tune import run
from vmonarch_cli.tune.recorder import ForwardRecorder
from vmonarch_cli.tune.request import TunePlan, TuneRequest, resolve_tune
from vmonarch_cli.tune.student import Student, guided
from vmonarch_cli.tune.trajectories import Trajectories, sample, save_trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = (
    "wan",
    "wan-vace",
    "skyreels-v2",
    "hunyuan-video",
    "cogvideox-2b",
    "cogvideox-5b",
    "ltx-video",
    "mochi-1",
    "kandinsky-5",
)
PROMPTS = ("a red circle moving left", "a blue circle moving right", "a red square moving left")
CPU = Machine("cpu", "CPU", "float32", "torch")


@pytest.fixture(scope="module", params=FAMILIES)
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TunePlan:
    folder, tiny = tmp_path_factory.mktemp(request.param), TINY[request.param]
    tiny.build().save_pretrained(folder / "model", safe_serialization=True)
    size: dict[str, Any] = {"size": f"{tiny.width}x{tiny.height}", "num_frames": tiny.num_frames}
    clip = GenerateRequest(model=str(folder / "model"), preset="fast", steps=3, guidance_scale=3.0, **size)
    given = TuneRequest(clip, output=str(folder / "a.safetensors"), steps=6, rank=2, eval_prompts=1)
    return resolve_tune(given, PROMPTS)


def test_an_untrained_student_repeats_the_sampling_of_its_preset(plan: TunePlan, tmp_path: Path) -> None:
    """Both prompts in one forward, rotary tables, sizes: what is kept in the file is all that the forward took, and a
    pipeline that was never called since it was loaded gives the same.
    """
    preset, device = load_preset("fast"), torch.device("cpu")
    pipeline = load_pipeline(plan.clip.model_source, device=device, dtype=torch.float32)
    recorder, path = ForwardRecorder(), tmp_path / "own.safetensors"
    sample(pipeline, plan.clip, PROMPTS[:1], [0], preset, recorder)
    save_trajectory(path, recorder.forwards, recorder.guidance)
    fresh = load_pipeline(plan.clip.model_source, device=device, dtype=torch.float32)
    for transformer in transformers_of(fresh):
        transformer.requires_grad_(True)
    student = Student(fresh, preset, plan.clip.steps, runs=transformers_of(fresh))
    with student.following(Trajectories([path], device)) as losses:
        found = list(losses)
    assert len(found) == plan.clip.steps
    assert max(found) < 1e-4  # states are kept in float16


def test_the_loss_is_of_the_velocity_that_the_sampler_steps_with(
    plan: TunePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pipeline's own loop gives its scheduler is made of the step's forwards as the loss has it."""
    pipeline = load_pipeline(plan.clip.model_source, device=torch.device("cpu"), dtype=torch.float32)
    stepped: list[torch.Tensor] = []
    kind = type(pipeline.scheduler)
    original = kind.step

    def step(self: Any, model_output: torch.Tensor, *args: Any, **given: Any) -> Any:
        stepped.append(model_output.detach().clone())
        return original(self, model_output, *args, **given)

    monkeypatch.setattr(kind, "step", step)
    recorder = ForwardRecorder()
    sample(pipeline, plan.clip, PROMPTS[:1], [0], load_preset("dense"), recorder)
    assert len(stepped) == plan.clip.steps
    for number, expected in enumerate(stepped):
        velocities = [forward.velocity for forward in recorder.forwards if forward.step == number]
        assert len(velocities) * (2 if recorder.guidance.both_prompts else 1) == plan.forwards
        own = guided(velocities, plan.guidance_scales[0], both_prompts=recorder.guidance.both_prompts)
        torch.testing.assert_close(own.reshape(expected.shape), expected.float(), rtol=0.02, atol=0.02)


def test_a_run_writes_an_adapter(plan: TunePlan) -> None:
    tuned = run.tune(plan, CPU)
    assert tuned is not None
    assert tuned.before != tuned.after
    assert plan.output.is_file()
