"""LoRAs in the keys of clips: a file counts by its content, one of the hub by its name."""

from __future__ import annotations

import os
from pathlib import Path

import adapters
import pytest
import torch
from batches import request
from command import call
from safetensors.torch import save_file
from tiny_wan import tiny_transformer

from vmonarch_cli.batch.clips import plan_clips
from vmonarch_cli.batch.lines import Line, Prompts
from vmonarch_cli.clip.make import generate
from vmonarch_cli.clip.whole import is_clip_of
from vmonarch_cli.pipeline.preflight import check_machine_for
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.resolve import resolve

RED = Prompts("p", [Line(1, {"prompt": "red"})], [])


@pytest.fixture(scope="module")
def lora_tensors(tiny_wan_folder: Path) -> dict[str, torch.Tensor]:
    return adapters.weights(tiny_transformer())


def test_a_lora_counts_by_its_content_wherever_it_lies(
    tiny_wan_folder: Path, tmp_path: Path, lora_tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(*loras: str) -> str:
        return plan_clips(request(tiny_wan_folder, tmp_path / "out", loras=loras), RED)[0][0].key

    file, folder = tmp_path / "own.safetensors", tmp_path / "peft"
    save_file(lora_tensors, file)
    first = key(str(file))
    os.utime(file, (1, 1))
    monkeypatch.chdir(tmp_path)
    assert first == key("own.safetensors") == key(f"{file}:1.0")
    folder.mkdir()
    moved = file.rename(folder / "adapter_model.safetensors")
    assert first == key(str(moved)) == key(str(folder)), "as a picture that was moved"
    settings = folder / "adapter_config.json"
    settings.write_text('{"lora_alpha": 8, "r": 4}')
    of_settings = key(str(folder))
    settings.write_text('{"lora_alpha": 2, "r": 4}')
    several = [first, key(), key(f"{file.parent / 'peft'}:0.5"), of_settings, key(str(folder))]
    name = next(name for name in lora_tensors if "lora_B" in name)
    save_file(lora_tensors | {name: lora_tensors[name] + 1}, file)
    assert len({*several, key(str(file)), key(str(file), str(file))}) == 7
    assert key("someone/lora") == key("someone/lora") != key("someone/other"), "of the hub by name"


def test_a_lora_that_changed_makes_clips_anew_and_another_place_does_not(
    tiny_wan_folder: Path, tmp_path: Path, lora_tensors: dict[str, torch.Tensor]
) -> None:
    file, out = tmp_path / "own.safetensors", tmp_path / "out"
    (tmp_path / "p.txt").write_text("red\n")
    save_file(lora_tensors, file)

    def made(lora: Path, *more: str) -> list[bytes]:
        flags = ("--size", "32x32", "--num-frames", "5", "--steps", "1", "--device", "cpu", "-o", str(out), *more)
        batch = ("--prompts-file", str(tmp_path / "p.txt"), "--lora", str(lora))
        call("generate", "-m", str(tiny_wan_folder), *batch, *flags)
        return [clip.read_bytes() for clip in sorted(out.glob("*.mp4"), key=lambda clip: clip.stat().st_mtime_ns)]

    first = made(file)
    assert len(first) == 1
    assert made(file) == made(file.rename(tmp_path / "moved.safetensors")) == first
    save_file({name: tensor * 2 for name, tensor in lora_tensors.items()}, file)
    both = made(file, "--resume")
    assert both[:1] == first
    assert len(set(both)) == 2


def test_a_clip_of_another_lora_is_not_taken_for_that_of_a_plan(
    tiny_wan_folder: Path, tmp_path: Path, lora_tensors: dict[str, torch.Tensor]
) -> None:
    """Under the same name, and with the same settings but for the file's content."""
    file = tmp_path / "own.safetensors"
    save_file(lora_tensors, file)

    def plan() -> Plan:
        asked = request(tiny_wan_folder, tmp_path / "x.mp4", prompt="red", loras=(str(file),), overwrite=True)
        return resolve(asked)

    (made,) = generate(plan(), check_machine_for([plan()]))
    assert is_clip_of(made.path, plan())
    save_file({name: tensor * 2 for name, tensor in lora_tensors.items()}, file)
    assert not is_clip_of(made.path, plan())
