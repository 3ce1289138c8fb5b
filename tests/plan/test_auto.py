"""`--preset auto`: what it chooses where something was measured, why it says so, and what the record keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import call

from vmonarch_cli.plan import auto, small_calls_here


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)


def chosen(*flags: str) -> tuple[str, str]:
    found = json.loads(call("plan", "-p", "red", "--preset", "auto", "--json", *flags).stdout)
    assert found["settings"]["preset"]["origin"] == "flag, auto"
    return found["settings"]["preset"]["value"], found["preset_reason"]


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("832x480 81", "balanced"),  # measured on an H200: 3.45x
        ("832x480 37", "balanced"),  # 1.58x
        ("832x480 17", "dense"),  # balanced 0.71x, fast 0.77x on an H100
        ("1280x720 17", "fast"),  # balanced 0.89x, fast 1.3x
        ("1280x720 37", "balanced"),  # 1.9x
        ("256x256 17", "dense"),  # bound by launches
    ],
)
def test_on_a_card_it_is_what_was_measured_to_gain(shape: str, name: str) -> None:
    size, frames = shape.split()
    found, why = chosen("-m", "wan2.1-1.3b", "--device", "cuda", "--size", size, "--num-frames", frames)
    assert found == name, why
    assert "tokens, 50 steps, cuda" in why


def test_on_a_cpu_and_with_few_steps() -> None:
    assert chosen("--device", "cpu")[0] == "fast"  # the model's own default
    name, why = chosen("--device", "cpu", "--num-frames", "17")
    assert name == "dense"
    assert "2x fewer operations than dense gain time, and fast has 1." in why
    few = chosen("-m", "wan2.1-1.3b", "--device", "cuda", "--size", "1280x720", "--num-frames", "17", "--steps", "4")
    assert few[0] == "fast"  # balanced would cost as much as dense attention then


def test_it_knows_the_card_and_says_where_its_figures_are_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(gpu: str, *flags: str) -> tuple[str, str]:
        for module in (auto, small_calls_here):
            monkeypatch.setattr(module, "device_key", lambda device: gpu)
        return chosen("--device", "cuda", "--num-frames", "193", *flags)

    name, why = on("NVIDIA H200")
    assert (name, "below 17,951 tokens dense attention is faster on this GPU" in why) == ("dense", True)
    wan = ("-m", "wan2.1-1.3b", "--size", "832x480", "--num-frames", "81")
    for gpu, source in (("NVIDIA H200", ""), ("NVIDIA GH200 480GB", ""), ("NVIDIA L40S", ", not on this GPU")):
        assert on(gpu, *wan)[1].endswith(f"x gain time; measured on an H100 and an H200{source}")
    assert chosen("--device", "cpu")[1].endswith("2x gain time; measured on two CPU cores")
    below = chosen("--device", "cpu", "--dense-below", "5000")
    assert below[0] == "dense"
    assert below[1].endswith("--dense-below 5000 has all calls run dense")


def test_more_frames_than_structured_attention_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmonarch_cli.plan.checks.MAX_FRAMES", 4)
    name, why = chosen("--device", "cpu")
    assert (name, "does not take as many frames" in why) == ("dense", True)


def test_changes_of_a_preset_apply_to_what_was_chosen() -> None:
    found = json.loads(
        call("plan", "-p", "x", "--preset", "auto", "--device", "cpu", "--set", "band=1", "--json").stdout
    )
    assert found["settings"]["preset.band"] == {"value": 1, "origin": "flag"}


@pytest.mark.parametrize("command", ["tune -o a.safetensors", "calibrate -o a.toml", "profile clip"])
def test_commands_without_use_for_dense_say_that_auto_took_it(command: str) -> None:
    flags = ("--preset", "auto", "--device", "cpu", "--num-frames", "5", "--size", "32x32")
    (said,) = call(*command.split(), *flags, code=2).stderr.splitlines()[-1:]
    assert said.startswith("error: --preset auto takes dense attention here (32 tokens, 20 steps, ")
    assert said.endswith(": name a structured preset")


@pytest.mark.parametrize("command", ["presets show auto", "profile quality --preset auto"])
def test_where_there_is_no_clip_auto_is_not_called_misspelt(command: str) -> None:
    stderr = call(*command.split(), code=2).stderr
    assert "error: preset auto is chosen for a clip, which is not what is asked for here: shipped are paper" in stderr


def test_header_table_and_record_say_it_and_a_rerun_needs_no_choice() -> None:
    shown = call("generate", "-p", "red", "--preset", "auto", "--size", "32x32", "--num-frames", "5", "--steps", "1")
    assert "tokens, 1 step, " in shown.stdout
    record_file = next(Path("outputs").glob("*.json"))
    record = json.loads(record_file.read_text())
    assert record["settings"]["preset"] == {"value": "dense", "origin": "flag, auto"}
    assert record["preset"]["name"] == "dense"
    assert "tokens" in record["preset_reason"]
    assert "identical" in call("rerun", str(record_file)).stdout
    assert "preset auto" in call("plan", "-p", "red", "--preset", "auto").stdout


def test_lines_and_defaults_may_say_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.jsonl").write_text('{"prompt": "red", "preset": "auto", "num_frames": 5}\n{"prompt": "red"}')
    monkeypatch.setenv("VMONARCH_PRESET", "auto")
    clips = json.loads(call("plan", "--prompts-file", "p.jsonl", "--device", "cpu", "--json").stdout)["clips"]
    assert [clip["settings"]["preset"] for clip in clips] == [
        {"value": "dense", "origin": "prompts file, auto"},
        {"value": "fast", "origin": "VMONARCH_PRESET, auto"},
    ]
