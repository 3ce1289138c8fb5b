"""`vmonarch rerun`: a clip is made again from its record alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapters
import pytest
from PIL import Image
from safetensors.torch import save_file
from tiny_wan import tiny_transformer
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record import plan_again
from vmonarch_cli.clip.record_model import read_record
from vmonarch_cli.untrusted.files import file_sha256

FILES = {
    "own.safetensors": "LoRA own.safetensors",
    "peft/adapter_config.json": "adapter_config.json of LoRA peft/adapter_model.safetensors",
    "film.gif": "video film.gif",
}
"""A file -> what a rerun calls it."""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_rerun_makes_identical_frames(tiny_record: Path, tmp_path: Path) -> None:
    result = call("rerun", str(tiny_record), "-o", str(tmp_path / "again.mp4"))
    assert result.exit_code == 0, result.stderr
    sentence, path = result.stdout.splitlines()
    assert sentence == "identical: every pixel of every frame is as in the record"
    assert path == str(tmp_path / "again.mp4")
    first, again = read_record(tiny_record), read_record(tmp_path / "again.json")
    assert again.frames == first.frames
    assert again.preset.model_dump() == {**first.preset.model_dump(), "impl": "torch"}
    resolved = {"preset.impl": "torch", "dtype": "float32"}
    assert first.device is not None
    assert again.settings_values() == {**first.settings_values(), **resolved, "device": first.device.name}


def test_rerun_says_when_frames_differ_and_what_else_does(tiny_record: Path, tmp_path: Path) -> None:
    record = json.loads(tiny_record.read_text())
    record["frames"]["sha256"] = "0" * 64
    record["versions"]["torch"] = "2.0.0"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(record))
    result = call("rerun", str(changed), "--json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert printed["identical"] is False
    assert [entry["what"] for entry in printed["differing"]] == ["torch"]
    assert Path(printed["path"]) == tmp_path / "changed-rerun.mp4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": {"count": 1}}, "is not the record of a clip: it has no frames.height"),
        ({"frames": {"count": 1, "height": 8, "width": 8, "fps": 8}}, "has no hash of its frames"),
        ({"preset": {"name": "x", "band": "wide"}}, "cannot be repeated"),
        ({"settings": []}, "is not the record of a clip: settings takes a table, got a list"),
        ({"retries": [{"with": "dense attention"}]}, "was made with a fallback (dense attention)"),
    ],
)
def test_rerun_refuses_what_it_cannot_repeat(tiny_record: Path, tmp_path: Path, change: Any, words: str) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps({**json.loads(tiny_record.read_text()), **change}))
    result = call("rerun", str(changed))
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [changed]


def test_every_setting_of_a_record_is_planned_again(tiny_record: Path, tmp_path: Path) -> None:
    plan = plan_again(tiny_record, str(tmp_path / "x.mp4"))
    record = json.loads(tiny_record.read_text())
    assert (plan.seed, plan.guidance_scale, plan.preset.band, plan.prompt) == (7, 3.0, 1, "a red circle")
    assert plan.flops.model_dump() == record["flops"]
    assert set(plan.origins.values()) == {"record"}


def test_rerun_names_files_that_are_others_by_now(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRAs, their settings, pictures and videos; a record of an earlier version has no hashes and no complaint."""
    monkeypatch.chdir(tmp_path)
    tensors = adapters.weights(tiny_transformer())
    save_file(tensors, "own.safetensors")
    Path("peft").mkdir()
    save_file(tensors, "peft/adapter_model.safetensors")
    Path("peft/adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')

    def film(shade: int) -> None:
        frames = [Image.new("RGB", (16, 16), (shade, index, 0)) for index in range(9)]
        frames[0].save("film.gif", save_all=True, append_images=frames[1:], duration=100)

    film(0)
    flags = "--size 32x32 --num-frames 9 --steps 2 --guidance-scale 1 --device cpu --lora own.safetensors --lora peft"
    made = call(
        "generate", "-m", str(tiny_wan_folder), "-p", "red", *flags.split(), "--video", "film.gif", "-o", "x.mp4"
    )
    assert made.exit_code == 0, made.stderr
    record = json.loads(Path("x.json").read_text())
    assert [len(lora["sha256"]) for lora in record["loras"]] == [64, 64]
    assert call("rerun", "x.json", "--overwrite").exit_code == 0

    before = {name: file_sha256(Path(name))[:12] for name in FILES}
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, "own.safetensors")
    Path("peft/adapter_config.json").write_text('{"lora_alpha": 4, "r": 4}')
    film(9)
    words = {name: (before[name], file_sha256(Path(name))[:12]) for name in FILES}
    result = call("rerun", "x.json", "--overwrite", "--json")
    assert result.exit_code == 1, result.stderr
    said = {entry["what"]: (entry["then"], entry["now"]) for entry in json.loads(result.stdout)["differing"]}
    assert said == {FILES[name]: pair for name, pair in words.items()}
    sentence = call("rerun", "x.json", "--overwrite").stdout
    assert "LoRA own.safetensors was {} and is {}".format(*words["own.safetensors"]) in sentence

    earlier = {name: value for name, value in record.items() if name != "given"}
    earlier["loras"] = [{"name": lora["name"], "scale": lora["scale"]} for lora in record["loras"]]
    Path("x.json").write_text(json.dumps(earlier))
    assert "though versions and device are" in call("rerun", "x.json", "--overwrite").stdout
