"""Recipes for distilled models: each comes to the numbers of its source, and flags beat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vmonarch_cli.batch.request import BatchFlags, plan_batch
from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import InputError, InputErrors
from vmonarch_cli.machine.torchrun import Rank
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.recipes import load_recipe, parse_recipe, shipped_recipes
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

LIGHT = (1.0, 0.9375, 0.8333, 0.625)  # 4 steps, shift 5
LTX_2 = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
CAUSVID = (1.0, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14)
EXPECTED: dict[str, tuple[str, str, float, tuple[float, ...] | None, int]] = {
    "fasthunyuan-6step": ("hunyuan-video", "euler", 6.0, (1.0, 0.9884, 0.9714, 0.9444, 0.8947, 0.7727), 0),
    "fastwan2.1-3step": ("wan2.1-1.3b", "lcm", 1.0, (1.0, 0.757, 0.522), 0),
    "hunyuan-video-1.5-lightx2v-4step": ("hunyuan-video-1.5", "euler", 1.0, LIGHT, 0),
    "ltx-2-distilled-8step": ("ltx-2", "euler", 1.0, LTX_2, 0),
    "ltx-video-distilled-7step": ("ltx-video", "euler", 1.0, (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725), 0),
    "wan2.1-causvid-12step": ("wan2.1-14b", "own", 1.0, None, 1),
    "wan2.1-causvid-8step": ("wan2.1-1.3b", "euler", 1.0, CAUSVID, 1),
    "wan2.1-fusionx-10step": ("wan2.1-14b", "own", 1.0, None, 1),
    "wan2.1-i2v-lightx2v-4step": ("wan2.1-i2v-480p", "lcm", 1.0, LIGHT, 1),
    "wan2.1-lightx2v-4step": ("wan2.1-14b", "lcm", 1.0, LIGHT, 1),
    "wan2.2-5b-fastwan-3step": ("wan2.2-5b", "own", 1.0, None, 1),
    "wan2.2-i2v-lightning-4step": ("wan2.2-i2v-a14b", "euler", 1.0, (1.0, 0.9, 0.75, 0.5), 1),
    "wan2.2-lightning-4step": ("wan2.2-a14b", "euler", 1.0, (1.0, 0.9, 0.75, 0.5), 1),
    "wan2.2-lightx2v-4step": ("wan2.2-a14b", "euler", 1.0, LIGHT, 2),
}
"""Recipe -> model, sampler, guidance, noise levels (None: those of the model's own sampler), number of LoRAs."""
OWN_STEPS = {
    "wan2.1-causvid-12step": (12, 7.0),
    "wan2.1-fusionx-10step": (10, 2.0),
    "wan2.2-5b-fastwan-3step": (3, 3.0),
}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "first.png")
    return str(tmp_path / "first.png")


def planned(model: str, recipe: str, picture: str | None = None, **flags: Any) -> Plan:
    image = picture if "i2v" in model else None
    return resolve(GenerateRequest(model=model, prompt="a cat", recipe=recipe, image=image, **flags))


def test_every_shipped_recipe_is_expected_here_and_names_its_sources() -> None:
    assert shipped_recipes() == sorted(EXPECTED)
    for name in EXPECTED:
        recipe = load_recipe(name)
        assert recipe.source
        assert all(url.startswith("https://") for url in recipe.source)
        assert recipe.description.endswith(".")


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_comes_to_the_numbers_of_its_source(name: str, picture: str) -> None:
    model, sampler, guidance, levels, loras = EXPECTED[name]
    plan = planned(model, name, picture)
    assert (plan.sampler, plan.guidance_scale, len(plan.setup.loras)) == (sampler, guidance, loras)
    if levels is not None:
        assert plan.noise_levels == pytest.approx(levels, abs=1e-4)
        assert plan.steps == len(levels)
    else:
        assert (plan.steps, plan.flow_shift) == OWN_STEPS[name]
    assert plan.settings()["recipe"] == {"value": name, "origin": "flag"}
    assert plan.settings()["preset"] == {"value": "balanced", "origin": "recipe"}
    assert plan.settings()["steps"]["origin"] in ("recipe", "flag")
    assert not [sentence for sentence in plan.warnings if "few steps" in sentence]


def test_flags_beat_a_recipe() -> None:
    name = "wan2.1-lightx2v-4step"
    plan = planned("wan2.1-14b", name, steps=6, guidance_scale=2.0, preset="fast", sampler="own")
    assert (plan.steps, plan.guidance_scale, plan.preset.name, plan.sampler) == (6, 2.0, "fast", "own")
    assert plan.settings()["steps"]["origin"] == "flag"
    assert plan.settings()["flow_shift"] == {"value": 5.0, "origin": "recipe"}
    assert planned("wan2.1-14b", name, sigmas=(1.0, 0.5)).noise_levels == (1.0, 0.5)
    assert planned("wan2.1-1.3b", "fastwan2.1-3step", steps=5).steps == 5
    assert planned("wan2.1-1.3b", "fastwan2.1-3step", flow_shift=8.0, steps=3).noise_levels == pytest.approx(
        (1.0, 0.9412, 0.8), abs=1e-4
    )


@pytest.mark.parametrize(
    ("model", "recipe", "sentence"),
    [
        ("ltx-2", "wan2.1-lightx2v-4step", "is for wan, and ltx-2 is of the family ltx-2"),
        ("wan2.2-a14b", "wan2.1-lightx2v-4step", "is for wan models with 1 transformer, and wan2.2-a14b has 2"),
        ("wan2.1-vace-14b", "wan2.1-lightx2v-4step", "is for wan in a WanPipeline, and wan2.1-vace-14b is a WanVACE"),
        ("wan2.1-14b", "wan2.1-lightx2v-4steps", "there is no recipe 'wan2.1-lightx2v-4steps' (did you mean"),
        ("demo", "wan2.1-lightx2v-4step", "the demo model was trained for itself: name a model with --model"),
        ("wan2.1-14b", "nowhere.toml", "recipe file nowhere.toml does not exist"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_sentence(model: str, recipe: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(model, recipe)
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it has no family"),
        ('family = "wam"', "family takes allegro, anyflow"),
        ('family = "wan"\nsteps = 0', "steps takes at least 1, got 0"),
        ('family = "wan"\nsigmas = [0.5, 1.0]', "noise levels that fall"),
        ('family = "wan"\nsampler = "ddim"', "--sampler takes own, unipc"),
        ('family = "wan"\nguidance = 1.0', "guidance"),
        ('family = "wan"\ndescription = "a\\nb"', "description takes one printable line, got 'a\\nb'"),
        ('family = "wan"\nsource = ["a", "b\\u001b"]', "source.1 takes one printable line, got 'b\\\\x1b'"),
        ("family = ", "mine.toml"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, source="mine.toml", stem="mine")
    assert sentence in caught.value.message
    assert "\n" not in caught.value.message


def test_the_command_lists_and_shows_them() -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["recipes"]).stdout
    assert all(name in listed for name in EXPECTED)
    table = json.loads(runner.invoke(app, ["recipes", "--json"]).stdout)
    assert [recipe["name"] for recipe in table["recipes"]] == sorted(EXPECTED)
    shown = runner.invoke(app, ["recipes", "show", "ltx-2-distilled-8step"]).stdout
    assert "0.421875" in shown
    assert "https://github.com/Lightricks/LTX-2" in shown
    one = json.loads(runner.invoke(app, ["recipes", "show", "fasthunyuan-6step", "--json"]).stdout)
    assert (one["steps"], one["flow_shift"]) == (6, 17.0)
    assert runner.invoke(app, ["recipes", "show", "none"]).exit_code == 2


def test_a_line_may_name_a_recipe_without_a_lora(tmp_path: Path) -> None:
    file = tmp_path / "clips.jsonl"
    request = GenerateRequest(model="wan2.1-1.3b", output=str(tmp_path / "out"))
    file.write_text('{"prompt": "a", "recipe": "fastwan2.1-3step"}\n{"prompt": "b"}\n')
    first, second = plan_batch(request, BatchFlags(str(file)), Rank()).clips
    assert (first.plan.noise_levels, first.plan.sampler, second.plan.sampler) == ((1.0, 0.757, 0.522), "lcm", "own")
    file.write_text('{"prompt": "a", "recipe": "wan2.1-causvid-8step"}\n')
    with pytest.raises(InputErrors, match="loads a LoRA, which is the same for all clips of a batch"):
        plan_batch(request, BatchFlags(str(file)), Rank())
