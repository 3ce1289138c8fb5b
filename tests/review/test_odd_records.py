"""Records are strangers' files: the gallery goes on without an odd one, compare and rerun say one sentence."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record_model import read_record
from vmonarch_cli.media.write import write_clip
from vmonarch_cli.timing import ClipResult

WRONG: tuple[Any, ...] = (
    None, True, 0, -1, 10**40, 1.5, -0.0, 1e308, "", "x", "\u202e\u0007[/red]", "../../etc", "~nosuchuser/x", "1e999",
    "a\nb", "x" * 5000, [], [1], [[]], ["x", None], {}, {"a": 1}, {"value": None}, {"value": {}, "origin": "x"},
)  # fmt: skip
UNREADABLE = {
    "nul": '"\\u0000"',
    "surrogate": '"\\ud800"',
    "nan": "NaN",
    "infinite": "1e999",
    "digits": "9" * 5000,
    "deep": "[" * 20_000 + "]" * 20_000,
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def base(tiny_record: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record beside a small GIF, whose poster costs no decoding."""
    folder = tmp_path_factory.mktemp("base")
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    write_clip(frames, folder / "clip.gif", 8)
    record = {**json.loads(tiny_record.read_text()), "clip": "clip.gif"}
    (folder / "clip.json").write_text(json.dumps(record))
    return folder / "clip.json"


def beside(folder: Path, name: str, base: Path, text: str) -> Path:
    """A record of a name, and the clip beside it."""
    shutil.copy(base.with_suffix(".gif"), folder / f"{name}.gif")
    (folder / f"{name}.json").write_text(text)
    return folder / f"{name}.json"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value can stand in a record: every key, and the first items of lists."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A record with one to three values replaced or missing."""
    changed = copy.deepcopy(record)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *way, last = rng.choice(list(places(changed)))
        inner = changed
        for key in way:
            inner = inner[key]
        if rng.random() < 0.15:
            del inner[last]
        else:
            inner[last] = rng.choice(WRONG)
    return changed


def check(result: Result) -> None:
    """No traceback and nothing unexpected: a result, or one sentence and exit code 2."""
    assert result.exit_code in (0, 1, 2), result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "unexpected" not in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert "\x07" not in result.stderr + result.stdout
    assert len(errors) == (1 if result.exit_code == 2 else 0), result.stderr


@pytest.fixture
def no_model(tiny_record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rerun that comes to its clip gets the recorded one."""

    def generate(plan: Any, machine: Any, **_: Any) -> list[Any]:
        result = ClipResult.__new__(ClipResult)
        for name, value in {"path": plan.outputs[0], "record_path": tiny_record, "record": {}}.items():
            object.__setattr__(result, name, value)
        return [result]

    monkeypatch.setattr("vmonarch_cli.clip.make.generate", generate)


def odd(base: Path, tmp_path: Path, count: int, seed: int) -> None:
    record, rng = json.loads(base.read_text()), random.Random(seed)
    files = [beside(tmp_path, f"r{n}", base, json.dumps(mutated(record, rng))) for n in range(count)]
    beside(tmp_path, "whole", base, json.dumps(record))
    result = call("gallery", str(tmp_path), "--json")
    check(result)
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["clips"] + len(printed["left_out"]) >= count * 0.9  # a clip renamed to another ending is gone
    assert printed["left_out"], "some records are odd"
    for file in files:
        check(call("compare", str(tmp_path / "whole.json"), str(file)))
        check(call("rerun", str(file), "-o", str(tmp_path / "again" / f"{file.stem}.mp4")))


def test_odd_records(base: Path, tmp_path: Path, no_model: None) -> None:
    odd(base, tmp_path, 60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_odd_records(base: Path, tmp_path: Path, no_model: None, seed: int) -> None:
    odd(base, tmp_path, 300, seed)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_records_that_do_not_parse(base: Path, tmp_path: Path, kind: str) -> None:
    text = base.read_text().replace('"fast"', UNREADABLE[kind], 1)
    assert text != base.read_text()
    file = beside(tmp_path, "odd", base, text)
    page = call("gallery", str(tmp_path))
    assert page.exit_code == 0
    assert page.stderr.startswith(f"warning: a clip is left out: record {file} ")
    assert str(file) in (tmp_path / "index.html").read_text(), "the page says so, too"
    for result in (call("compare", str(base), str(file)), call("rerun", str(file))):
        check(result)
        assert result.exit_code == 2
        assert str(file) in result.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda r: r.update(schema=2),
            "was written by a later version of vmonarch (record schema 2, this version reads 1)",
        ),
        (lambda r: r.update(schema="1"), "schema cannot be '1'"),
        (lambda r: r.update(frames={}), "it has no frames.count"),
        (lambda r: r["frames"].update(count=True), "frames.count takes a whole number, got true"),
        (lambda r: r["frames"].update(width=0), "frames.width takes at least 1, got 0"),
        (lambda r: r.update(preset=[1]), "preset takes a table, got a list"),
        (lambda r: r.update(clip="x"), "clip takes the name of a clip (.mp4, .webm, .gif, .webp, .png), got 'x'"),
        (lambda r: r["timing"].update(attention_s="1"), "timing.attention_s takes a number, got '1'"),
        (lambda r: r["versions"].update(torch=2), "versions.torch takes a text, got 2"),
        (
            lambda r: r["settings"].update(steps={"value": {}, "origin": "flag"}),
            "settings.steps.value takes a text, a number, true, false, nothing or a list of these, got a table",
        ),
    ],
)
def test_sentences(base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    record = json.loads(base.read_text())
    change(record)
    file = beside(tmp_path, "odd", base, json.dumps(record))
    for result in (call("compare", str(base), str(file)), call("rerun", str(file))):
        assert result.exit_code == 2
        assert f"error: {file} " in result.stderr
        assert result.stderr.endswith(f"{sentence}\n") or f"{sentence}: update vmonarch\n" in result.stderr
    assert call("gallery", str(tmp_path)).exit_code == 0


def test_rerun_checks_every_setting_before_it_makes_a_clip(base: Path, tmp_path: Path) -> None:
    for name, value, words in (
        ("steps", "3", "steps takes a whole number, got '3'"),
        ("guidance_scale", [1], "guidance_scale takes a number, got a list"),
        ("vae_tiling", None, "vae_tiling takes true or false, got nothing"),
        ("steps", 10**40, "steps"),
        ("height", -16, "height"),
    ):
        record = json.loads(base.read_text())
        record["settings"][name]["value"] = value
        result = call("rerun", str(beside(tmp_path, "odd", base, json.dumps(record))))
        check(result)
        assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"odd.json", "odd.gif"}


def test_what_is_no_regular_file_does_not_hang(base: Path, tmp_path: Path) -> None:
    shutil.copy(base.with_suffix(".gif"), tmp_path / "pipe.gif")
    os.mkfifo(tmp_path / "pipe.json")
    os.mkfifo(tmp_path / "clip.gif")
    shutil.copy(base, tmp_path / "clip.json")
    page = call("gallery", str(tmp_path))
    assert (page.exit_code, "pipe.json is a pipe, not a file" in page.stderr) == (0, True)
    for files in (("clip.json", "clip.json"), ("pipe.json", "clip.json"), ("clip.gif", "clip.gif")):
        result = call("compare", *(str(tmp_path / name) for name in files))
        check(result)
        assert (result.exit_code, "is a pipe, not a file" in result.stderr) == (2, True)


def test_other_json_files_are_nobodys_concern(base: Path, tmp_path: Path) -> None:
    beside(tmp_path, "clip", base, base.read_text())
    (tmp_path / "compare.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    result = call("gallery", str(tmp_path), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["left_out"] == []


def test_a_record_names_what_it_loads(base: Path, tmp_path: Path, no_model: None, tiny_wan_folder: Path) -> None:
    result = call("rerun", str(base), "-o", str(tmp_path / "again.mp4"))
    assert f"note: the record loads the model folder {tiny_wan_folder}\n" in result.stderr
    lora = tmp_path / "style.safetensors"
    block = "transformer.blocks.0.attn1.to_q"
    save_file({f"{block}.lora_A.weight": torch.zeros(4, 32), f"{block}.lora_B.weight": torch.zeros(32, 4)}, lora)
    record = json.loads(base.read_text())
    record["settings"]["loras"]["value"] = [f"{lora}:0.5"]
    result = call("rerun", str(beside(tmp_path, "odd", base, json.dumps(record))))
    assert f"note: the record loads the LoRA file {lora}\n" in result.stderr
    check(result)


def test_a_record_reads_what_make_record_writes(tiny_record: Path) -> None:
    record, written = read_record(tiny_record), json.loads(tiny_record.read_text())
    assert record.frames.model_dump() == written["frames"]
    assert record.timing.attention_s == written["timing"]["attention_s"]
    assert len(record.timing.steps) == 3
    assert record.coverage.calls == written["coverage"]["calls"]
