"""What is wrong on every machine is said before what is wrong with this one: with a device that no machine has."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app

SMALL = "--size 48x32 --num-frames 17"


def call(command: str, device: str) -> Result:
    return CliRunner().invoke(app, [*shlex.split(command), "--device", device])


def refused(command: str, sentence: str) -> None:
    """Assert that a command is refused with a sentence, and not for a device that is not there."""
    result = call(command, "cuda:99")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "cuda:99" not in result.stderr


@pytest.fixture(autouse=True)
def folder(tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\na dog\na cow\n")
    Path("tiny").symlink_to(tiny_wan_folder)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("kernel --shape 3", "--shape takes latent frames x positions"),
        ("kernel --preset dense", "is dense attention, which is measured anyway"),
        ("kernel --inputs x", "--inputs takes video or random"),
        ("kernel --fail-below -1", "--fail-below takes a number"),
        ("kernel --plot a.txt", "--plot takes a file"),
        ("model -m cogvideox-5b --random-weights --fuse", "the blocks of a CogVideoXPipeline have no fused form"),
        ("model -m cogvideox-5b --random-weights --flow-shift 3", "--flow-shift cannot be set"),
        ("model -m wan2.1-1.3b --random-weights --num-frames 1201", "takes 256 at most: choose fewer frames\n"),
        ("model -m tiny --prompt ' '", "the prompt is empty"),
        ("model -m tiny --prompt ''", "the prompt is empty"),
        ("model -m tiny --quantize nope", "--quantize takes fp8 or int8"),
        ("model -m tiny --layers 1", "--layers leaves out layers of random weights"),
        ("quality -m tiny --prompt ''", "the prompt is empty"),
        ("quality -m wan2.1-1.3b --num-frames 1201", "takes 256 at most: choose fewer frames\n"),
        ("quality -m tiny --preset nope", "there is no preset 'nope'"),
        ("quality -m tiny --prompts 1000", "--prompts takes at most"),
        ("clip -m cogvideox-5b --fuse", "the blocks of a CogVideoXPipeline have no fused form"),
        ("clip -m tiny --preset dense", "preset dense is dense attention, which is measured anyway"),
        ("clip -m tiny --ending .avi", "--ending takes .mp4"),
        ("clip -m wan2.1-1.3b --num-frames 1201", "takes 256 at most: choose fewer frames\n"),
    ],
)
def test_a_profile_says_first_what_no_machine_can_do(command: str, sentence: str) -> None:
    refused(f"profile {command}", sentence)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("tune -o x.safetensors --set dense_layers=99", "layers dense"),
        ("tune -o x.safetensors --eval-prompts 9", "prompts"),
        ("tune -o x.safetensors --eval-prompts 1 --plot a.txt", "--plot takes a file"),
        ("calibrate -o x.toml --budget 1e5", "is not below dense attention"),
        ("calibrate -o x.toml --eval-prompts 9", "prompt"),
    ],
)
def test_so_do_tune_and_calibrate(command: str, sentence: str) -> None:
    refused(f"{command} -m tiny --prompts-file p.txt {SMALL}", sentence)


def test_tuning_goes_on_with_the_flags_of_its_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: object) -> None:
        raise OSError("the disk is gone")

    flags = f"-m tiny --prompts-file p.txt --eval-prompts 1 {SMALL} --preset paper --steps 2 -o x.safetensors"
    with monkeypatch.context() as patch:  # the work folder is there, and no more
        patch.setattr("vmonarch_cli.tune.run._Run.__init__", stop)
        assert call(f"tune {flags}", "cpu").exit_code == 1
    assert json.loads(Path("x.tune/settings.json").read_text())["seed"] == 0
    other = call(f"tune {flags} --resume --seed 1", "cuda:99")
    assert "--resume: x.tune was begun with seed 0, and now it is 1" in other.stderr
    assert "device 'cuda:99' cannot be used" in call(f"tune {flags} --resume", "cuda:99").stderr
