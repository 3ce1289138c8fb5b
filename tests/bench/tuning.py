"""Time and memory of `vmonarch tune` on a model of true size with random weights, on the GPU at hand.

    python tests/bench/tuning.py --json tuning.json
    torchrun --nproc-per-node 2 tests/bench/tuning.py --json two.json

One trajectory of a few steps is sampled by the teacher. A step of training on it is then timed, forward and backward of
both prompts and the optimiser's step, as the command runs them. First a preset that is exact must reproduce the
teacher's velocities; otherwise nothing is timed. Several processes have a trajectory each. Random weights have the time
and the memory of real ones; what would be learned is nothing.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.machine.group import joined
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.model import random_transformer
from vmonarch_cli.profile.record import Recorder, this_machine
from vmonarch_cli.profile.repeat import wall
from vmonarch_cli.tune.lora import add_lora
from vmonarch_cli.tune.recorder import Guidance, TeacherForward, narrow
from vmonarch_cli.tune.student import Student
from vmonarch_cli.tune.trajectories import Trajectories, save_trajectory

LARGEST_LOSS = 2e-3
"""Of the exact preset against the teacher: two roundings to 16 bit."""


def teacher(pipeline: Any, clip: Plan, device: torch.device, path: Path) -> dict[str, Any]:
    """Write a trajectory of forwards at random states; seconds of its dense forwards."""
    model, transformer = clip.model, pipeline.transformer
    frames, rows, columns = clip.grid
    p_t, p_h, p_w = model.patch
    shape = (1, model.latent_channels, frames * p_t, rows * p_h, columns * p_w)
    generator = torch.Generator("cpu").manual_seed(0)
    texts = torch.randn((2, 1, model.max_sequence_length, model.text_dim), generator=generator).to(transformer.dtype)
    forwards, seconds = [], []
    with torch.no_grad(), swapped(pipeline, load_preset("dense"), dense=("auto",)) as session:
        session.begin_clip(clip.steps, watching=False)
        for step in range(clip.steps):
            state = narrow(torch.randn(shape, generator=generator))
            session.begin_step(step)
            for text in texts:
                inputs = {
                    "hidden_states": state,
                    "timestep": torch.tensor([900.0 - 100 * step]),
                    "encoder_hidden_states": text,
                }
                given = {name: value.to(device) for name, value in inputs.items()}
                given["hidden_states"] = given["hidden_states"].to(transformer.dtype)
                took, velocity = wall(functools.partial(predict, transformer, given), device)
                seconds.append(took)
                forwards.append(TeacherForward(step, 0, inputs, {}, narrow(velocity)))
            session.end_step()
    save_trajectory(path, forwards, Guidance(2, 2, False))
    return spread(seconds[2:])


def predict(transformer: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    velocity: torch.Tensor = transformer(**given, return_dict=False)[0]
    return velocity


def spread(seconds: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "count": len(seconds)}


def student(pipeline: Any, clip: Plan, device: torch.device, path: Path, options: Any, group: Any) -> dict[str, Any]:
    """Seconds of a step of training, and the peak of memory."""
    parameters = add_lora(pipeline, options.rank, clip.preset.dense_layers, 0)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    runs, no_sync = group.wrap(transformers_of(pipeline))
    for transformer in transformers_of(pipeline):
        transformer.train()

    def following(preset: Any, *, checkpointing: bool) -> Any:
        made = Student(
            pipeline,
            preset,
            clip.steps,
            runs=runs,
            scales=[clip.guidance_scale],
            no_sync=no_sync,
            checkpointing=checkpointing,
        )
        return made.following(Trajectories([path], device))

    with following(load_preset("exact"), checkpointing=not options.no_checkpointing) as losses:
        error = group.mean(next(losses))  # the same in all processes: one that ends alone leaves the others waiting
    optimizer.zero_grad(set_to_none=True)
    found: dict[str, Any] = {"exact_loss": error, "correct": error < LARGEST_LOSS}
    if not found["correct"]:
        return found
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with following(clip.preset, checkpointing=not options.no_checkpointing) as losses:

        def step() -> None:
            next(losses)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds = [wall(step, device)[0] for _ in range(clip.steps)]
    found["step_s"] = spread(seconds[2:])
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.1-1.3b")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=6, help="of the trajectory; the first two warm up")
    parser.add_argument(
        "--layers", type=int, help="of the model; fewer where it does not fit: figures are theirs alone"
    )
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"argument --steps: got {options.steps}; valid are 3 and more, since the first two warm up")
    rank = read_rank()
    device = torch.device(options.device if rank.world == 1 else f"{options.device}:{rank.local}")
    asked: dict[str, Any] = {"size": options.size, "num_frames": options.num_frames, "steps": options.steps}
    clip = resolve(
        GenerateRequest(model=options.model, preset=options.preset, tuned="none", **asked), needs_prompt=False
    )
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    model = clip.model if options.layers is None else clip.model.model_copy(update={"layers": options.layers})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with joined(device) as group, tempfile.TemporaryDirectory() as folder:
        pipeline = WanPipeline(
            transformer=random_transformer(model, device, dtype, 0),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
        path = Path(folder) / "trajectory.safetensors"
        settings = {
            "processes": rank.world,
            "model": clip.model.alias,
            "preset": clip.preset.name,
            "size": options.size,
            "num_frames": options.num_frames,
            "dtype": "bfloat16" if dtype is torch.bfloat16 else "float32",
            "layers": [model.layers, clip.model.layers],
            "rank": options.rank,
            "checkpointing": not options.no_checkpointing,
        }
        target = str(options.json) if rank.is_main else None
        recorder = Recorder("tuning", target, this_machine(device), settings, "python tests/bench/tuning.py")
        recorder.save(teacher_forward_s=teacher(pipeline, clip, device, path))
        found = student(pipeline, clip, device, path, options, group)
        recorder.save(**found)
        group.wait()
        recorder.finish(found["correct"])
        if rank.is_main:
            print(recorder.text())
    if not found["correct"]:
        sys.exit("the exact preset does not reproduce the teacher: nothing was timed")


if __name__ == "__main__":
    main()
