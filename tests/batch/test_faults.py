"""Everything that is wrong with a prompts file is said at once, with its line, before anything is made."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from batches import batch
from PIL import Image
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app

SHAPE = ["--size", "48x32", "--num-frames", "17", "--steps", "2", "--device", "cpu"]


def faults(model: Path, tmp_path: Path, text: str | bytes, ending: str = "jsonl", *flags: str) -> list[str]:
    """What `generate --prompts-file` says of a file, without its name; nothing is made."""
    file = tmp_path / f"p.{ending}"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    shape = [word for word in SHAPE if "--steps" not in flags or word not in ("--steps", "2")]
    command = ["generate", "-m", str(model), *shape, "-o", str(tmp_path / "out"), "--prompts-file", str(file), *flags]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert not (tmp_path / "out").exists()
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") and "unexpected" not in line for line in lines)
    return [line.removeprefix("error: ").removeprefix(f"{file} ") for line in lines]


def rows(*lines: Any) -> str:
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)


def test_a_bad_line_hides_no_other(tiny_wan_folder: Path, tmp_path: Path) -> None:
    text = rows(
        "{not json",
        {"prompt": "a", "output": "../x"},
        {"prompt": "a", "dense_steps": -3},
        {"prompt": ""},
        {"prompt": "a", "seed": "x", "fps": 0},
        {"prompt": "good"},
    )
    found = faults(tiny_wan_folder, tmp_path, text)
    assert [sentence.split(",")[0][:46] for sentence in found] == [
        "line 1: is not valid JSON: Expecting property ",
        "line 2: output takes a file name without a fol",
        "line 3: dense_steps: field 'dense_steps' takes",
        "line 4: the prompt is empty: say what the clip",
        "line 5: seed takes a whole number",
        "line 5: fps takes a whole number from 1 to 240",
    ]


def test_every_fault_of_one_line_is_said(tiny_wan_folder: Path, tmp_path: Path) -> None:
    line = {"prompt": " ", "output": "a/b", "fps": -3, "seed": -2, "preset": "papre", "preset.band": "wide"}
    found = faults(tiny_wan_folder, tmp_path, rows(line, {"prompt": "fine"}))
    assert all(sentence.startswith("line 1: ") for sentence in found)
    for words in ("the prompt is empty", "output takes", "fps takes", "seed takes", "no preset 'papre'", "preset.band"):
        assert sum(words in sentence for sentence in found) == 1, words


def test_a_picture_that_a_line_gives_is_not_missed_in_its_other_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32)).save("x.png")
    line = {"prompt": "a", "image": "x.png", "guidance_scale": 1000, "flow_shift": 0}
    found = faults(Path("wan2.1-i2v-480p"), tmp_path, rows(line, {**line, "flow_shift": 2}))
    assert found == [
        "lines 1, 2: guidance_scale takes a number from 0 to 100, got 1000",
        "line 1: flow_shift takes a number from 0.01 to 100, got 0",
    ]
    found = faults(Path("wan2.1-i2v-480p"), tmp_path, rows({**line, "image": "y.png"}))
    assert [sentence.split(",")[0] for sentence in found] == ["line 1: there is no image y.png"]


def test_lines_that_are_wrong_in_the_same_way_keep_their_numbers(tiny_wan_folder: Path, tmp_path: Path) -> None:
    found = faults(tiny_wan_folder, tmp_path, rows({"prompt": "a", "fps": 0}, {"prompt": "b", "fps": 0}))
    assert found == ["lines 1, 2: fps takes a whole number from 1 to 240, got 0"]
    found = faults(tiny_wan_folder, tmp_path, rows({"prompt": "a"}, {"prompt": "b"}), "jsonl", "--fps", "0")
    assert found == ["--fps takes a whole number from 1 to 240, got 0"], "the flag's fault, not the lines'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- {prompt: red, seed: 1:30}", "line 1: seed takes a whole number, got 1:30"),
        ("- prompt: red\n  seed: 0x1F", "line 1: seed takes a whole number, got 0x1F"),
        ("- prompt: red\n  seed: 0b11", "line 1: seed takes a whole number, got 0b11"),
        ("- prompt: red\n  seed: 1_000", "line 1: seed takes a whole number, got 1_000"),
        ("- prompt: red\n  seed: " + "0" * 4000, "line 1: seed takes a whole number, got a number of 4000 digits"),
        ("- prompt: red\n  flow_shift: .inf", "line 1: flow_shift takes a number, got .inf"),
        ("- 2024-01-01", "line 1: takes an object with a prompt, or a text, got 2024-01-01"),
        ('- red\n- blue\n- "\\U00110000"', "line 3: is not valid YAML: an escape in it stands for no character"),
        ('- red\n- "\\UFFFFFFFF"', "line 2: is not valid YAML: an escape in it stands for no character"),
        ("- !!binary x", "line 1: takes a text or a number here, got a value with the tag tag:yaml.org,2002:binary"),
    ],
)
def test_numbers_in_yaml_are_decimal(tiny_wan_folder: Path, tmp_path: Path, text: str, expected: str) -> None:
    assert faults(tiny_wan_folder, tmp_path, text, "yaml") == [expected]


def test_a_leading_zero_is_no_octal_number(tiny_wan_folder: Path, tmp_path: Path) -> None:
    text = "- {prompt: red, seed: 042}\n- {prompt: red, seed: 3.0}\n"
    assert [clip.plan.seed for clip in batch(tiny_wan_folder, tmp_path, text, format="yaml").clips] == [42, 3]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_numbers_of_thousands_of_digits(tiny_wan_folder: Path, tmp_path: Path, ending: str) -> None:
    digits = "9" * 5000
    text = f'{{"prompt": "a", "seed": {digits}}}' if ending == "jsonl" else f"prompt,seed\na,{digits}\n"
    (found,) = faults(tiny_wan_folder, tmp_path, text, ending)
    assert "seed takes a whole number, got " in found
    assert len(found) < 150


def test_an_empty_output_is_no_folder(tiny_wan_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "-m", str(tiny_wan_folder), "-o", "", "--prompts-file", "-"], "red\n")
    assert (result.exit_code, result.stderr) == (2, "error: --output takes a folder with --prompts-file, got ''\n")


def test_a_line_sets_fields_of_its_preset(tiny_wan_folder: Path, tmp_path: Path) -> None:
    text = rows(
        {"prompt": "a", "preset": "paper", "preset.band": 1, "preset.warm-start": True},
        {"prompt": "a", "preset": "paper", "preset.num_steps": 3},
    )
    opened = batch(tiny_wan_folder, tmp_path / "a", text, format="jsonl", overrides=("num_steps=1",))
    first, second = (clip.plan for clip in opened.clips)
    assert (first.preset.band, first.preset.warm_start, first.preset.num_steps) == (1, True, 1)
    assert (second.preset.band, second.preset.num_steps) == (None, 1), "the flag beats the line"
    assert (first.origins["preset.band"], second.origins["preset.num_steps"]) == ("prompts file", "flag")
    (found,) = faults(tiny_wan_folder, tmp_path, rows({"prompt": "a", "preset.bnad": 1}))
    assert "there is no setting 'preset.bnad' (did you mean preset.band?)" in found


def test_two_thousand_equal_prompts_are_named_in_little_more_than_they_are_planned(
    tiny_wan_folder: Path, tmp_path: Path
) -> None:
    from batches import request

    from vmonarch_cli.batch.clips import assign_names, plan_clips
    from vmonarch_cli.batch.prompts import parse_prompts

    began = time.process_time()
    clips, _ = plan_clips(request(tiny_wan_folder, tmp_path), parse_prompts(b"red\n" * 2000, "txt", "p"))
    planned = time.process_time()
    named = assign_names(clips, tmp_path, {}, "p", overwrite=False)
    took = time.process_time() - planned
    assert len({clip.path.name for clip in named}) == 2000
    assert took < planned - began, "one name after another, not each from the first"


@pytest.mark.parametrize(("kind", "words"), [("pipe", "is a pipe, not a file"), ("folder", "is a folder, not a file")])
def test_what_is_no_file_is_refused_at_once(kind: str, words: str, tmp_path: Path) -> None:
    """A named pipe would wait for a writer that never comes."""
    source = tmp_path / "prompts.txt"
    os.mkfifo(source) if kind == "pipe" else source.mkdir()
    result = CliRunner().invoke(app, ["plan", "--prompts-file", str(source)])
    assert (result.exit_code, result.stderr) == (2, f"error: prompts file {source} {words}\n")


def test_a_device_is_refused_at_once() -> None:
    result = CliRunner().invoke(app, ["plan", "--prompts-file", "/dev/zero", "--prompts-format", "txt"])
    assert (result.exit_code, result.stderr) == (2, "error: prompts file /dev/zero is a device, not a file\n")


def test_a_warning_of_many_lines_hides_no_other(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a red circle\n" * 30 + "a zebra\n")
    shape = ["--size", "32x32", "--num-frames", "9", "--device", "cpu", "--num-videos", "2"]
    result = CliRunner().invoke(app, ["plan", "-q", *shape, "-o", str(tmp_path / "out"), "--prompts-file", str(file)])
    said = [line.removeprefix("warning: ") for line in result.stderr.splitlines()]
    assert len(said) == 3, "each sentence once, not once for each clip"
    assert said[0].startswith("lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 21 more: the demo model was trained at")
    assert said[-1].startswith("line 31: the demo model was not trained on 'zebra'")
