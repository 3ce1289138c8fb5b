"""Flags that a family cannot follow: a sentence before anything loads, or an effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import TINY, latents_of

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(name: str, folder: Path) -> Path:
    TINY[name].build().save_pretrained(folder / name, safe_serialization=True)
    return folder / name


def planned(model: str, **flags: Any) -> Any:
    return resolve(GenerateRequest(model=model, prompt="a red circle", **flags))


@pytest.mark.parametrize("name", ["mochi-1", "ltx-video", "ltx-2"])
def test_a_schedule_of_too_few_steps_is_refused_and_the_shortest_one_runs(name: str, tmp_path: Path) -> None:
    folder, tiny = saved(name, tmp_path), TINY[name]
    shape: dict[str, Any] = {"height": tiny.height, "width": tiny.width, "num_frames": tiny.num_frames}
    sentence = rf"--steps 1 does not fit {name}: its noise schedule takes 2 at least"
    for model, sized in ((str(folder), shape), (name, {})):
        with pytest.raises(InputError, match=sentence):
            planned(model, steps=1, **sized)
    assert planned(str(folder), steps=2, **shape).steps == 2
    pipeline = load_pipeline(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert torch.isfinite(latents_of(pipeline, tiny, steps=2)).all()


def test_a_schedule_that_shifts_by_the_number_of_tokens_takes_a_shift_that_is_given(tmp_path: Path) -> None:
    folder, tiny = saved("ltx-video", tmp_path), TINY["ltx-video"]
    assert find_model(str(folder))[0].defaults.flow_shift is None, "its own shift follows from the tokens"
    made = []
    for shift in (None, 2.0, 9.0):
        pipeline = load_pipeline(str(folder), device=torch.device("cpu"), dtype=torch.float32, flow_shift=shift)
        made.append(latents_of(pipeline, tiny, steps=3))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(made[first], made[second], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", ["cogvideox-5b", "allegro"])
def test_a_schedule_without_a_shift_refuses_one(model: str) -> None:
    with pytest.raises(InputError, match=f"--flow-shift cannot be set: the noise schedule of {model} has no shift"):
        planned(model, flow_shift=3.0)


def test_guidance_that_only_the_second_stage_should_have_is_warned_of() -> None:
    (sentence,) = planned("wan2.2-a14b", guidance_scale=1.0, guidance_scale_2=4.0).warnings
    assert "--guidance-scale-2 4 has no effect: with --guidance-scale 1 the pipeline runs without guidance" in sentence
    assert planned("wan2.2-a14b", guidance_scale=4.0, guidance_scale_2=1.0).warnings == ()


def test_a_negative_prompt_that_nothing_reads_is_warned_of() -> None:
    (sentence,) = planned("wan2.1-1.3b", guidance_scale=1.0, negative_prompt="blurry").warnings
    assert "--negative-prompt has no effect: with --guidance-scale 1 there is no guidance" in sentence
    (sentence,) = planned("hunyuan-video", negative_prompt="blurry").warnings
    assert "--negative-prompt has no effect: guidance of hunyuan-video is a number" in sentence
    assert planned("wan2.1-1.3b", negative_prompt="blurry").warnings == ()
    assert planned("wan2.1-1.3b", guidance_scale=1.0).warnings == ()


def test_more_latent_frames_than_structured_attention_takes() -> None:
    with pytest.raises(InputError, match=r"1025 frames are 257 latent frames, and structured attention takes 256 at"):
        planned("wan2.1-1.3b", num_frames=1025)
    assert planned("wan2.1-1.3b", num_frames=1021).grid[0] == 256
    assert planned("wan2.1-1.3b", num_frames=1025, preset="dense").grid[0] == 257
    with pytest.raises(InputError, match=r"129 latent frames, and structured attention of motif-video-2b takes 128 at"):
        planned("motif-video-2b", num_frames=513)
    assert planned("motif-video-2b", num_frames=509).grid[0] == 128, "a decoder block attends two clips at once"
    assert planned("motif-video-2b", num_frames=513, preset="dense").grid[0] == 129
