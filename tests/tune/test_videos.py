"""`vmonarch tune --videos`: a folder of clips with captions, and what training makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio
import numpy as np
import pytest
import torch
from tiny_wan import tiny_pipeline
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.media.read import first_frames
from vmonarch_cli.models.tuned import read_adapter
from vmonarch_cli.pipeline.call import decode_whole
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.tune import run
from vmonarch_cli.tune.clips import pixels
from vmonarch_cli.tune.flow_matching import encode_clip
from vmonarch_cli.tune.request import TunePlan, TuneRequest, resolve_tune
from vmonarch_cli.tune.trajectories import ForwardRecorder, Trajectories, sample

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = Machine("cpu", "CPU", "float32", "torch")
FLAGS = "--preset fast --sampler-steps 3 --size 48x32 --num-frames 17 --guidance-scale 3 --fps 8 --steps 4 --rank 2"
CAPTIONS = ("a red circle moving left", "a blue circle moving right", "a red square", "a blue square moving left")


def write_clip(path: Path, caption: str | None, *, frames: int = 20, fps: int = 8, seed: int = 0) -> None:
    """A grey square that moves over a coloured ground, 64x64."""
    colour = np.random.default_rng(seed).integers(60, 200, 3)
    video = np.broadcast_to(colour, (frames, 64, 64, 3)).astype(np.uint8).copy()
    for number in range(frames):
        video[number, 20:40, 2 * number : 2 * number + 12] = 10 * number
    imageio.mimwrite(path, video, fps=fps, macro_block_size=16)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number, caption in enumerate(CAPTIONS):
        write_clip(folder / f"clip{number}.mp4", caption, seed=number)
    (folder / "notes.md").write_text("not a clip")
    return folder


def planned(model: Path, clips: Path, output: Path, **given: Any) -> TunePlan:
    flags: dict[str, Any] = {"preset": "fast", "steps": 3, "size": "48x32", "num_frames": 17, "guidance_scale": 3.0}
    flags |= {name: given.pop(name) for name in ("negative_prompt", "preset") if name in given}
    request = GenerateRequest(model=str(model), fps=8, **flags)
    return resolve_tune(TuneRequest(request, output=str(output), videos=str(clips), **given), given.pop("texts", None))


def refused(model: Path, clips: Path, output: Path, *more: str) -> str:
    result = CliRunner().invoke(
        app, ["tune", "-m", str(model), *FLAGS.split(), "--videos", str(clips), "-o", str(output), *more]
    )
    assert result.exit_code == 2, result.stderr
    assert not output.exists()
    assert not output.with_suffix(".tune").exists()
    return result.stderr.splitlines()[-1]


def test_the_command_learns_from_clips_and_says_so(tiny_wan_folder: Path, clips: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    result = CliRunner().invoke(
        app, ["tune", "-m", str(tiny_wan_folder), *FLAGS.split(), "--videos", str(clips), "-o", str(file)]
    )
    assert result.exit_code == 0, result.stderr
    assert "the latents of 3 clips take" in result.stdout + result.stderr
    adapter = read_adapter(file)
    assert adapter.training["clips"] == 3, "of four clips one is held out"
    assert adapter.evaluation["prompts"] == 1


def test_training_lowers_the_loss_and_goes_on_bit_for_bit(
    tiny_wan_folder: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmonarch_cli.tune.loop.CHECKPOINT_EVERY_S", 0.0)
    plan = planned(tiny_wan_folder, clips, tmp_path / "whole.safetensors", steps=60, lr=1e-2, rank=8, eval_prompts=0)
    whole = run.tune(plan, CPU)
    assert whole is not None
    assert sum(whole.losses[-9:]) < 0.95 * sum(whole.losses[:9])

    def stop(step: Any) -> None:
        if step.step == 8:
            raise KeyboardInterrupt

    short = {"steps": 60, "lr": 1e-2, "rank": 8, "eval_prompts": 0}
    with pytest.raises(KeyboardInterrupt):
        run.tune(planned(tiny_wan_folder, clips, tmp_path / "parts.safetensors", **short), CPU, on_step=stop)
    again = run.tune(planned(tiny_wan_folder, clips, tmp_path / "parts.safetensors", **short, resume=True), CPU)
    assert again is not None
    assert again.losses == whole.losses


@pytest.mark.parametrize(("negative", "forwards"), [("", 2), ("blurred", 1)])
def test_states_are_between_clip_and_noise_at_the_levels_of_the_sampler(
    negative: str, forwards: int, tiny_wan_folder: Path, clips: Path, tmp_path: Path
) -> None:
    """Text, timesteps and noise levels are those that sampling gives the transformer, the target is noise - clip."""
    plan = planned(tiny_wan_folder, clips, tmp_path / "a.safetensors", negative_prompt=negative)
    (plan.work / "trajectories").mkdir(parents=True)
    pipeline = tiny_pipeline()
    path = encode_clip(pipeline, plan, 0)
    made, other = (Trajectories([path], torch.device("cpu"), [seed]) for seed in (5, 6))
    assert [len(step) for step in made.steps] == [forwards] * 3
    assert made.most_forwards == 2
    recorder = ForwardRecorder()
    sample(pipeline, plan.clip, CAPTIONS[:1], [0], plan.clip.preset, recorder)
    noise = torch.randn(made.forward(0).velocity.shape[1:], generator=torch.Generator().manual_seed(5))
    clean = noise - made.forward(0).velocity[0]
    for step, numbers in enumerate(made.steps):
        forward, sampled = made.forward(numbers[0]), recorder.forwards[2 * step]
        sigma = recorder.sigmas[step]
        assert sigma is not None
        torch.testing.assert_close(forward.inputs["hidden_states"][0], (1 - sigma) * clean + sigma * noise)
        assert torch.equal(forward.inputs["timestep"], sampled.inputs["timestep"])
        assert torch.equal(forward.inputs["encoder_hidden_states"], sampled.inputs["encoder_hidden_states"])
        assert not torch.equal(other.forward(numbers[0]).velocity, forward.velocity), "each pass has its own noise"
    frames = torch.from_numpy(pixels(plan.videos[0], plan.clip)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    mean, std = (torch.tensor(pipeline.vae.config[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    expected = (pipeline.vae.encode(frames).latent_dist.mode()[0] - mean) / std
    torch.testing.assert_close(clean, expected, rtol=2e-3, atol=2e-3)
    assert decode_whole(pipeline, clean[None], (32, 48, 17)).shape == (17, 32, 48, 3)


def test_frames_come_at_the_rate_of_the_model(tmp_path: Path) -> None:
    write_clip(tmp_path / "fast.mp4", "x", frames=24, fps=16)
    assert len(list(first_frames(tmp_path / "fast.mp4", 100, 8))) == 12
    assert len(list(first_frames(tmp_path / "fast.mp4", 5, 16))) == 5


def test_prompts_of_a_file_are_held_out_and_all_clips_train(tiny_wan_folder: Path, clips: Path, tmp_path: Path) -> None:
    request = GenerateRequest(model=str(tiny_wan_folder), preset="fast", size="48x32", num_frames=17, fps=8)
    given = TuneRequest(request, output=str(tmp_path / "a.safetensors"), videos=str(clips))
    plan = resolve_tune(given, ["a red circle", "a blue square"])
    assert len(plan.videos) == 4
    assert plan.held_out == ("a red circle", "a blue square")


def test_clips_that_cannot_be_used(tiny_wan_folder: Path, tmp_path: Path) -> None:
    model, output, folder = tiny_wan_folder, tmp_path / "a.safetensors", tmp_path / "clips"
    assert "--videos takes a folder of clips" in refused(model, folder, output)
    folder.mkdir()
    assert "holds no clip: NAME.mp4 with its caption in NAME.txt" in refused(model, folder, output)
    write_clip(folder / "a.mp4", None)
    assert "a.mp4 has no caption" in refused(model, folder, output)
    (folder / "a.txt").write_text(" \n")
    assert "is empty: it says what a.mp4 shows" in refused(model, folder, output)
    (folder / "a.txt").write_text("a red circle")
    assert "leaves no clip to train with: there are 1" in refused(model, folder, output, "--eval-prompts", "1")
    write_clip(folder / "b.mp4", "a red circle", frames=9)
    assert "b.mp4 is too short: it has 9 frames at 8 frames per second" in refused(model, folder, output)
    (folder / "b.mp4").write_bytes(b"no clip at all")
    assert "b.mp4 cannot be read: it is damaged" in refused(model, folder, output)
    (folder / "b.mp4").rename(folder / "b.mkv")
    assert "b.mkv cannot be read: --videos takes .mp4" in refused(model, folder, output)
