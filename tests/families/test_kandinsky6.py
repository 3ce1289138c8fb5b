"""Kandinsky 6: its first frame behind the clip, its sound, its texts, and the checkpoints that are distilled."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import EXACT, PAPER, load
from tiny_families import NEGATIVE, PROMPT, TINY, image, kandinsky_6, latents_of
from typer.testing import CliRunner, Result

from vmonarch_cli.attention.joint import Packed
from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.media.sound import read_sound
from vmonarch_cli.models.kandinsky import KANDINSKY_6_LITE, KANDINSKY_6_PRO
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.pipeline.call import call, encode
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.timing import Coverage

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = "--size 48x32 --num-frames 17 --fps 8 --steps 2 --seed 3 --device cpu --quiet"
RATE = 16000
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "k6"
    kandinsky_6().save_pretrained(found, safe_serialization=True)
    return found


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "k6-distilled"
    kandinsky_6(velocities=4).save_pretrained(found, safe_serialization=True)
    return found


def generate(folder: Path, output: Path, *more: str) -> Result:
    words = ["generate", "-m", str(folder), "-p", PROMPT, *SHAPE.split(), *more, "-o", str(output)]
    return CliRunner().invoke(app, words)


def request(folder: Path, **more: Any) -> GenerateRequest:
    return GenerateRequest(model=str(folder), prompt=PROMPT, height=32, width=48, num_frames=17, steps=2, **more)


def test_a_first_frame_stands_behind_the_clip() -> None:
    find: Any = FAMILIES["Kandinsky6Transformer3DModel"].packed
    transformer = kandinsky_6().transformer

    def found(frames: int, *kinds: int) -> Packed:
        latents = torch.zeros(1, frames, 4, 6, 9)
        ids = torch.tensor([kinds]) if kinds else None
        packed: Packed = find(transformer, (), {"hidden_states": latents, "visual_token_type_ids": ids})
        return packed

    assert found(5) == Packed((5, 2, 3))
    assert found(3, 0, 0, 0) == Packed((3, 2, 3))
    assert found(4, 0, 0, 0, 1) == Packed((3, 2, 3), before=0, others=6)
    assert found(4, 1, 0, 0, 0) == Packed((1, 1, 1)), "where it stands in front, no structure is assumed"


def test_only_the_clips_own_frames_are_structured(folder: Path) -> None:
    """A first frame is no sixth frame of the grid, and the other attentions of a block stay stock."""
    pipeline, tiny = load(folder), TINY["kandinsky-6-image"]
    with swapped(pipeline, PAPER) as session:
        latents_of(pipeline, tiny)
        replaced = [
            name
            for name, module in pipeline.transformer.named_modules()
            if type(getattr(module, "processor", None)).__name__ == "Kandinsky6MonarchProcessor"
        ]
    assert session.grid == (5, 2, 3)
    assert session.coverage() == Coverage(structured=2 * 2 * 2)
    assert replaced == [f"visual_transformer_blocks.{i}.video_dec_block.self_attention" for i in (0, 1)]


def test_padding_of_a_text_is_not_attended_to(folder: Path) -> None:
    """The pipeline's call masks it when it encodes the text, and takes no mask for embeddings."""
    pipeline, tiny = load(folder), TINY["kandinsky-6"]
    stock = latents_of(pipeline, tiny)
    embeddings = encode(pipeline, PROMPT, NEGATIVE, 4.0, 16)
    assert set(embeddings) == {
        f"{start}{name}" for start in ("", "negative_") for name in ("prompt_embeds", "pooled_prompt_embeds")
    }
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (tiny.height, tiny.width, tiny.num_frames)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "generator": generator, "fps": 24}
    torch.testing.assert_close(call(pipeline, embeddings, shape, **options), stock, **CLOSE)


def test_an_empty_negative_prompt_is_not_the_pipelines_own(folder: Path) -> None:
    pipeline = load(folder)
    empty, own = (encode(pipeline, PROMPT, text, 4.0, 64) for text in ("", pipeline._DEFAULT_NEGATIVE_PROMPT))
    assert empty["negative_prompt_embeds"].shape[1] < own["negative_prompt_embeds"].shape[1]
    assert "negative_prompt_embeds" not in encode(pipeline, PROMPT, NEGATIVE, 1.0, 64)


def test_a_clip_has_the_pipelines_own_sound(folder: Path, tmp_path: Path) -> None:
    negative = ("--negative-prompt", NEGATIVE, "--guidance-scale", "4")
    result = generate(folder, tmp_path / "x.gif", "--preset", "dense", *negative)
    assert result.exit_code == 0, result.stderr
    options: dict[str, Any] = {**TINY["kandinsky-6"].options, "max_sequence_length": 1024}
    expected = load(folder)(
        prompt=PROMPT,
        height=32,
        width=48,
        num_frames=17,
        frame_rate=8,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
        **options,
    ).audio[0]
    sound = read_sound(tmp_path / "x.wav")
    assert sound is not None
    assert (sound.rate, sound.channels) == (RATE, 1)
    kept = expected[: round(17 / 8 * RATE)]
    assert np.ptp(kept) > 0.01, "there is something to hear"
    assert np.abs(sound.samples[:, 0] / 32767 - kept).max() < 1e-3
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["audio"]["samples"] == len(sound.samples)


def test_a_distilled_checkpoint_runs_without_guidance(distilled: Path, tmp_path: Path) -> None:
    plan = resolve(request(distilled, output=str(tmp_path / "x.gif")))
    assert plan.model.distilled
    assert (plan.guidance_scale, plan.model.defaults.steps) == (1.0, KANDINSKY_6_LITE.defaults.steps)
    assert generate(distilled, tmp_path / "x.gif").exit_code == 0
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["coverage"]["structured"] == 2 * 2, "a step has one forward"
    pipeline = load(distilled)
    stock = latents_of(pipeline, TINY["kandinsky-6"], guidance_scale=1.0)
    with swapped(pipeline, EXACT):
        torch.testing.assert_close(latents_of(pipeline, TINY["kandinsky-6"], guidance_scale=1.0), stock, **CLOSE)


def test_a_folder_that_is_not_distilled_has_the_settings_of_one_that_is_not(folder: Path) -> None:
    entry, _ = find_model(str(folder))
    assert not entry.distilled
    assert entry.image_pipeline == entry.pipeline
    assert (entry.defaults.steps, entry.defaults.guidance_scale) == (
        KANDINSKY_6_PRO.defaults.steps,
        KANDINSKY_6_PRO.defaults.guidance_scale,
    )


def test_what_it_cannot_make_is_said(folder: Path, distilled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--guidance-scale 5 does not fit k6-distilled: .* the valid scale is 1$"):
        resolve(request(distilled, guidance_scale=5.0))
    with pytest.raises(InputError, match=r"--sampler cannot be set: the noise schedule of k6-distilled"):
        resolve(request(distilled, sampler="euler"))
    with pytest.raises(InputError, match=r"65 frames at --fps 1 do not fit k6: they last 65\.0 seconds, .* reach 47\."):
        resolve(replace(request(folder, fps=1), num_frames=65))
    silent = tmp_path / "silent"
    shutil.copytree(folder, silent)
    index = json.loads((silent / "model_index.json").read_text())
    (silent / "model_index.json").write_text(json.dumps({**index, "vocoder": [None, None]}))
    with pytest.raises(ModelError, match=r"is not a complete model: its model_index.json names no vocoder"):
        find_model(str(silent))
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    config = json.loads((plain / "transformer" / "config.json").read_text())
    config["visual_token_type_num_embeddings"] = 0
    (plain / "transformer" / "config.json").write_text(json.dumps(config))
    first = tmp_path / "first.png"
    image().save(first)
    with pytest.raises(InputError, match=r"plain makes clips from text alone: leave out --image"):
        resolve(request(plain, image=str(first)))
