"""Resolution of a request: precedence, origins, counts, and every bad input's sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmonarch_cli.errors import InputError, PresetError, VmonarchError
from vmonarch_cli.models.wan import NEGATIVE_PROMPT
from vmonarch_cli.plan.costs import count_flops
from vmonarch_cli.plan.memory import kept_bytes
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import load_preset


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(**flags: Any) -> Plan:
    return resolve(GenerateRequest(**{"prompt": "a cat", "model": "wan2.1-1.3b", **flags}))


def test_model_defaults_and_their_origins() -> None:
    p = plan()
    assert (p.height, p.width, p.num_frames, p.fps, p.steps) == (480, 832, 81, 16, 50)
    assert (p.grid, p.tokens) == ((21, 30, 52), 32760)
    assert (p.negative_prompt, p.flow_shift, p.seed, p.num_videos) == (NEGATIVE_PROMPT, 3.0, 0, 1)
    assert p.outputs == (Path("outputs/a-cat-s0.mp4"),)
    assert (p.origins["steps"], p.origins["seed"], p.origins["model"]) == ("model default", "default", "flag")
    assert [p.origins[name] for name in ("preset", "preset.band", "preset.impl")] == [
        "model default",
        "preset",
        "default",
    ]
    assert p.preset.name == "balanced"
    assert plan(model="demo").preset.name == "fast"


def test_flags_beat_presets_and_presets_beat_defaults() -> None:
    p = plan(preset="quality", overrides=("band=3",), dense_layers=1, steps=12, negative_prompt="", size="640*352")
    assert (p.preset.band, p.preset.dense_steps, p.preset.dense_layers) == (3, 2, 1), "a fifth of 12 steps"
    assert [p.origins[f"preset.{name}"] for name in ("band", "dense_steps", "dense_layers", "impl")] == [
        "flag",
        "preset",
        "flag",
        "default",
    ]
    assert (p.width, p.height, p.negative_prompt, p.origins["negative_prompt"]) == (640, 352, "", "flag")


def test_a_field_that_few_steps_set_says_so() -> None:
    assert plan(preset="quality", steps=10).preset.dense_steps == 0, "no step of few is dense"
    few = plan(preset="balanced", steps=8, overrides=("first_frame=true",))
    assert few.preset.shared_refresh
    fields = ("shared_refresh", "refresh", "first_turns", "first_frame", "band", "num_steps")
    words = "few steps of the preset"
    assert [few.origins[f"preset.{name}"] for name in fields] == [words, words, words, "flag", "preset", "preset"]
    assert plan(preset="balanced", steps=20).origins["preset.shared_refresh"] == "default"


def test_given_noise_levels_say_when_the_second_transformer_takes_over() -> None:
    """It begins cold: its first step has an iteration and many turns more than the steps beside it."""
    flags = {"model": "wan2.2-a14b", "steps": 6, "preset": "balanced", "guidance_scale": 1.0}
    for takes_over in (1, 4):
        sigmas = tuple([0.99 - 0.01 * i for i in range(takes_over)] + [0.5 - 0.05 * i for i in range(6 - takes_over)])
        units = [row.units for row in plan(**flags, sigmas=sigmas).step_costs]
        assert units[takes_over] == max(units[1:])


def test_one_side_is_enough() -> None:
    p = plan(height=496)
    assert (p.height, p.width, p.origins["height"], p.origins["width"]) == (496, 832, "flag", "model default")


def test_settings_are_json_and_complete() -> None:
    settings = json.loads(json.dumps(plan(preset="fast", seed=5).settings()))
    assert settings["seed"] == {"value": 5, "origin": "flag"}
    assert settings["preset.band"] == {"value": 0, "origin": "preset"}
    assert settings["model"] == {"value": "wan2.1-1.3b", "origin": "flag"}
    assert settings["output"] == {"value": ["outputs/a-cat-s5.mp4"], "origin": "default"}
    flags = set(GenerateRequest.__dataclass_fields__) - {"overrides", "size", "overwrite", "dense_steps", "defaults"}
    assert flags - {"dense_layers", "impl"} <= set(settings)


def test_flops_of_a_clip() -> None:
    p = plan()
    call = 4 * 32760**2 * 128 * 12
    assert p.flops.dense_call == call
    assert p.flops.dense == call * 30 * 50 * 2
    assert 3.7 < p.flops.dense / p.flops.planned < 3.84  # 4 T units against 22, and the L-steps
    assert 5.9 < p.flops.dense / plan(preset="paper").flops.planned < 6.0  # 14
    assert plan(guidance_scale=1.0).flops.dense == call * 30 * 50
    dense = plan(preset="dense").flops
    assert dense.planned == dense.dense
    assert plan(preset="exact").flops.planned == dense.dense


def test_flops_count_dense_steps_layers_and_cold_starts() -> None:
    model = plan().model
    grid = (21, 30, 52)
    cold = count_flops(model, grid, load_preset("fast").model_copy(update={"warm_start": False}), 1, 1)
    warm = count_flops(model, grid, load_preset("fast"), 11, 1)
    assert warm.planned == cold.planned + 10 * 30 * warm.structured_call
    mixed = count_flops(
        model, grid, load_preset("paper").model_copy(update={"dense_steps": 2, "dense_layers": 3}), 5, 2
    )
    assert mixed.planned == 2 * (3 * 27 * mixed.structured_call + (5 * 30 - 3 * 27) * mixed.dense_call)


def test_memory_kept_between_steps() -> None:
    # N * T * heads bytes in e4m3, T padded to 24: 9.4 MB per layer and branch for this model and size.
    factors = 32760 * 24 * 12 * 30 * 2
    assert kept_bytes(plan(preset="fast", overrides=("refresh=0",))) == factors
    assert kept_bytes(plan(preset="balanced")) == factors + 32760 * 12 * (128 + 4) * 30 * 2
    assert kept_bytes(plan(preset="fast")) == factors + 32760 * 12 * (128 + 4) * 30, "shared by both forwards"
    assert kept_bytes(plan(preset="paper")) == kept_bytes(plan(preset="dense")) == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            {"prompt": None},
            'a prompt is missing: say what the clip should show, as in --prompt "a red circle moves from left to right '
            'on a blue background"',
        ),
        (
            {"prompt": " \n"},
            'the prompt is empty: say what the clip should show, as in --prompt "a red circle moves from left to right '
            'on a blue background"',
        ),
        ({"prompt": "a \udcff"}, "the prompt is not valid UTF-8 text"),
        ({"size": "832"}, "--size takes WIDTHxHEIGHT in pixels, as in 832x480, got '832'"),
        ({"size": "ax480"}, "--size takes WIDTHxHEIGHT in pixels, as in 832x480, got 'ax480'"),
        (
            {"size": "832x480", "height": 480},
            "--size and --height say the same thing twice: give --size or the sides",
        ),
        (
            {"size": "832x480", "height": 480, "width": 832},
            "--size and --height and --width say the same thing twice: give --size or the sides",
        ),
        (
            {"seed": 2**63 - 2, "num_videos": 3},
            "--seed takes a whole number from 0 to 9223372036854775805 for 3 clips, which have seeds that follow it, "
            "got 9223372036854775806",
        ),
        (
            {"model": " "},
            "the model is empty: it is a diffusers folder, a hub id or a name that `vmonarch models` lists",
        ),
        (
            {"preset": "atuo"},
            "there is no preset 'atuo' (did you mean auto or fast?): shipped are paper, fast, balanced, quality, "
            "exact, dense, and auto or a path to a .toml file works too",
        ),
        ({"height": 0}, "--height takes a whole number from 1 to 16384, got 0"),
        ({"steps": 0}, "--steps takes a whole number from 1 to 1000, got 0"),
        ({"fps": -3}, "--fps takes a whole number from 1 to 240, got -3"),
        ({"seed": -2}, "--seed takes a whole number from 0 to 9223372036854775807, or -1 for a random one, got -2"),
        ({"num_videos": 0}, "--num-videos takes a whole number from 1 to 1000, got 0"),
        ({"guidance_scale": float("nan")}, "--guidance-scale takes a number from 0 to 100, got nan"),
        ({"flow_shift": 0.0}, "--flow-shift takes a number from 0.01 to 100, got 0"),
        ({"dense_every": -1}, "--dense-every takes a whole number from 0 to 1000, got -1"),
        ({"device": "gpu"}, "--device takes auto, cpu, cuda or cuda:N, got 'gpu'"),
        (
            {"dtype": "float8"},
            "--dtype takes auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16), got 'float8' "
            "(did you mean float32 or float16 or bfloat16?)",
        ),
        (
            {"guidance_scale_2": 3.0},
            "--guidance-scale-2 is for models with two transformers, and wan2.1-1.3b has one",
        ),
        (
            {"num_frames": 82},
            "82 frames do not fit wan2.1-1.3b: the frame count must be a multiple of 4 plus one, "
            "the nearest valid counts are 81 and 85",
        ),
        ({"output": "x.gif", "fps": 60}, "a .gif cannot show 60 frames per second: valid are 1 to 50, or an .mp4"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_2(flags: dict[str, Any], expected: str) -> None:
    with pytest.raises(VmonarchError) as caught:
        plan(**flags)
    assert (caught.value.message, caught.value.exit_code) == (expected, 2)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"overrides": ("band=1", "band=2")}, "--set: field 'band' is given twice"),
        (
            {"overrides": ("dense_steps=1",), "dense_steps": 2},
            "field 'dense_steps' is given twice, by --set and by --dense-steps",
        ),
        ({"dense_layers": -1}, "--dense-layers: field 'dense_layers' takes a whole number from 0 to 1000, got -1"),
        (
            {"impl": "cuda"},
            '--impl: field \'impl\' takes "auto", "reference", "torch" or "triton", got "cuda"',
        ),
    ],
)
def test_overrides_that_clash_or_do_not_validate(flags: dict[str, Any], expected: str) -> None:
    with pytest.raises(PresetError) as caught:
        plan(**flags)
    assert caught.value.message == expected


def test_dtype_names_are_normalised() -> None:
    assert [plan(dtype=name).dtype for name in ("bf16", "FP16", "float32")] == ["bfloat16", "float16", "float32"]


def test_the_second_guidance_scale_is_for_two_transformers() -> None:
    assert plan(model="wan2.2-a14b").guidance_scale_2 == 3.0
    assert plan(model="wan2.2-a14b", guidance_scale_2=2.0).guidance_scale_2 == 2.0


def test_a_local_folder_is_planned_with_its_own_figures(tiny_wan_folder: Path) -> None:
    p = plan(model=str(tiny_wan_folder), size="64x64", num_frames=17, preset="fast")
    assert (p.grid, p.model_source, p.warnings) == ((5, 4, 4), str(tiny_wan_folder), ())


def test_a_plan_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        plan().steps = 3  # type: ignore[misc]


def test_input_errors_are_a_family() -> None:
    with pytest.raises(InputError):
        plan(steps=0)


def test_what_costs_as_much_as_dense_is_said() -> None:
    small = {"size": "32x32", "num_frames": 17, "steps": 20}
    (slow,) = plan(preset="balanced", **small).warnings
    assert slow.startswith("preset balanced costs more than dense attention here, ")
    (dense,) = plan(preset="fast", dense_steps=4, steps=4).warnings
    assert dense == "preset fast runs nothing structured here: all 4 steps are dense, as with --preset dense"
    for quiet in ({"preset": "dense"}, {"preset": "exact"}, {"preset": "quality", "steps": 2}):
        assert plan(**quiet).warnings == ()  # type: ignore[arg-type]


def test_what_runs_dense_because_it_is_small_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"size": "32x32", "num_frames": 17, "steps": 20, "preset": "balanced"}
    assert len(plan(**small).warnings) == 1
    tokens = plan(**small).tokens
    assert plan(**small, dense_below=tokens + 1).warnings == ()
    assert len(plan(**small, dense_below=tokens).warnings) == 1
    assert len(plan(**small, device="cuda").warnings) == 0, "no GPU runs so few tokens structured unless asked to"
    assert len(plan(**small, device="cuda", dense_below=0).warnings) == 1
    assert plan(**{**small, "preset": "quality", "steps": 2}, dense_steps=2, dense_below=tokens + 1).warnings == ()


@pytest.mark.parametrize(("steps", "said"), [(4, 1), (8, 1), (9, 0)])
def test_a_step_cache_in_few_steps_is_warned_of(steps: int, said: int) -> None:
    warnings = plan(preset="fast", cache="first-block", steps=steps).warnings
    assert len(warnings) == said
    assert all(words.startswith(f"--cache first-block leaves out work of {steps} steps") for words in warnings)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            "dense_steps=1.5",
            "takes a whole number from 0 to 1000, or a share of the steps from 0.0",
        ),
        ("step_refresh=[1, 2]", "preset 'fast': field 'step_refresh' has 2 numbers, one for each step, and there are"),
        ("layer_refresh=[1]", "preset 'fast': field 'layer_refresh' has 1 numbers, one for each layer, and there are"),
        ("few_steps={up_to=0}", "field 'few_steps' takes a table of up_to, a whole number from 1 to 1000, and of any"),
    ],
)
def test_schedules_that_do_not_fit_get_one_sentence(overrides: str, expected: str) -> None:
    with pytest.raises(PresetError) as caught:
        plan(preset="fast", overrides=(overrides,))
    assert expected in caught.value.message
