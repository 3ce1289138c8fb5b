"""What somebody meets who types a command for the first time: sentences that are right and say what is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import call

from vmonarch_cli.text import counted, with_article


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("presets list", "No such command 'list': valid are show, check"),
        ("models lst", "No such command 'lst': valid are show"),
        ("generat", "No such command 'generat'. Did you mean 'generate'?"),
        ("presets show", "Missing argument 'name': Name of a preset, or a .toml file"),
        ("decode", "Missing argument 'files': Files ending in .latents.safetensors, or folders of them"),
        ("decode clip.gif", "clip.gif holds no latents: the files that decode takes end in .latents.safetensors"),
        (
            "calibrate -o c.toml --prompts-file one.txt --device cpu",
            "--eval-prompts 4 leaves no prompt to measure with: there is 1 different prompt, and at least 5 are needed",
        ),
        (
            "tune -o c.safetensors --prompts-file two.txt --eval-prompts 2 --device cpu",
            "--eval-prompts 2 leaves no prompt to train with: there are 2 different prompts, and at least 3 are needed",
        ),
        ("plan -p x -m allegro --lora red.safetensors", "--lora: diffusers loads no LoRA into an AllegroPipeline"),
    ],
)
def test_a_mistake_is_told_with_what_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("a red circle\na red circle\n")
    Path("two.txt").write_text("a red circle\na blue square\n")
    Path("clip.gif").write_bytes(b"GIF89a")
    Path("red.safetensors").write_bytes(b"")
    assert call(*command.split(), code=2).stderr.splitlines()[-1] == f"error: {sentence}"


@pytest.mark.parametrize("command", ["plan", "generate --dry-run"])
def test_flags_of_a_batch_are_told_to_change_nothing_without_one(command: str) -> None:
    flags = ["--no-resume", "--retry-failed", "--overlap", "--prompts-format", "csv"]
    flags += [] if command == "plan" else ["--max-failures", "2"]
    said = call(*command.split(), "-p", "red", *flags).stderr
    for flag in (flag for flag in flags if flag.startswith("--")):
        assert f"warning: {flag} changes nothing without --prompts-file\n" in said
    assert "changes nothing" not in call(*command.split(), "-p", "red").stderr


@pytest.mark.parametrize("model", ["demo", "folder"])
def test_a_revision_of_a_folder_is_told_to_change_nothing(tiny_wan_folder: Path, model: str) -> None:
    source = str(tiny_wan_folder) if model == "folder" else model
    said = call("plan", "-m", source, "-p", "red", "--size", "48x32", "--num-frames", "17", "--revision", "v2").stderr
    assert "warning: --revision v2 changes nothing: the model's weights are in a folder, not in a repository\n" in said
    assert "--revision" not in call("plan", "-m", "wan2.1-1.3b", "-p", "red", "--revision", "v2").stderr


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_a_table_of_another_program_is_told_by_what_is_between_its_columns(
    tmp_path: Path, sign: str, name: str
) -> None:
    file = tmp_path / "p.csv"
    file.write_text(f"Prompt{sign}Seed\na red circle{sign}3\n")
    sentence = f"{file} line 1: has {name} between its columns, and a CSV file has commas here"
    assert call("plan", "--prompts-file", str(file), code=2).stderr == f"error: {sentence}\n"


def test_a_narrow_terminal_shows_the_whole_names_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    shown = call("plan", "-p", "red").stdout
    assert "…" not in shown
    first = "".join(line[1:13].strip() for line in shown.splitlines())
    assert "preset.shared_refresh" in first


def test_one_is_not_many() -> None:
    shown = call("plan", "-p", "a red circle", "--steps", "1", "--preset", "fast", "--dense-steps", "1")
    assert "preset fast runs nothing structured here: its one step is dense, as with --preset dense" in shown.stderr
    assert "this run has 1 step with guidance 4" in " ".join(shown.stdout.split())
    assert (counted(1, "step"), counted(0, "step"), counted(12, "frame")) == ("1 step", "0 steps", "12 frames")


def test_names_of_classes_have_their_article() -> None:
    names = ["WanPipeline", "AllegroPipeline", "LTXPipeline", "HunyuanVideoPipeline", "MochiPipeline", "SkyReelsV2"]
    assert [with_article(name).split()[0] for name in names] == ["a", "an", "an", "a", "a", "a"]
