"""Samplers in the pipelines of all families: the noise levels that were planned are those that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_cache import cache_repository
from loading import load
from tiny_families import PROMPT, TINY, latents_of

from vmonarch_cli.clip.make import ClipMaker
from vmonarch_cli.pipeline.call import call, encode
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.pipeline.samplers import set_schedule
from vmonarch_cli.plan.noise_levels import SAMPLERS
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = (1.0, 0.9, 0.7, 0.4)
FLOWS = ("wan", "wan-two-stage", "skyreels-v2", "hunyuan-video", "hunyuan-video-1.5", "ltx-video", "ltx-2")
FLOWS += ("kandinsky-5", "motif-video")


def planned(folder: Path, name: str, **flags: Any) -> Plan:
    tiny = TINY[name]
    shape = {"height": tiny.height, "width": tiny.width, "num_frames": tiny.num_frames}
    return resolve(GenerateRequest(model=str(folder), prompt=PROMPT, device="cpu", **shape, **flags))


@pytest.mark.parametrize("name", FLOWS)
def test_the_levels_of_the_plan_are_those_that_run(folders: dict[str, Path], name: str) -> None:
    pipeline = load(folders[name])
    own = pipeline.scheduler
    for sampler in SAMPLERS:
        plan, made = planned(folders[name], name, sampler=sampler, sigmas=LEVELS), []
        for seed in (3, 3, 4):
            pipeline.scheduler = own
            set_schedule(pipeline, plan, seed)
            made.append(latents_of(pipeline, TINY[name], steps=4))
            assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*LEVELS, 0.0], abs=2e-6)
        assert torch.isfinite(made[0]).all()
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[0], made[2]) == (sampler not in ("dpm++sde", "lcm"))  # they add noise


@pytest.mark.parametrize("name", ["wan", "wan-two-stage", "skyreels-v2", "hunyuan-video", "hunyuan-video-1.5"])
def test_a_models_own_levels_are_known_before_it_is_loaded(folders: dict[str, Path], name: str) -> None:
    plan, pipeline = planned(folders[name], name, steps=4, flow_shift=5.0), load(folders[name])
    assert plan.noise_levels is not None
    set_schedule(pipeline, plan, 0)
    latents_of(pipeline, TINY[name], steps=4)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*plan.noise_levels, 0.0], abs=2e-3)


@pytest.mark.parametrize("name", TINY)
def test_without_guidance_a_step_is_one_forward(folders: dict[str, Path], name: str) -> None:
    tiny, pipeline = TINY[name], load(folders[name])
    batches: list[int] = []
    for part in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
        if part is not None:
            part.register_forward_pre_hook(
                lambda _, args, kwargs: batches.append(_batch(args, kwargs)), with_kwargs=True
            )
    options = {key: value for key, value in tiny.options.items() if key in ("image", "image_crf", "video", "strength")}
    tokens = tiny.options.get("max_sequence_length", 512)
    given = encode(pipeline, PROMPT, "", 1.0, tokens)
    seeded = torch.Generator("cpu").manual_seed(0)
    shape = (tiny.height, tiny.width, tiny.num_frames)
    call(pipeline, given, shape, num_inference_steps=2, guidance_scale=1.0, generator=seeded, **options)
    assert batches == [1, 1]


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    found = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return int(found.shape[0])


def test_the_record_says_which_levels_ran(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(folders["wan"], "wan", sampler="lcm", sigmas=LEVELS, output=str(tmp_path / "clip.png"))
    maker = ClipMaker(plan, check_machine(plan))
    result = maker.finish(plan, 0, maker.denoise(plan, 0))
    assert result.record["sigmas"] == pytest.approx(list(LEVELS), abs=1e-5)
    assert result.record["settings"]["sampler"] == {"value": "lcm", "origin": "flag"}
    assert result.record["settings"]["sigmas"]["value"] == LEVELS


@pytest.mark.parametrize(
    ("name", "recipe", "steps"),
    [("ltx-2", "ltx-2-distilled-8step", 8), ("hunyuan-video", "fasthunyuan-6step", 6), ("wan", "fastwan2.1-3step", 3)],
)
def test_a_recipe_runs(folders: dict[str, Path], tmp_path: Path, name: str, recipe: str, steps: int) -> None:
    plan = planned(folders[name], name, recipe=recipe, output=str(tmp_path / "clip.png"))
    maker = ClipMaker(plan, check_machine(plan))
    denoised = maker.denoise(plan, 0)
    assert [step.sigma for step in denoised.steps] == pytest.approx(list(plan.noise_levels or ()), abs=1e-5)
    assert len(denoised.steps) == steps
    assert {step.calls for step in denoised.steps} == {TINY[name].layers}  # one forward a step


def test_a_recipe_with_loras_of_two_transformers_runs(
    folders: dict[str, Path], lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's folder has a file for each, told apart by their names."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    inside = tmp_path / "source" / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    inside.mkdir(parents=True)
    for word in ("high", "low"):
        (inside / f"{word}_noise_model.safetensors").write_bytes(lora.read_bytes())
    cache_repository(tmp_path, "lightx2v/Wan2.2-Lightning", tmp_path / "source")
    plan = planned(
        folders["wan-two-stage"], "wan-two-stage", recipe="wan2.2-lightning-4step", output=str(tmp_path / "clip.png")
    )
    maker = ClipMaker(plan, check_machine(plan))
    record = maker.finish(plan, 0, maker.denoise(plan, 0)).record
    assert [(facts["experts"], facts["ranks"]) for facts in record["loras"]] == [
        (("high",), (4, 4)),
        (("low",), (4, 4)),
    ]
    assert record["sigmas"] == pytest.approx([1.0, 0.9, 0.75, 0.5], abs=1e-5)
    assert record["settings"]["recipe"]["value"] == "wan2.2-lightning-4step"
