"""What `vmonarch tune` refuses: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.tune import memory


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note")]
    assert lines[-1].startswith("error: "), result.stderr
    return lines[-1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "--output is missing"),
        ("-o a.pt", "--output takes a file that ends in .safetensors, got 'a.pt'"),
        ("-o a.safetensors --preset dense", "preset dense is dense attention, which is the teacher"),
        ("-o a.safetensors --preset exact", "preset exact is exact on 13 latent frames"),
        ("-o a.safetensors --set dense_steps=20", "runs its first 20 steps dense, which are all of 20"),
        ("-o a.safetensors --set dense_layers=8", "runs 8 layers dense, which are all 8 of demo"),
        ("-o a.safetensors --model wan2.1-1.3b", "no prompts to tune wan2.1-1.3b with"),
        ("-o a.safetensors --model allegro", "diffusers loads no LoRA into an AllegroPipeline"),
        ("-o a.safetensors --model ltx-2", "it makes sound in the same forward"),
        ("-o a.safetensors --full --model minimax-h3", "minimax-h3 cannot be tuned: "),
        ("-o a.safetensors --full --model hunyuan-video-1.5", "its guider decides in every step which forwards run"),
        ("-o a.safetensors --resume", "--resume: there is no"),
        ("-o a.safetensors --rank 0", "--rank takes a whole number from 1 to 1024, got 0"),
        ("-o a.safetensors --lr nan", "--lr takes a number from 1e-08 to 1, got nan"),
        ("-o a.safetensors --sampler-steps 0", "--sampler-steps takes a whole number from 1"),
        ("-o a.safetensors --plot a.txt", "--plot takes a file that ends in .png or .svg"),
        ("-o a.safetensors --prompts-file none.txt", "prompts file none.txt does not exist"),
        ("-o a.safetensors a red circle", "words without a flag are not taken"),
    ],
)
def test_a_flag_that_cannot_be_honoured(
    flags: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(*flags.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "flags", "sentence"),
    [
        ("\n", "", "has no prompts"),
        ("qwerty zxcv\na red circle\n", "--eval-prompts 1", "knows no word of the prompt 'qwerty zxcv'"),
        (
            "a red circle\na red circle\n",
            "--eval-prompts 1",
            "leaves no prompt to train with: there is 1 diff",
        ),
    ],
)
def test_prompts_that_cannot_be_used(lines: str, flags: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(lines)
    assert sentence in refused("-o", str(tmp_path / "a.safetensors"), "--prompts-file", str(file), *flags.split())


def test_models_whose_inputs_are_not_of_one_clip_each(tmp_path: Path) -> None:
    prompts, clips = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("a red circle\na blue square\n")
    (clips / "a.png").mkdir(parents=True)
    (clips / "a.txt").write_text("a red circle")
    flags = ["-o", str(tmp_path / "a.safetensors"), "--model", "kandinsky-5", "--device", "cpu", "--eval-prompts", "1"]
    flags += ["--prompts-file", str(prompts)]
    assert "--batch 2: clips of kandinsky-5-lite cannot be put side by side" in refused(*flags, "--batch", "2")
    assert "--videos: kandinsky-5-lite cannot be tuned on clips" in refused(*flags, "--videos", str(clips))


def test_a_line_that_sets_more_than_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red circle", "seed": 3}\n')
    found = refused("-o", str(tmp_path / "a.safetensors"), "--prompts-file", str(file))
    assert "line 1: a line for tuning holds a prompt and nothing else, got seed as well" in found


def test_what_exists_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    file, work = tmp_path / "a.safetensors", tmp_path / "b.tune"
    file.write_bytes(b"mine")
    work.mkdir()
    assert "exists already: pass --overwrite" in refused("-o", str(file))
    assert "pass --resume to go on, or --overwrite to start anew" in refused("-o", str(tmp_path / "b.safetensors"))
    assert file.read_bytes() == b"mine"


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**8, 10**8))
    found = refused("-o", str(tmp_path / "a.safetensors"))
    assert "trajectories take" in found
    assert "95 MiB free" in found
    assert "6 prompts would fit" in found
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_says_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 250 << 20)
    found = refused("-o", str(tmp_path / "a.safetensors"), "--batch", "8")
    assert "too little memory to tune demo at 96x96 with 49 frames and --batch 8" in found
    assert "would fit" in found
    assert list(tmp_path.iterdir()) == []
