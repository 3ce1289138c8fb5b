"""A whole run, from a plan to a file that reads back, and what happens when it goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tiny_wan import FRAMES, GRID, HEIGHT, LAYERS, WIDTH

from vmonarch_cli.clip import make as run
from vmonarch_cli.clip.events import (
    ClipDone,
    ClipStarted,
    Decoding,
    Event,
    FramesDecoded,
    LatentsSaved,
    ModelLoaded,
    ModelLoading,
    StepDone,
)
from vmonarch_cli.clip.record_model import RECORD_SCHEMA
from vmonarch_cli.errors import DeviceError, InputError, ModelError, NonFiniteError
from vmonarch_cli.pipeline.device import pick_device, pick_dtype
from vmonarch_cli.pipeline.load import load_pipeline, set_flow_shift
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.timing import ClipResult, ClipTiming, StepAttention

CPU = torch.device("cpu")
STEPS = 3


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tiny_wan_folder: Path) -> Path:
    """The tiny pipeline on disk, as a user's model folder."""
    return tiny_wan_folder


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def plan_for(folder: Path, output: Path, **flags: Any) -> Plan:
    settings: dict[str, Any] = {
        "prompt": "a red circle moving left",
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "fps": 8,
        "steps": STEPS,
        "guidance_scale": 4.0,
        "preset": "paper",
        "dense_every": 2,
        "device": "cpu",
        **flags,
    }
    return resolve(GenerateRequest(model=str(folder), output=str(output), **settings))


def generate(plan: Plan, **more: Any) -> list[ClipResult]:
    """A run of a plan, as the command line begins one."""
    return run.generate(plan, check_machine(plan), **more)


def pngs(path: Path) -> np.ndarray[Any, Any]:
    return np.stack([imageio.imread(file) for file in sorted(path.glob("*.png"))])


def edit_weights(folder: Path, part: str, change: Any) -> None:
    """Apply ``change(tensors)`` to a component's safetensors file."""
    from safetensors.torch import load_file, save_file

    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# A run that goes well


def test_a_clip_and_its_record(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []
    plan = plan_for(folder, tmp_path / "clip.mp4", seed=11)
    (result,) = generate(plan, on_event=events.append)

    assert result.path == tmp_path / "clip.mp4"
    assert imageio.imread(result.path).shape == (FRAMES, HEIGHT, WIDTH, 3)
    kinds = [
        ModelLoading,
        ModelLoaded,
        ClipStarted,
        *[StepDone] * STEPS,
        LatentsSaved,
        Decoding,
        FramesDecoded,
        ClipDone,
    ]
    assert [type(event) for event in events] == kinds

    record = json.loads(result.record_path.read_text())
    assert record["schema"] == RECORD_SCHEMA
    assert (record["prompt"], record["seed"], record["clip"]) == ("a red circle moving left", 11, "clip.mp4")
    assert record["settings"]["steps"] == {"value": STEPS, "origin": "flag"}
    assert record["settings"]["preset.num_steps"]["origin"] == "preset"
    assert record["preset"] == plan.preset.model_dump(exclude={"evidence"})
    assert record["grid"] == list(GRID)
    assert record["impl"] == "torch"
    assert record["dtype"] == "float32"
    assert record["device"]["name"].startswith("CPU")
    assert {"vmonarch", "torch", "triton", "diffusers", "transformers", "python"} <= record["versions"].keys()
    calls = LAYERS * 2 * STEPS
    assert record["coverage"] == {"calls": calls, "structured": calls, "dense": {}}

    timing = record["timing"]
    assert [step["index"] for step in timing["steps"]] == list(range(STEPS))
    assert [step["dense_s"] is not None for step in timing["steps"]] == [True, False, True]
    phases = ("text_encode_s", "denoise_s", "decode_s", "write_s", "excluded_s")
    assert sum(timing[phase] for phase in phases) == pytest.approx(timing["total_s"], rel=0.2)
    assert sum(step["step_s"] for step in timing["steps"]) <= timing["denoise_s"]
    assert timing["peak_memory_bytes"] > 50e6

    printed = capfd.readouterr()
    assert printed.out + printed.err == "", "libraries are quiet"


def test_the_same_seed_gives_the_same_frames_whatever_ran_before(folder: Path, tmp_path: Path) -> None:
    first = generate(plan_for(folder, tmp_path / "a.png", seed=5, num_videos=2, preset="fast"))
    alone = generate(plan_for(folder, tmp_path / "b.png", seed=6, preset="fast", dense_every=0))
    assert [result.seed for result in first] == [5, 6]
    frames = [pngs(result.path) for result in (*first, *alone)]
    assert np.array_equal(frames[1], frames[2])
    assert not np.array_equal(frames[0], frames[1])


def test_dense_preset_makes_the_frames_of_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    plan = plan_for(folder, tmp_path / "clip.png", preset="dense", seed=3, flow_shift=3.0)
    (result,) = generate(plan)
    stock = load_pipeline(str(folder), device=CPU, dtype=torch.float32)(
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(3),
        max_sequence_length=plan.model.max_sequence_length,
    ).frames[0]
    difference = np.abs(pngs(result.path).astype(float) - (stock * 255).round())
    assert difference.max() <= 1, "at most a rounding away"
    assert result.impl == "dense"
    assert result.coverage.structured == 0


def test_without_guidance_there_is_one_forward_a_step(folder: Path, tmp_path: Path) -> None:
    (result,) = generate(plan_for(folder, tmp_path / "clip.png", guidance_scale=1.0))
    assert result.coverage.calls == LAYERS * STEPS


# A run that goes wrong


def test_a_latent_that_is_not_finite_stops_the_clip_with_the_step(damaged: Path, tmp_path: Path) -> None:
    edit_weights(damaged, "transformer", lambda tensors: tensors["proj_out.bias"].fill_(float("nan")))
    steps: list[Event] = []
    with pytest.raises(NonFiniteError, match=f"step 1 of {STEPS}") as caught:
        generate(plan_for(damaged, tmp_path / "out" / "clip.mp4"), on_event=steps.append)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    assert not any(isinstance(event, StepDone) for event in steps)


def test_dense_attention_is_advised_where_it_was_not_tried(damaged: Path, tmp_path: Path) -> None:
    edit_weights(damaged, "transformer", lambda tensors: tensors["proj_out.bias"].fill_(float("nan")))
    for preset, advice in (("fast", "a wider --dtype, or dense attention, may help"), ("dense", "a wider --dtype may")):
        with pytest.raises(NonFiniteError, match=advice):
            generate(plan_for(damaged, tmp_path / "clip.mp4", preset=preset), retry_dense=False)


def test_the_step_in_the_message_is_the_step_that_went_wrong(folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(folder), device=CPU, dtype=torch.float32)
    scheduler = pipeline.scheduler

    def spoil(module: torch.nn.Module, args: Any, outputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        return (outputs[0] * float("inf"),) if scheduler.step_index == 1 else None

    pipeline.transformer.register_forward_hook(spoil)
    plan = plan_for(folder, tmp_path / "unused.png")
    with swapped(pipeline, plan.preset) as session, pytest.raises(NonFiniteError, match=f"step 2 of {STEPS}"):
        run.denoise(pipeline, session, run.encode(pipeline, "a red circle", "", 4.0, 16), plan, seed=0)


def test_frames_that_are_not_finite_are_not_written(damaged: Path, tmp_path: Path) -> None:
    edit_weights(damaged, "vae", lambda tensors: tensors["decoder.conv_out.bias"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match="frames are not finite"):
        generate(plan_for(damaged, tmp_path / "out" / "clip.mp4"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip.latents.safetensors"]


def test_weights_that_are_not_in_the_files_are_an_error_not_random(damaged: Path, tmp_path: Path) -> None:
    edit_weights(damaged, "transformer", lambda tensors: tensors.pop("blocks.1.attn1.to_q.weight"))
    with pytest.raises(ModelError, match=r"lacks the weights of blocks\.1\.attn1\.to_q\.weight"):
        generate(plan_for(damaged, tmp_path / "out" / "clip.mp4"))
    assert not (tmp_path / "out").exists()


def test_text_encoder_weights_that_are_missing_are_an_error(damaged: Path) -> None:
    edit_weights(damaged, "text_encoder", lambda tensors: tensors.pop("encoder.final_layer_norm.weight"))
    with pytest.raises(ModelError, match=r"lacks the weights of encoder\.final_layer_norm\.weight"):
        load_pipeline(str(damaged), device=CPU, dtype=torch.float32)


def test_a_truncated_file_is_one_sentence(damaged: Path) -> None:
    path = next((damaged / "vae").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged") as caught:
        load_pipeline(str(damaged), device=CPU, dtype=torch.float32)
    assert "\n" not in caught.value.message


def test_a_config_that_the_library_refuses_is_one_sentence(damaged: Path) -> None:
    index = json.loads((damaged / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "NoSuchScheduler"]
    (damaged / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_pipeline(str(damaged), device=CPU, dtype=torch.float32)
    assert "\n" not in caught.value.message


def test_an_implementation_that_cannot_run_stops_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="triton"):
        generate(plan_for(folder, tmp_path / "out" / "clip.mp4", impl="triton"))
    assert not (tmp_path / "out").exists()


# Loading


def test_dtypes_of_the_parts(folder: Path) -> None:
    pipeline = load_pipeline(str(folder), device=CPU, dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize(("scheduler", "setting"), [("UniPC", "flow_shift"), ("Euler", "shift")])
def test_flow_shift_reaches_the_scheduler(folder: Path, scheduler: str, setting: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = load_pipeline(str(folder), device=CPU, dtype=torch.float32)
    if scheduler == "Euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    middle = []
    for shift in (1.0, 8.0):
        set_flow_shift(pipeline, shift)
        assert pipeline.scheduler.config[setting] == shift
        pipeline.scheduler.set_timesteps(10)
        middle.append(float(pipeline.scheduler.sigmas[5]))
    assert middle[0] < 0.6 < 0.8 < middle[1]


def test_flow_shift_of_a_scheduler_without_one_is_refused(folder: Path) -> None:
    from diffusers import DDIMScheduler

    pipeline = load_pipeline(str(folder), device=CPU, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match="DDIMScheduler of this model has no shift"):
        set_flow_shift(pipeline, 3.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_devices_and_dtypes_without_cuda() -> None:
    assert pick_device("auto") == CPU
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(DeviceError, match="'cuda' cannot be used"):
        pick_device("cuda")
    with pytest.raises(DeviceError, match="'tpu9' is unknown"):
        pick_device("tpu9")
    with pytest.raises(InputError, match="'float8' is unknown"):
        pick_dtype("float8", CPU)


# Figures derived from what was measured


def step(index: int, *, dense_call_s: float | None = None) -> StepAttention:
    """Ten structured calls of 0.1 s in a step of 2 s."""
    return StepAttention(
        index=index,
        total=2,
        sigma=None,
        step_s=2.0,
        attention_s=1.0,
        calls=10,
        structured_calls=10,
        dense_call_s=dense_call_s,
        dense_s=None if dense_call_s is None else dense_call_s * 10,
        sampled_attention_s=None if dense_call_s is None else 0.1,
        error=None if dense_call_s is None else 0.05,
    )


def test_speedups_come_from_the_sampled_steps() -> None:
    timing = ClipTiming([step(0, dense_call_s=0.4), step(1)], 0.5, 4.0, 0.4, 0.1, 6.0, excluded_s=1.0)
    assert timing.steps[0].speedup == pytest.approx(4.0)
    assert timing.steps[0].dense_step_s == pytest.approx(5.0)
    assert timing.steps[1].speedup is None
    assert timing.attention_speedup == pytest.approx(4.0)
    assert timing.estimated_dense_denoise_s == pytest.approx(4.0 + 20 * 0.3)
    assert timing.end_to_end_speedup == pytest.approx(11 / 5)
    assert timing.error == pytest.approx(0.05)


def test_without_samples_there_is_no_speedup() -> None:
    timing = ClipTiming([step(0)], 0.5, 2.0, 0.4, 0.1, 3.0)
    assert timing.attention_speedup is None
    assert timing.end_to_end_speedup is None
