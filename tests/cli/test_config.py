"""The user's own defaults: two files and variables, their order, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import call


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """The user's file, which is not there; the project's folder is the current one."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("VMONARCH_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    path = tmp_path / "xdg" / "vmonarch" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def settings(*flags: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(call("plan", "-p", "red", "--json", *flags).stdout)["settings"]
    return found


def test_flag_variable_project_user_preset_and_model_in_this_order(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user.write_text("steps = 11\nfps = 11\nseed = 11\nguidance-scale = 2\npreset = 'fast'\n")
    Path("vmonarch.toml").write_text("steps = 12\nfps = 12\nseed = 12\n")
    monkeypatch.setenv("VMONARCH_STEPS", "13")
    monkeypatch.setenv("VMONARCH_FPS", "13")
    found = settings("--steps", "14")
    assert found["steps"] == {"value": 14, "origin": "flag"}
    assert found["fps"] == {"value": 13, "origin": "VMONARCH_FPS"}
    assert found["seed"] == {"value": 12, "origin": "project config"}
    assert found["guidance_scale"] == {"value": 2, "origin": "user config"}
    assert found["preset"] == {"value": "fast", "origin": "user config"}
    assert found["preset.band"]["origin"] == "preset"
    assert found["num_frames"]["origin"] == "model default"


def test_flags_of_0_and_no_beat_the_defaults(user: Path) -> None:
    Path("vmonarch.toml").write_text(
        "seed = 5\nguidance_scale = 3\ndense_every = 2\ndense_below = 5000\ndense_steps = 2\n"
        "fuse = true\ngraphs = true\n"
    )
    flags = ["--seed", "0", "--guidance-scale", "0", "--dense-every", "0", "--dense-below", "0", "--dense-steps", "0"]
    found = settings(*flags, "--no-fuse", "--no-graphs")
    of_numbers = ("seed", "guidance_scale", "dense_every", "dense_below", "preset.dense_steps")
    assert [found[name] for name in of_numbers] == [{"value": 0, "origin": "flag"}] * 5
    assert [found[name] for name in ("fuse", "graphs")] == [{"value": False, "origin": "flag"}] * 2


@pytest.mark.parametrize(("seed", "count"), [("5", 3), ('"random"', 3)])
def test_several_videos_of_a_line_go_on_from_the_seed_of_the_defaults(user: Path, seed: str, count: int) -> None:
    Path("vmonarch.toml").write_text(f"seed = {seed}\n")
    Path("p.txt").write_text("a red circle\n")
    made = call("plan", "-q", "--prompts-file", "p.txt", "--num-videos", str(count), "-o", "out/").stdout.splitlines()
    seeds = [int(path.removesuffix(".mp4").rpartition("-s")[2]) for path in made]
    assert len(set(seeds)) == count
    assert seeds == [5, 6, 7] if seed == "5" else min(seeds) > 100, "drawn from 2**31, each"


def test_a_lora_of_the_defaults_is_not_taken_for_that_of_a_line_s_recipe(user: Path) -> None:
    Path("vmonarch.toml").write_text("lora = ['owner/name']\n")
    Path("p.jsonl").write_text('{"prompt": "red", "recipe": "fastwan2.1-3step"}\n')
    call("plan", "-m", "wan2.1-1.3b", "-q", "--prompts-file", "p.jsonl", "-o", "out/")
    Path("p.jsonl").write_text('{"prompt": "red", "recipe": "wan2.1-causvid-8step"}\n')
    said = call("plan", "-m", "wan2.1-1.3b", "-q", "--prompts-file", "p.jsonl", "-o", "out/", code=2).stderr
    assert "loads a LoRA, which is the same for all clips of a batch: give it as a flag" in said


def test_a_line_of_a_prompts_file_and_a_recipe_beat_the_defaults(user: Path) -> None:
    user.write_text("steps = 11\nseed = 5\nflow_shift = 2.0\n")
    Path("p.jsonl").write_text('{"prompt": "red", "steps": 3}')
    clip = json.loads(call("plan", "--prompts-file", "p.jsonl", "--json").stdout)["clips"][0]
    assert clip["settings"]["steps"] == {"value": 3, "origin": "prompts file"}
    assert clip["settings"]["seed"] == {"value": 5, "origin": "user config"}
    found = settings("-m", "wan2.1-14b", "--recipe", "wan2.1-lightx2v-4step")
    assert found["steps"] == {"value": 4, "origin": "recipe"}
    assert found["flow_shift"]["origin"] == "recipe"
    assert found["seed"] == {"value": 5, "origin": "user config"}


def test_the_record_says_which_place_gave_a_value(user: Path) -> None:
    user.write_text("size = '32x32'\nnum-frames = 5\nsteps = 1\nset = ['band=1', 'num_steps=1']\nseed = 'random'\n")
    call("generate", "-p", "red", "-o", "x.gif", "--set", "band=2")
    record = json.loads(Path("x.json").read_text())["settings"]
    assert record["height"] == {"value": 32, "origin": "user config"}
    assert record["preset.band"] == {"value": 2, "origin": "flag"}
    assert record["seed"]["origin"] == "user config, drawn"
    call("rerun", "x.gif")  # a record needs no defaults
    user.write_text("size = '48x48'\nsteps = 2\n")
    assert "identical" in call("rerun", "x.gif", "--overwrite").stdout


def test_what_says_the_same_thing_twice_is_not_taken_from_a_later_place(user: Path) -> None:
    user.write_text("size = '64x64'\nset = ['dense_steps=2', 'band=1']\nsteps = 9\n")
    found = settings("--height", "32", "--width", "48", "--dense-steps", "1", "--sigmas", "1,0.5")
    assert (found["height"]["value"], found["width"]["value"]) == (32, 48)
    assert found["preset.dense_steps"] == {"value": 1, "origin": "flag"}
    assert found["preset.band"] == {"value": 1, "origin": "user config"}
    assert found["steps"]["value"] == 2


def test_switches_lists_and_shares_of_variables(monkeypatch: pytest.MonkeyPatch, user: Path) -> None:
    user.write_text("vae_tiling = true\ncompile = true\n")
    monkeypatch.setenv("VMONARCH_COMPILE", "0")
    monkeypatch.setenv("VMONARCH_SET", "band=1; num_steps=1")
    monkeypatch.setenv("VMONARCH_DENSE_STEPS", "0.5")
    monkeypatch.setenv("VMONARCH_STEPS", "4")
    monkeypatch.setenv("VMONARCH_SIGMAS", "")
    found = settings()
    assert found["vae_tiling"] == {"value": True, "origin": "user config"}
    assert found["compile"]["value"] is False
    assert found["preset.band"] == {"value": 1, "origin": "VMONARCH_SET"}
    assert found["preset.dense_steps"] == {"value": 2, "origin": "VMONARCH_DENSE_STEPS"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stpes = 3", "{file}: there is no setting 'stpes' (did you mean steps?): valid are model, "),
        ("prompt = 'x'", "{file}: there is no setting 'prompt'"),
        ("steps = '3'", "{file}: steps takes a whole number, got '3'\n"),
        ("steps = 2.5", "{file}: steps takes a whole number, got 2.5\n"),
        ("steps = 0", "{file}: steps takes a whole number from 1 to 1000, got 0\n"),
        ("compile = 1", "{file}: compile takes true or false, got 1\n"),
        ("lora = 'x'", "{file}: lora takes a list, got 'x'\n"),
        ("flow-shift = inf", "{file}: flow-shift takes a finite number, got inf\n"),
        (
            "offload = 'modle'",
            "{file}: offload takes auto, none, model, group or sequential, got 'modle' (did you mean ",
        ),
        ("preset = 'papre'", "{file}: there is no preset 'papre' (did you mean paper?)"),
        ("num-frames = 18", "{file}: 18 frames do not fit demo: "),
        ("audio = false", "{file}: demo makes silent clips: leave out audio, which is for models"),
        ("steps = [", "{file} is not valid TOML"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_what_is_wrong_is_one_sentence_with_its_file(user: Path, text: str, sentence: str, own: bool) -> None:
    file = user if own else Path("vmonarch.toml")
    file.write_text(text)
    stderr = call("plan", "-p", "red", code=2).stderr
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith(f"error: {sentence.format(file=file)}")
    call("models")  # what needs no defaults goes on


def test_a_flag_s_fault_is_not_laid_on_a_default(user: Path) -> None:
    Path("vmonarch.toml").write_text("model = 'wan2.1-1.3b'\nsteps = 4")
    stderr = call("plan", "-p", "red", "--num-frames", "18", code=2).stderr
    assert stderr.startswith("error: 18 frames do not fit wan2.1-1.3b: ")
    Path("vmonarch.toml").write_text("num-frames = 18")
    stderr = call("plan", "-p", "red", "-m", "wan2.1-1.3b", code=2).stderr
    assert stderr.startswith("error: vmonarch.toml: 18 frames do not fit wan2.1-1.3b: ")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("VMONARCH_STEP", "3", "variable VMONARCH_STEP is no setting of vmonarch (did you mean VMONARCH_STEPS"),
        ("VMONARCH_STEPS", "many", "VMONARCH_STEPS takes a whole number, got 'many'\n"),
        ("VMONARCH_STEPS", "0", "VMONARCH_STEPS takes a whole number from 1 to 1000, got 0\n"),
        ("VMONARCH_COMPILE", "perhaps", "VMONARCH_COMPILE takes true or false, got 'perhaps'\n"),
        ("VMONARCH_PRESET", "papre", "VMONARCH_PRESET: there is no preset 'papre' (did you mean paper?)"),
        ("VMONARCH_AUDIO", "no", "demo makes silent clips: leave out VMONARCH_AUDIO, which is for models"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str) -> None:
    monkeypatch.setenv(name, value)
    assert f"error: {sentence}" in call("plan", "-p", "red", code=2).stderr


def test_config_shows_what_counts_and_where_it_is_from(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("config", "path").stdout == f"{user}\n"
    empty = call("config").stdout
    assert "no defaults of your own" in empty
    assert f"{user} (not there)" in empty
    user.write_text("steps = 11\nfps = 11\n")
    Path("vmonarch.toml").write_text("steps = 12\n")
    monkeypatch.setenv("VMONARCH_SEED", "4")
    shown = json.loads(call("config", "--json").stdout)
    assert [(entry["setting"], entry["value"], entry["source"], entry["counts"]) for entry in shown["settings"]] == [
        ("seed", 4, "VMONARCH_SEED", True),
        ("steps", 12, "vmonarch.toml", True),
        ("steps", 11, str(user), False),
        ("fps", 11, str(user), True),
    ]
    assert "beaten by" in call("config").stdout
    monkeypatch.setenv("VMONARCH_CONFIG", "")
    assert "fps" not in call("config").stdout
    assert "which means no file" in call("config", "path", code=2).stderr


def test_config_says_of_each_value_that_is_not_valid_what_is(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `plan` does, which stops at the first; a value that is beaten does no harm, and one that is right has none."""
    user.write_text("steps = 0\nfps = 900\nsize = '830x480'\nguidance_scale = 5\nseed = -7\n")
    Path("vmonarch.toml").write_text("model = 'wan2.1-14b'\npreset = 'papre'\nseed = 7\noffload = 'modle'\n")
    monkeypatch.setenv("VMONARCH_FLOW_SHIFT", "0")
    result = call("config", code=2)
    lines = result.stderr.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["error"] * 6
    for words in (
        "VMONARCH_FLOW_SHIFT takes a number from 0.01 to 100, got 0",
        "vmonarch.toml: there is no preset 'papre' (did you mean paper?)",
        "vmonarch.toml: offload takes auto, none, model, group or sequential, got 'modle'",
        f"{user}: steps takes a whole number from 1 to 1000, got 0",
        f"{user}: fps takes a whole number from 1 to 240, got 900",
        f"{user}: ",
    ):
        assert sum(line.startswith(f"error: {words}") for line in lines) == (3 if words.endswith(": ") else 1), words
    assert any("830x480" in line and "valid" in line for line in lines)
    shown = result.stdout
    assert shown.count("not valid") == 6
    assert "beaten by" in shown
    printed = json.loads(call("config", "--json", code=2).stdout)["settings"]
    wrong = {entry["setting"]: entry["problem"] for entry in printed if entry["problem"]}
    assert set(wrong) == {"steps", "fps", "size", "preset", "offload", "flow-shift"}
    assert {f"error: {sentence}" for sentence in wrong.values()} == set(lines)
    call("plan", "-p", "red", code=2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model = 'wann'\nguidance-scale-2 = 3", "vmonarch.toml: there is no model 'wann'"),
        ("recipe = 'nope'\nsteps = 4", "vmonarch.toml: there is no recipe 'nope'"),
        ("size = '64x64'\nheight = 64", "vmonarch.toml: size and height say the same thing twice"),
        ("size = '64x64'\nwidth = 64", "vmonarch.toml: size and width say the same thing twice"),
        ("tuned = 'none.safetensors'\npreset = 'paper'", "vmonarch.toml: adapter none.safetensors does not exist"),
        ("guidance-scale-2 = 3", "vmonarch.toml: guidance-scale-2 is for models with two transformers, and demo has"),
    ],
)
def test_config_judges_values_by_the_model_and_by_each_other(user: Path, text: str, sentence: str) -> None:
    Path("vmonarch.toml").write_text(text)
    (line,) = call("config", code=2).stderr.splitlines()
    assert line.startswith(f"error: {sentence}")
    refused = call("plan", "-p", "red", code=2).stderr.removeprefix("error: ").strip()
    assert line == f"error: {refused}"


@pytest.mark.parametrize(
    "text",
    [
        "model = 'wan2.1-i2v-480p'\nsize = '832x480'\nsteps = 30",  # a picture comes with each clip
        "recipe = 'wan2.1-lightx2v-4step'\nmodel = 'wan2.1-14b'\nsteps = 0",  # the recipe's steps count
        "preset = 'paper'\nset = ['band=1']\nfuse = true\nimpl = 'torch'",
    ],
)
def test_config_finds_nothing_wrong_with_what_is_valid(user: Path, text: str) -> None:
    Path("vmonarch.toml").write_text(text)
    result = call("config")
    assert "not valid" not in result.stdout + result.stderr


def test_a_comparison_takes_the_preset_and_the_model_of_the_defaults(user: Path) -> None:
    user.write_text("preset = 'fast'\nset = ['band=1']\nsize = '32x32'\nnum_frames = 5\nsteps = 1\n")
    call("compare", "-p", "red", "-o", "c/", "-q")
    assert {path.name for path in Path("c").glob("*.json")} == {"compare.json", "dense.json", "fast.json"}
    origins = json.loads(Path("c/fast.json").read_text())["settings"]
    assert origins["preset.band"] == {"value": 1, "origin": "user config"}
    assert "changes nothing" not in Path("c/dense.json").read_text()
