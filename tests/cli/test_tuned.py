"""`--tuned` in every command: used, named and kept, or refused in one sentence before anything loads."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records
import torch
from adapters import student_of, write, write_whole
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.latents import save_latents
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.models.tuned import fingerprint
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import Preset, at_steps, load_preset

pytestmark = pytest.mark.usefixtures("one_thread")
PAPER, FAST = load_preset("paper"), load_preset("fast")
STEPS, GUIDANCE = 2, 3.0
SHAPE = ("--size", "48x32", "--num-frames", "17", "--steps", str(STEPS), "--guidance-scale", str(GUIDANCE))
MADE_FOR: dict[str, Any] = {"steps": STEPS, "guidance_scale": GUIDANCE, "size": "48x32", "num_frames": 17}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def adapter(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_wan_folder, tmp_path_factory.mktemp("adapter") / "mine.safetensors", PAPER, **MADE_FOR)


@pytest.fixture
def own(tiny_wan_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, that may bring adapters."""
    return Path(shutil.copytree(tiny_wan_folder, tmp_path / "own"))


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def error(*arguments: object) -> str:
    """The one sentence of a refusal; nothing was loaded or written."""
    before = sorted(Path().rglob("*"))
    said = [line for line in call(*arguments, code=2).stderr.splitlines() if not line.startswith("note: ")]
    assert sorted(Path().rglob("*")) == before
    return " ".join(said).removeprefix("error: ")


def flags(model: Path, *more: object, preset: str = "paper") -> list[object]:
    return ["-m", model, "-p", "a red circle", *SHAPE, "--preset", preset, "--device", "cpu", *more]


def generate(model: Path, name: str, *more: object, preset: str = "paper") -> dict[str, Any]:
    call("generate", *flags(model, "-o", name, *more, preset=preset))
    record: dict[str, Any] = json.loads(Path(name).with_suffix(".json").read_text())
    return record


def frames(name: str) -> np.ndarray[Any, Any]:
    return np.stack(list(read_clip(Path(name))))


def change_weights(model: Path) -> None:
    weights = next((model / "transformer").glob("*.safetensors"))
    state = load_file(weights)
    state["blocks.0.attn1.to_q.bias"] += 1
    save_file(state, weights, {"format": "pt"})


def test_a_clip_with_an_adapter_says_so_and_is_made_again(tiny_wan_folder: Path, adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(adapter, tmp_path / "copy.safetensors"))
    plain = generate(tiny_wan_folder, "plain.gif")
    record = generate(tiny_wan_folder, "tuned.gif", "--tuned", copy)
    assert plain["tuned"] is None
    assert plain["settings"]["tuned"] == {"value": None, "origin": "default"}
    assert record["settings"]["tuned"] == {"value": str(copy), "origin": "flag"}
    assert record["tuned"]["preset"] == "paper"
    assert record["warnings"] == []
    assert record["frames"]["sha256"] != plain["frames"]["sha256"]
    again = call("rerun", "tuned.json")
    assert "identical" in again.stdout
    assert f"the record loads the tuned adapter {copy}" in again.stderr
    write(tiny_wan_folder, tmp_path / "other.safetensors", PAPER, seed=3, **MADE_FOR).replace(copy)
    assert "copy.safetensors is another one by now (SHA-256 " in error("rerun", "tuned.json", "-o", "new.gif")
    copy.unlink()
    assert error("rerun", "tuned.json", "-o", "new.gif").endswith(f"adapter {copy} does not exist")
    assert "identical" in call("rerun", "plain.json").stdout


def test_the_header_and_the_plan_name_it(tiny_wan_folder: Path, adapter: Path) -> None:
    words = "made for paper, 2 steps, guidance 3, 48x32, 17 frames, error 0.4 before and 0.25 after tuning"
    made = call("generate", *flags(tiny_wan_folder, "--tuned", adapter, "-o", "x.gif"))
    assert words in " ".join(made.stdout.split())
    plan = ["plan", *flags(tiny_wan_folder, "--tuned", adapter)]
    assert words in " ".join(call(*plan).stdout.split())
    table = json.loads(call(*plan, "--json").stdout)
    assert table["tuned"]["path"] == table["settings"]["tuned"]["value"] == str(adapter)
    assert len(table["tuned"]["sha256"]) == 64


def test_what_a_model_brings_is_used_where_it_fits(own: Path) -> None:
    path = write(own, own / "tuned" / "paper.safetensors", PAPER, **MADE_FOR)

    def planned(*more: object, preset: str = "paper") -> tuple[object, str, str]:
        result = call("plan", *flags(own, *more, "--json", preset=preset))
        chosen = json.loads(result.stdout)["settings"]["tuned"]
        return chosen["value"], chosen["origin"], " ".join(result.stderr.split())

    assert planned() == (str(path), "model default", "")
    assert planned("--tuned", "none") == (None, "flag", "")
    assert planned(preset="fast") == (None, "default", "")
    assert planned(preset="dense") == (None, "default", "")
    assert planned("--set", "band=1")[:2] == (None, "default")
    plan = json.loads(call("plan", *flags(own, "--set", "band=1", "--json")).stdout)
    note = 'the model\'s adapter for paper was made for other fields of it: band is "none" there and 1 here'
    assert plan["tuned_note"] == note
    given = " ".join(call("plan", *flags(own, "--tuned", path, preset="fast"), code=2).stderr.split())
    assert given.endswith("; --preset paper fits it")
    plan = json.loads(call("plan", *flags(own, "--size", "64x32", "--json")).stdout)
    note = "the model's adapter for paper was made for 48x32, and this run has 64x32"
    assert (plan["tuned"], plan["tuned_note"]) == (None, note)
    said = " ".join(call("plan", *flags(own, "--tuned", path, "--size", "64x32")).stderr.split())
    assert f"adapter {path} was made for 48x32, and this run has 64x32: it may correct less" in said


def test_of_several_the_one_for_steps_and_guidance_is_used(own: Path) -> None:
    """Files PRESET-ANYTHING lie beside PRESET; those of another preset, whose name begins so too, do not count."""
    first = write(own, own / "tuned" / "paper.safetensors", PAPER, **MADE_FOR)
    second = write(own, own / "tuned" / "paper-4-steps.safetensors", PAPER, **{**MADE_FOR, "steps": 4})
    write(own, own / "tuned" / "paper-like.safetensors", FAST, **{**MADE_FOR, "preset_name": "paper-like", "steps": 6})

    def planned(*more: object) -> dict[str, Any]:
        result = call("plan", *flags(own, "--json", *more))
        assert result.stderr == ""
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    assert planned()["tuned"]["path"] == str(first)
    assert planned("--steps", 4)["tuned"]["path"] == str(second)
    assert "tuned_note" not in planned("--steps", 4)
    for more, here in (
        (("--steps", 6), "6 steps with guidance 3"),
        (("--guidance-scale", 1), "2 steps with guidance 1"),
    ):
        note = (
            "the model's adapters for paper were made for 4 steps with guidance 3 and 2 steps with guidance 3; "
            f"this run has {here}"
        )
        found = planned(*more)
        assert (found["tuned"], found["tuned_note"]) == (None, note)
        assert f"adapter none: {note}" in " ".join(call("plan", *flags(own, *more)).stdout.split())
    made = call("generate", *flags(own, "--steps", 3, "-o", "x.gif"))
    assert "tuned none: the model's adapters for paper were made for" in " ".join(made.stdout.split())
    assert json.loads(Path("x.json").read_text())["tuned"] is None
    assert "tuned_note" not in planned("--steps", 6, "--tuned", "none")
    shown = " ".join(call("models", "show", own).stdout.split())
    assert "made for paper, 4 steps, guidance 3, 48x32, 17 frames, error 0.4 before and 0.25 after tuning" in shown


@pytest.mark.parametrize(("made", "here"), [(20, 8), (4, 12)])
def test_a_preset_that_few_steps_change_says_so(own: Path, made: int, here: int) -> None:
    preset = at_steps(FAST, made)
    path = write(own, own / "mine.safetensors", preset, **{**MADE_FOR, "steps": made})
    told = error("plan", *flags(own, "--tuned", path, "--steps", here, preset="fast"))
    refresh = "0.6 there and 0.5 here" if made > here else "0.5 there and 0.6 here"
    assert told == (
        f"adapter {path} was tuned with preset fast at {made} steps and cannot run at {here}: up to 10 steps fast "
        f"computes otherwise (refresh is {refresh}); `vmonarch tune --sampler-steps {here}` makes one"
    )


def test_a_clip_of_what_a_model_brings_is_repeated_with_it(own: Path, tmp_path: Path) -> None:
    record = generate(own, "before.gif")
    path = write(own, own / "tuned" / "paper.safetensors", PAPER, **MADE_FOR)
    assert "identical" in call("rerun", "before.json").stdout, "a clip made without it is repeated without it"
    tuned = generate(own, "after.gif")
    assert tuned["tuned"]["path"] == str(path)
    assert tuned["frames"]["sha256"] != record["frames"]["sha256"]
    assert "identical" in call("rerun", "after.json").stdout


def test_an_adapter_that_the_model_brings_by_now_serves_a_record(own: Path, adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(adapter, tmp_path / "copy.safetensors"))
    generate(own, "tuned.gif", "--tuned", copy)
    (own / "tuned").mkdir()
    copy.replace(own / "tuned" / "paper.safetensors")
    assert "identical" in call("rerun", "tuned.json").stdout


def test_weights_that_changed_since_are_said(own: Path, tiny_wan_folder: Path, adapter: Path) -> None:
    (own / "tuned").mkdir()
    shutil.copy(adapter, own / "tuned" / "paper.safetensors")
    change_weights(own)
    result = call("plan", *flags(own, "--json"))
    assert json.loads(result.stdout)["tuned"] is None
    said = " ".join(result.stderr.split())
    assert "the model's adapter for paper is not used: adapter" in said
    assert f"was tuned on other weights: those of {tiny_wan_folder} (fingerprint" in said


def test_saved_latents_know_it(tiny_wan_folder: Path, adapter: Path, tmp_path: Path) -> None:
    """Decoding needs no adapter any more, and the record names it all the same."""
    copy = Path(shutil.copy(adapter, tmp_path / "copy.safetensors"))
    asked = {"model": str(tiny_wan_folder), "prompt": "a", "preset": "paper", "tuned": str(copy), "device": "cpu"}
    shape = {"size": "48x32", "num_frames": 17, "steps": 2, "guidance_scale": 3.0, "output": str(tmp_path / "x.gif")}
    plan = resolve(GenerateRequest(**asked, **shape))  # type: ignore[arg-type]
    grid = torch.randn(1, 4, 5, 4, 6)
    save_latents(tmp_path / "x.latents.safetensors", plan, 0, records.denoised(plan, grid))
    copy.unlink()
    call("decode", tmp_path / "x.latents.safetensors")
    assert json.loads((tmp_path / "x.json").read_text())["tuned"]["path"] == str(copy)


def test_a_model_of_the_hub_is_checked_where_it_is_in_the_cache(
    tiny_wan_folder: Path, own: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_cache import cache_repository
    from huggingface_hub import constants

    change_weights(own)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    for repo, files in (("one/wan", tiny_wan_folder), ("two/wan", own)):
        cache_repository(tmp_path / "home", repo, files)
    call("plan", *flags(Path("one/wan"), "--tuned", adapter))
    assert "was tuned on other weights" in error("plan", *flags(Path("two/wan"), "--tuned", adapter))


def test_without_peft_it_says_what_to_install(own: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    sentence = "needs peft: pip install peft"
    assert error("generate", *flags(own, "--tuned", adapter)) == f"--tuned {sentence}"
    (own / "tuned").mkdir()
    shutil.copy(adapter, own / "tuned" / "paper.safetensors")
    result = call("plan", *flags(own, "--json"))
    assert json.loads(result.stdout)["tuned"] is None
    assert f"the model's adapter for paper is not used: it {sentence}" in " ".join(result.stderr.split())


def test_a_damaged_adapter_of_a_model_is_no_silent_fallback(own: Path) -> None:
    (own / "tuned").mkdir()
    (own / "tuned" / "paper.safetensors").write_bytes(b"nothing")
    sentence = error("generate", *flags(own, "-o", "x.gif"))
    assert sentence.endswith("is not a safetensors file; download it again; --tuned none goes without it")
    call("plan", *flags(own, "--tuned", "none"))
    call("plan", *flags(own, preset="fast"))


def test_what_does_not_fit_is_refused(tiny_wan_folder: Path, tiny_wan_two_stage_folder: Path, adapter: Path) -> None:
    tuned = ("--tuned", adapter)
    for model, preset, more, sentence in (
        (tiny_wan_folder, "fast", (), "was tuned with preset paper and cannot run with fast: warm_start is false"),
        (tiny_wan_folder, "dense", (), 'cannot run with dense: attention is "monarch" there and "dense" here'),
        (tiny_wan_folder, "paper", ("--dense-steps", 1), "dense_steps is 0 there and 1 here"),
        (tiny_wan_two_stage_folder, "paper", (), "was tuned on other weights: those of"),
    ):
        for command in ("generate", "plan"):
            found = error(command, *flags(model, *tuned, *more, preset=preset))
            assert f"adapter {adapter}" in found
            assert sentence in found
    call("plan", *flags(tiny_wan_folder, *tuned, "--impl", "reference"))


def test_a_student_of_the_same_base_may_have_it_where_its_file_says_so(tiny_wan_folder: Path, tmp_path: Path) -> None:
    student = student_of(tiny_wan_folder, tmp_path / "student")
    allowed = {str(student): fingerprint(student)}
    file = write(tiny_wan_folder, tmp_path / "both.safetensors", PAPER, also_for=allowed, **MADE_FOR)
    words = f"was tuned and measured on {tiny_wan_folder}, and says that it may go with {student}, too"
    found = call("generate", *flags(student, "--tuned", file, "-o", "x.gif"))
    assert words in " ".join(found.stderr.split())
    assert words not in " ".join(call("plan", *flags(tiny_wan_folder, "--tuned", file)).stderr.split())
    call("generate", *flags(student, "-o", "without.gif"))
    assert Path("x.gif").read_bytes() != Path("without.gif").read_bytes()
    other = student_of(student, tmp_path / "other")
    assert f", or of {student} ({fingerprint(student)[:12]}), and {other} has" in error(
        "generate", *flags(other, "--tuned", file)
    )


def test_a_family_without_loras_is_refused(adapter: Path, tmp_path: Path) -> None:
    from tiny_families import TINY

    tiny = TINY["allegro"]
    tiny.build().save_pretrained(tmp_path / "allegro", safe_serialization=True)
    size = ("--size", f"{tiny.width}x{tiny.height}", "--num-frames", tiny.num_frames)
    found = error("generate", "-m", tmp_path / "allegro", "-p", "x", *size, "--preset", "paper", "--tuned", adapter)
    assert found == "--tuned: diffusers loads no LoRA into an AllegroPipeline"


def test_bad_files_are_refused_before_anything_loads(tiny_wan_folder: Path, adapter: Path, tmp_path: Path) -> None:
    state = load_file(adapter)
    plain = tmp_path / "plain.safetensors"
    save_file(state, plain)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(adapter.read_bytes()[:-4])
    text = tmp_path / "text.safetensors"
    text.write_text("x" * 100)
    broken = tmp_path / "nan.safetensors"
    state[next(iter(state))][0, 0] = torch.nan
    with safe_open(adapter, framework="pt") as file:
        save_file(state, broken, file.metadata())
    for path, sentence in (
        ("nowhere.safetensors", "does not exist"),
        (tmp_path, "is a folder, not a file"),
        (plain, "does not say what it was tuned for"),
        (cut, "is damaged"),
        (text, "is not a safetensors file"),
        (broken, "has weights that are not finite"),
    ):
        assert sentence in error("generate", *flags(tiny_wan_folder, "--tuned", path, "-o", "x.gif"))


def test_other_steps_and_guidance_are_warned_of(tiny_wan_folder: Path, adapter: Path) -> None:
    more = ("--tuned", adapter, "--steps", 5, "--guidance-scale", 1)
    said = " ".join(call("plan", *flags(tiny_wan_folder, *more)).stderr.split())
    assert "was made for 2 steps and guidance 3, and this run has 5 and 1: it may correct less" in said


def test_lines_of_a_batch_have_their_own(tiny_wan_folder: Path, adapter: Path, tmp_path: Path) -> None:
    fast = write(tiny_wan_folder, tmp_path / "fast.safetensors", FAST, seed=1, **MADE_FOR)
    lines = [
        {"prompt": "a red circle", "output": "a.gif", "preset": "paper", "tuned": str(adapter)},
        {"prompt": "a red circle", "output": "b.gif", "preset": "paper"},
        {"prompt": "a red circle", "output": "c.gif", "preset": "fast", "tuned": str(fast)},
        {"prompt": "a red circle", "output": "d.gif", "preset": "dense"},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    batch = ["generate", "-m", tiny_wan_folder, "--prompts-file", file, *SHAPE, "--device", "cpu", "-o", "clips"]
    call(*batch)
    used = [json.loads(Path(f"clips/{name}.json").read_text())["tuned"] for name in "abcd"]
    assert [entry and entry["preset"] for entry in used] == ["paper", None, "fast", None]
    for name, more in (("a", ("--tuned", adapter)), ("b", ()), ("c", ("--tuned", fast)), ("d", ())):
        generate(tiny_wan_folder, f"{name}-alone.gif", *more, preset={"c": "fast", "d": "dense"}.get(name, "paper"))
        assert np.array_equal(frames(f"{name}-alone.gif"), frames(f"clips/{name}.gif")), name
    assert "4" in call(*batch).stderr, "all are there"
    write(tiny_wan_folder, tmp_path / "new.safetensors", FAST, seed=2, **MADE_FOR).replace(fast)
    found = error("plan", *batch[1:])
    assert "line 3: c.gif is the name of another clip" in found, "another adapter makes it another clip"


def test_a_line_with_a_wrong_one_is_named(tiny_wan_folder: Path, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": "a", "preset": "fast", "tuned": str(adapter)}))
    found = error("plan", "-m", tiny_wan_folder, "--prompts-file", file, *SHAPE, "--device", "cpu")
    assert "line 1: adapter" in found
    assert "cannot run with fast" in found
    file.write_text(json.dumps({"prompt": "a", "preset": "paper", "tuned": str(adapter), "steps": 0}))
    found = error("plan", "-m", tiny_wan_folder, "--prompts-file", file, *SHAPE[:4], "--device", "cpu")
    assert "steps takes a whole number from 1 to 1000" in found
    assert "adapter" not in found.replace(str(adapter), ""), "it is right, whatever is wrong with the steps"


@pytest.mark.parametrize("writer", [write, write_whole])
def test_a_comparison_gives_each_preset_its_own(own: Path, writer: Callable[..., Path]) -> None:
    writer(own, own / "tuned" / "paper.safetensors", PAPER, **MADE_FOR)
    shape = ("-p", "a red circle", *SHAPE, "--device", "cpu")
    call("compare", "-m", own, *shape, "--preset", "paper", "--preset", "fast", "-o", "with")
    call("compare", "-m", own, *shape, "--preset", "paper", "--tuned", "none", "-o", "without")
    records = {name: json.loads(Path(f"with/{name}.json").read_text()) for name in ("dense", "paper", "fast")}
    used = {name: record["tuned"] and record["tuned"]["preset"] for name, record in records.items()}
    assert used == {"dense": None, "paper": "paper", "fast": None}
    plain = {name: json.loads(Path(f"without/{name}.json").read_text()) for name in ("dense", "paper")}
    same = {name: record["frames"]["sha256"] == records[name]["frames"]["sha256"] for name, record in plain.items()}
    assert same == {"dense": True, "paper": False}


@pytest.mark.parametrize("writer", [write, write_whole])
def test_profiles_have_a_row_with_it_and_one_without(
    tiny_wan_folder: Path, tmp_path: Path, writer: Callable[..., Path]
) -> None:
    adapter = writer(tiny_wan_folder, tmp_path / "mine.safetensors", PAPER, **MADE_FOR)
    shape = ("--size", "48x32", "--num-frames", 17, "--steps", 2, "--device", "cpu", "--tuned", adapter)
    call("profile", "quality", "-m", tiny_wan_folder, *shape, "--prompts", 1, "--guidance-scale", 3, "--json", "q.json")
    rows = {row["name"]: row for row in json.loads(Path("q.json").read_text())["quality"]["rows"]}
    assert list(rows)[:2] == ["paper", "paper, tuned"]
    assert rows["paper"]["latent_errors"] != rows["paper, tuned"]["latent_errors"]
    assert rows["exact"]["latent_errors"] == [pytest.approx(0, abs=1e-3)]
    call("profile", "model", "-m", tiny_wan_folder, *shape, "--preset", "paper", "--seconds", 30, "--json", "m.json")
    record = json.loads(Path("m.json").read_text())
    names = [row["name"] for row in record["model"]["rows"]]
    assert names == ["sdpa", "paper", "paper, tuned", "skipped"]
    errors = [row["error"] for row in record["model"]["rows"][1:3]]
    assert errors[0] != errors[1]
    found = error("profile", "model", "--random-weights", "--tuned", adapter, "--device", "cpu")
    assert found == "--tuned needs the weights that an adapter was tuned on: leave out --random-weights"


def test_presets_of_another_name_may_use_it(tiny_wan_folder: Path, adapter: Path, tmp_path: Path) -> None:
    """What a preset computes counts, and not what it is called."""
    fields = {name: value for name, value in PAPER.computed_fields().items() if name != "band"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    assert PAPER.band is None
    call("plan", *flags(tiny_wan_folder, "--tuned", adapter, preset="./mine.toml"))
    assert Preset(name="x").attention == "monarch"
