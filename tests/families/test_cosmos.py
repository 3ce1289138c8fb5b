"""Cosmos-Predict 2.5: its safety checks on prompts and frames, what it goes on from, and what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cosmos_checks import UNSAFE, SafetyChecks
from loading import CPU, load
from tiny_families import PROMPT, cosmos, image, save_video, video
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.models.cosmos import COSMOS_25_2B
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.pipeline.load import load_decoder
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = "--size 48x32 --num-frames 17 --steps 2 --seed 3 --device cpu --quiet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "cosmos"
    cosmos().save_pretrained(found, safe_serialization=True)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[SafetyChecks]:
    """The safety checks of each pipeline that is loaded."""
    found: list[SafetyChecks] = []
    real = SafetyChecks.__init__

    def init(self: SafetyChecks) -> None:
        real(self)
        found.append(self)

    monkeypatch.setattr(SafetyChecks, "__init__", init)
    return found


def generate(folder: Path, output: Path, *more: str, prompt: str = PROMPT) -> Result:
    words = ["generate", "-m", str(folder), "-p", prompt, *SHAPE.split(), *more, "-o", str(output)]
    return CliRunner().invoke(app, words)


def request(folder: Path, **more: Any) -> GenerateRequest:
    return GenerateRequest(model=str(folder), prompt=PROMPT, height=32, width=48, num_frames=17, steps=2, **more)


def test_the_safety_checks_see_the_prompt_and_all_frames(
    folder: Path, made: list[SafetyChecks], tmp_path: Path
) -> None:
    result = generate(folder, tmp_path / "x.mp4", "--preset", "paper")
    assert result.exit_code == 0, result.stderr
    (checks,) = made
    assert checks.prompts == [PROMPT]
    (frames,) = checks.clips
    assert frames.shape == (17, 32, 48, 3)
    assert frames.dtype == np.uint8
    written = read_clip(tmp_path / "x.mp4")
    assert written.shape == frames.shape


def test_what_the_safety_checks_change_is_written(folder: Path, made: list[SafetyChecks], tmp_path: Path) -> None:
    result = generate(folder, tmp_path / "frames.png", "--num-frames", "1")
    assert result.exit_code == 0, result.stderr
    (frame,) = read_clip(tmp_path / "frames.png")
    expected = made[0].clips[0][0].copy()
    expected[:2, :2] //= 2
    assert np.array_equal(frame, expected)


def test_a_prompt_that_is_refused_makes_no_clip(folder: Path, made: list[SafetyChecks], tmp_path: Path) -> None:
    result = generate(folder, tmp_path / "x.mp4", prompt=f"an {UNSAFE} thing")
    assert result.exit_code == 2
    assert "error: the safety checks of this Cosmos model refuse the prompt: word it otherwise" in result.stderr
    assert not made[0].clips
    assert not list(tmp_path.iterdir())


def test_frames_that_are_refused_are_not_written(
    folder: Path, made: list[SafetyChecks], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(SafetyChecks, "check_video_safety", lambda self, frames: None)
    result = generate(folder, tmp_path / "x.mp4")
    assert result.exit_code == 1
    assert "the safety checks of this Cosmos model refuse the frames, and no clip was written" in result.stderr
    assert not (tmp_path / "x.mp4").exists()


def test_a_pipeline_that_only_decodes_has_the_checks_too(folder: Path) -> None:
    import torch

    pipeline = load_decoder(str(folder), device=CPU, dtype=torch.float32)
    assert pipeline.transformer is None
    assert isinstance(pipeline.safety_checker, SafetyChecks)


def test_packages_that_are_missing_are_named_before_weights_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict

    with monkeypatch.context() as patched:
        patched.delattr(transformer_cosmos, "transforms")
        with pytest.raises(ModelError, match=r"cosmos needs torchvision, and .*: pip install torchvision$"):
            load(folder)
    absent = type("CosmosSafetyChecker", (), {"__module__": pipeline_cosmos2_5_predict.__name__})
    monkeypatch.setattr(pipeline_cosmos2_5_predict, "CosmosSafetyChecker", absent)
    monkeypatch.setattr("vmonarch_cli.pipeline.load._check_memory", lambda *a: pytest.fail("too late"))
    result = generate(folder, tmp_path / "x.mp4")
    assert result.exit_code == 2
    assert (
        "error: cosmos needs cosmos_guardrail, the safety checks that its licence asks for, and the package is not "
        "here: pip install cosmos_guardrail" in " ".join(result.stderr.split())
    )


def test_a_clip_goes_on_from_the_end_of_a_video(folder: Path, tmp_path: Path) -> None:
    """A longer video with the same last frames makes the same clip, one with other last frames another."""

    def clip(name: str, pictures: list[Any]) -> Any:
        film = save_video(tmp_path / f"{name}.gif", pictures)
        result = generate(folder, tmp_path / f"{name}.mp4", "--video", str(film), "--preset", "paper")
        assert result.exit_code == 0, result.stderr
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["coverage"]["structured"] == 2 * 2 * 2
        return read_clip(tmp_path / f"{name}.mp4")

    moving = video(9)
    end = clip("end", moving[4:])
    assert np.array_equal(clip("whole", moving), end)
    assert not np.array_equal(clip("start", moving[:5]), end)


def test_what_it_cannot_do_is_said(folder: Path, tmp_path: Path) -> None:
    short = save_video(tmp_path / "short.gif", video(4))
    with pytest.raises(InputError, match=r"short\.gif has 4 frames, and a clip goes on from the last 5: give a longer"):
        resolve(request(folder, video=str(short)))
    picture = tmp_path / "first.png"
    image().save(picture)
    film = save_video(tmp_path / "film.gif", video(9))
    with pytest.raises(InputError, match="--image and --video both say what the clip is made from"):
        resolve(request(folder, video=str(film), image=str(picture)))
    with pytest.raises(InputError, match="--strength is for videos that are noised"):
        resolve(request(folder, video=str(film), strength=0.5))
    with pytest.raises(InputError, match="--flow-shift cannot be set: the noise schedule of cosmos has no shift"):
        resolve(request(folder, flow_shift=3.0))
    with pytest.raises(InputError, match="--sampler cannot be set: the noise schedule of cosmos"):
        resolve(request(folder, sampler="euler"))
    with pytest.raises(InputError, match="--compile: diffusers names no repeated blocks for CosmosTransformer3DModel"):
        resolve(request(folder, compile=True))


def test_the_published_model_is_read_from_its_own_branch() -> None:
    entry, source = find_model("cosmos-predict2.5-2b")
    assert (entry, source) == (COSMOS_25_2B, "nvidia/Cosmos-Predict2.5-2B")
    plan = resolve(GenerateRequest(model="cosmos-predict2.5-2b", prompt=PROMPT))
    assert plan.revision == "diffusers/base/post-trained"
    assert plan.grid == (24, 44, 80)
    other = resolve(GenerateRequest(model="cosmos-predict2.5-2b", prompt=PROMPT, revision="main"))
    assert other.revision == "main"
