"""The commands as a user sees them: sentences, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from typer.testing import CliRunner, Result

from vmonarch_cli import __version__
from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.events import ClipStarted, StepDone
from vmonarch_cli.errors import NonFiniteError
from vmonarch_cli.pipeline import preflight
from vmonarch_cli.presets import shipped_names

WAN = ("-m", "wan2.1-1.3b", "-p", "a cat")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` without a model; the memory of this machine does not matter."""
    import vmonarch_cli.clip.make

    monkeypatch.setattr(vmonarch_cli.clip.make, "generate", fakes.generate)
    monkeypatch.setattr(preflight, "check_cpu_memory", lambda plan, dtype: None)


def error(result: Result) -> str:
    """The one line on stderr of a call that failed before anything was written."""
    assert result.exit_code == 2
    assert list(Path.cwd().iterdir()) == []
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


# Help, versions and lists


HEAVY = ("torch", "diffusers", "transformers", "triton", "numpy", "imageio", "PIL", "huggingface_hub", "matplotlib")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["compare", "--help"], ["presets"], ["models"]]
)
def test_what_should_be_quick_imports_nothing_heavy(arguments: list[str]) -> None:
    """What is slow about a start is what it imports."""
    code = (
        "import sys\n"
        "from vmonarch_cli.cli.app import app\n"
        f"try:\n    app({arguments!r})\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_of_generate_lists_its_flags() -> None:
    assert "--num-inference-steps" in call("generate", "--help").stdout


@pytest.mark.parametrize(
    "module",
    [
        "plan.resolve",
        "presets",
        "cli.report",
        "cli.plan_tables",
        "cli.progress",
        "media.paths",
        "timing",
        "clip.events",
        "media.write",
        "models.registry",
    ],
)
def test_modules_of_the_plan_import_no_torch(module: str) -> None:
    code = f"import sys, vmonarch_cli.{module}; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 0
    for name in ("generate", "models", "presets"):
        assert name in result.stdout


def test_version() -> None:
    assert (call("--version").stdout, call("--version").exit_code) == (f"vmonarch {__version__}\n", 0)


def test_presets_are_listed_and_shown() -> None:
    listed = call("presets").stdout
    assert all(name in listed for name in shipped_names())
    shown = call("presets", "show", "balanced")
    assert shown.exit_code == 0
    for words in ("band", "latent frames", "num_steps", "iterations", "c_floor"):
        assert words in shown.stdout


def test_presets_check(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("band = 1\n")
    bad.write_text("band = 1.5\n")
    assert call("presets", "check", str(good)).stdout == f"{good} is valid: preset 'good'\n"
    result = call("presets", "check", str(bad))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {bad}: field 'band' takes a whole number from 0 to 4096, or \"none\", got 1.5\n"


def test_presets_check_knows_the_shipped_ones() -> None:
    assert call("presets", "check", "paper").stdout == "paper is valid: preset 'paper'\n"


def test_models_are_listed() -> None:
    listed = call("models").stdout
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in listed
    assert listed.startswith("attention: of one layer's call")
    found = json.loads(call("models", "--json").stdout)["models"]
    wan = next(model for model in found if model["alias"] == "wan2.1-1.3b")
    assert (wan["hub_id"], wan["tokens"], wan["defaults"]["steps"]) == ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 32760, 50)


def test_a_pipe_gets_whole_tables() -> None:
    """What is not for a screen is not cut for one, unless COLUMNS asks for it."""
    command = [sys.executable, "-m", "vmonarch_cli", "presets"]
    free = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    plain = subprocess.run(command, capture_output=True, text=True, check=True, env=free).stdout
    assert max(map(len, plain.splitlines())) > 120
    assert len([line for line in plain.splitlines() if line.strip()]) == 2 + len(shipped_names())
    narrow = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "60"})
    assert max(map(len, narrow.stdout.splitlines())) <= 60


def test_completion_is_offered() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmonarch_cli"],
        env={**os.environ, "_VMONARCH_COMPLETE": "complete_bash", "COMP_WORDS": "vmonarch ge", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["generate"]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("generate",),
            'error: a prompt is missing: say what the clip should show, as in --prompt "a red circle moves from left '
            'to right on a blue background"',
        ),
        (
            ("generate", "a red star"),
            "error: words without a flag are not taken, got 'a red star': a prompt goes after --prompt, as in "
            "--prompt 'a red star'",
        ),
        (
            ("plan", "a", "star"),
            "error: words without a flag are not taken, got 'a star': a prompt goes after --prompt, as in "
            "--prompt 'a star'",
        ),
        (
            ("profile", "clip", "a", "star"),
            "error: words without a flag are not taken, got 'a star': a prompt goes after --prompt, as in "
            "--prompt 'a star'",
        ),
        (
            ("tune", "-o", "a.safetensors", "a", "star"),
            "error: words without a flag are not taken, got 'a star': valid are flags, which --help lists",
        ),
        (
            ("doctor", "now"),
            "error: words without a flag are not taken, got 'now': valid are flags, which --help lists",
        ),
        (("rerun", "a.json", "b.json"), "error: 'b.json' is too much: vmonarch rerun takes RECORD, and flags"),
        (
            ("presets", "check", "papre"),
            "error: there is no preset 'papre' (did you mean paper?): shipped are "
            "paper, fast, balanced, quality, exact, dense, and a path to a .toml file works too",
        ),
        (("generate", "--steps", "many"), "error: --steps takes a whole number, got 'many'"),
        (("generate", "--guidance-scale", "x"), "error: --guidance-scale takes a number, got 'x'"),
        (
            ("generate", *WAN, "--size", "830x480"),
            "error: size 830x480 does not fit wan2.1-1.3b: width and height must be "
            "multiples of 16 pixels, the nearest valid sizes are 832x480 and 816x480",
        ),
        (
            ("generate", *WAN, "--preset", "papre"),
            "error: there is no preset 'papre' (did you mean paper?): shipped are "
            "paper, fast, balanced, quality, exact, dense, and auto or a path to a .toml file works too",
        ),
        (
            ("generate", *WAN, "--set", "band"),
            "error: --set: 'band' is not of the form field=value; fields are attention, "
            "num_steps, warm_start, c_floor, first_frame, band, refresh, shared_refresh, first_turns, step_refresh, "
            "layer_refresh, dense_steps, dense_layers, few_steps, impl",
        ),
        (
            ("generate", *WAN, "-o", "/proc/x/y.mp4"),
            "error: output folder /proc/x cannot be written (No such file or directory): choose another --output",
        ),
    ],
)
def test_one_sentence_and_exit_2(arguments: tuple[str, ...], expected: str) -> None:
    assert error(call(*arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "start", "words"),
    [
        (("genrate",), "error: No such command 'genrate'. ", "'generate'"),
        (("generate", "--stepz", "3"), "error: No such option", "--steps"),
        (("presets", "show"), "error: Missing argument ", "name"),
    ],
)
def test_usage_errors_are_one_sentence_too(arguments: tuple[str, ...], start: str, words: str) -> None:
    """Their wording is typer's and varies with its version; the form does not."""
    message = error(call(*arguments))
    assert message.startswith(start)
    assert words in message.lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(fake_run: None) -> None:
    assert error(call("generate", *WAN, "--device", "cuda")).startswith("error: device 'cuda' cannot be used: ")


def test_an_implementation_that_cannot_run_says_why(fake_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = error(call("generate", *WAN, "--impl", "triton", "--device", "cpu"))
    assert "triton" in message


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 10 * 2**30)
    assert error(call("generate", "-m", "wan2.1-14b", "-p", "a cat", "--device", "cpu")) == (
        "error: too little memory: wan2.1-14b at 1280x720 with 81 frames in float32 needs at least 86.0 GiB and 10.0 "
        "GiB are free: choose a smaller model or size, or a narrower --dtype"
    )


def test_errors_as_json() -> None:
    result = call("generate", *WAN, "--steps", "0", "--json")
    assert result.exit_code == 2
    sentence = "--steps takes a whole number from 1 to 1000, got 0"
    assert json.loads(result.stdout) == {"error": sentence, "exit_code": 2}


def test_debug_shows_the_traceback() -> None:
    result = call("generate", *WAN, "--steps", "0", "--debug")
    assert type(result.exception).__name__ == "InputError"


# Runs


def test_a_run_prints_tables_and_the_path_last(fake_run: None) -> None:
    result = call("generate", *WAN, "--steps", "4", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "outputs/a-cat-s0.mp4"
    for words in ("Wan2.1-T2V-1.3B", "median", "end to end", "coverage", "first call"):
        assert words in result.stdout
    assert result.stderr == "loading the model\ndenoising (4 steps)\ndenoising: compiling kernels, once\ndecoding\n"


def test_quiet_prints_only_paths(fake_run: None) -> None:
    result = call("generate", *WAN, "--steps", "4", "--device", "cpu", "--quiet", "--num-videos", "2")
    assert (result.stdout, result.stderr) == ("outputs/a-cat-s0.mp4\noutputs/a-cat-s1.mp4\n", "")


def test_json_is_one_object(fake_run: None) -> None:
    result = call("generate", *WAN, "--steps", "4", "--device", "cpu", "--json", "--num-videos", "2")
    record = json.loads(result.stdout)
    assert [clip["path"] for clip in record["clips"]] == ["outputs/a-cat-s0.mp4", "outputs/a-cat-s1.mp4"]
    assert record["settings"]["steps"] == {"value": 4, "origin": "flag"}
    assert result.stderr == ""


def test_dry_run_writes_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("generate", *WAN, "--dry-run", "--preset", "balanced", "--set", "band=2", "--num-videos", "2")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "preset.band 2 flag",
        "preset.warm_start true preset",
        "height 480 model default",
        "seed 0 default",
        "grid 21 x 30 x 52 = 32,760 tokens (latent frames x rows x columns)",
        "file outputs/a-cat-s0.mp4",
        "file outputs/a-cat-s1.mp4",
    ):
        assert line in lines
    assert list(Path.cwd().iterdir()) == []
    as_json = json.loads(call("generate", *WAN, "--dry-run", "--json").stdout)
    assert (as_json["dry_run"], as_json["grid"], as_json["outputs"]) == (True, [21, 30, 52], ["outputs/a-cat-s0.mp4"])


def test_a_clip_that_fails_exits_1(fake_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NonFiniteError("latents stopped being finite in step 3 of 4, and no clip was written")

    monkeypatch.setattr("vmonarch_cli.clip.make.generate", fail)
    result = call("generate", *WAN, "--device", "cpu", "--quiet")
    assert result.exit_code == 1
    assert result.stderr == "error: latents stopped being finite in step 3 of 4, and no clip was written\n"


def test_an_unexpected_error_is_one_sentence_too(fake_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not match\nand a page of detail")

    monkeypatch.setattr("vmonarch_cli.clip.make.generate", fail)
    result = call("generate", *WAN, "--device", "cpu", "--quiet")
    assert result.exit_code == 1
    assert result.stderr == "error: unexpected RuntimeError: shapes do not match (--debug shows where)\n"


def test_interrupt_exits_130_with_one_line(fake_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vmonarch_cli.clip.make.generate", interrupt)
    result = call("generate", *WAN, "--device", "cpu", "--quiet")
    assert (result.exit_code, result.stderr) == (130, "interrupted: no clip was left half-written\n")


def test_an_interrupted_run_shows_the_steps_that_it_made(fake_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(plan: Any, machine: Any, *, on_event: Any, **_: Any) -> None:
        on_event(ClipStarted(0, 1, 0, 4))
        for step in fakes.steps(4)[:2]:
            on_event(StepDone(0, step))
        raise KeyboardInterrupt

    monkeypatch.setattr("vmonarch_cli.clip.make.generate", interrupt)
    result = call("generate", *WAN, "--device", "cpu", "--steps", "4")
    rows = [line.split()[:2] for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert (result.exit_code, rows) == (130, [["1", "d"], ["2", "p"]])


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m vmonarch_cli presets show fast | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


RUN_FAKE = """
import sys
sys.path.insert(0, {support!r})
import fakes, vmonarch_cli.clip.make
from vmonarch_cli.pipeline import preflight
vmonarch_cli.clip.make.generate = fakes.generate_and_touch
preflight.check_cpu_memory = lambda plan, dtype: None
from vmonarch_cli.cli.app import app
app({arguments!r})
"""


def run_fake(*arguments: str, stdout: Any = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`generate` in a process of its own, without a model; each clip is an empty file."""
    code = RUN_FAKE.format(support=str(Path(fakes.__file__).parent), arguments=list(arguments))
    given = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, env=given, check=False, timeout=120
    )


THREE = ("generate", *WAN, "--steps", "4", "--device", "cpu", "--num-videos", "3")


def test_a_reader_that_leaves_costs_no_clip() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_fake(*THREE, "-o", "clips/", stdout=writer)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert b"rror" not in done.stderr
    assert len(list(Path("clips").glob("*.mp4"))) == 3


def test_a_stdout_that_is_not_utf8_costs_no_clip() -> None:
    done = run_fake(*THREE, "-o", "猫/", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    paths = done.stdout.splitlines()[-3:]
    assert all(Path(os.fsdecode(path)).is_file() for path in paths)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["plan", *WAN, "--json"], ["models"]])
def test_every_text_comes_out_where_stdout_is_not_utf8(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vmonarch_cli", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


@pytest.mark.parametrize("module", ["rich.console", "vmonarch_cli.plan.resolve", "torch"])
def test_an_interrupt_during_an_import_ends_in_one_line(module: str) -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            sys.meta_path.remove(self)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        f"sys.argv = ['vmonarch', 'generate', *{WAN!r}, '--device', 'cpu']\n"
        "from vmonarch_cli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted: no clip was left half-written\n")


# The demo model is what a run without --model uses


@pytest.fixture
def demo_weights(tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any weights in the demo's place: what is tested here is what is said about them."""
    monkeypatch.setattr("vmonarch_cli.models.registry.WEIGHTS", tiny_wan_folder)


def test_the_demo_model_is_named_in_one_line(demo_weights: None) -> None:
    result = call("generate", "-p", "a red circle moves from left to right", "--dry-run")
    assert result.exit_code == 0
    assert result.stderr == (
        "note: no --model given: using the small demo model that comes with vmonarch; "
        "--model wan2.1-1.3b downloads a real one, about 29 GB\n"
    )
    assert "demo" in result.stdout
    assert call("generate", "-p", "a red circle", "-m", "demo", "--dry-run").stderr == ""


def test_words_that_the_demo_does_not_know_are_named(demo_weights: None) -> None:
    result = call("generate", "-p", "a red dragon juggles", "-m", "demo", "--dry-run", "--size", "64x64")
    assert result.stderr == (
        "warning: the demo model was not trained on 'dragon', 'juggles': those words will not show in the clip\n"
        "warning: the demo model was trained at 96x96 and 128x128 with 17 to 193 frames: 64x64 with 49 will look "
        "worse\n"
    )


@pytest.mark.parametrize(
    ("shape", "fits"),
    [("96x96 193", True), ("128x128 17", True), ("96x96 13", False), ("96x96 197", False), ("96x128 49", False)],
)
def test_lengths_and_sizes_that_the_demo_was_trained_at_are_no_matter(
    demo_weights: None, shape: str, fits: bool
) -> None:
    size, frames = shape.split()
    flags = ["--size", size, "--num-frames", frames, "--dry-run"]
    said = call("generate", "-p", "a red circle", "-m", "demo", *flags).stderr
    assert ("will look worse" not in said) == fits


def test_missing_demo_weights_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmonarch_cli.models.registry.WEIGHTS", tmp_path / "weights")
    assert error(call("generate", "-p", "a red circle")) == (
        f"error: the demo model's weights are missing from this installation ({tmp_path}/weights): install vmonarch "
        "again, or name another model with --model"
    )


# The real thing, with random weights


def test_generate_end_to_end_with_a_local_folder(tiny_wan_folder: Path, tmp_path: Path) -> None:
    import imageio.v3 as imageio

    command = [
        sys.executable,
        "-m",
        "vmonarch_cli",
        "generate",
        "-m",
        str(tiny_wan_folder),
        "-p",
        "a red circle",
        "--preset",
        "paper",
    ]
    command += ["--size", "64x48", "--num-frames", "17", "--steps", "3", "--fps", "12", "-o", f"{tmp_path}/x.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loading the model\ndenoising (3 steps)\ndecoding\n"
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/x.mp4"
    assert "\x1b" not in done.stdout
    assert imageio.imread(tmp_path / "x.mp4").shape == (17, 48, 64, 3)
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["settings"]["fps"] == {"value": 12, "origin": "flag"}
    assert record["coverage"] == {"calls": 18, "structured": 18, "dense": {}}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert (
        again.stderr == f"error: {tmp_path}/x.mp4 exists already: pass --overwrite to replace it, or another --output\n"
    )


@pytest.mark.parametrize(("frames", "preset"), [("17", "exact"), ("1", "paper")])
def test_where_the_structure_is_exact_nothing_is_called_structured(
    tiny_wan_folder: Path, frames: str, preset: str
) -> None:
    """One table must not say "all dense", "6 of 6 structured" and a speedup."""
    shape = ("--size", "32x32", "--num-frames", frames, "--steps", "2", "--guidance-scale", "1", "--device", "cpu")
    result = call(
        "generate", "-m", str(tiny_wan_folder), "-p", "a red circle", *shape, "--preset", preset, "-o", "x.mp4"
    )
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "per clip, all dense" in shown
    assert "0 of 6 self-attention calls structured; dense: 6 (the structure is exact)" in shown
    assert "against dense" not in shown
    timing = json.loads(Path("x.json").read_text())["timing"]
    assert (timing["attention_speedup"], timing["end_to_end_speedup"]) == (None, None)


def test_a_real_interrupt_leaves_no_file(tiny_wan_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vmonarch_cli", "generate", "-m", str(tiny_wan_folder), "-p", "a red circle"]
    command += ["--size", "64x64", "--num-frames", "17", "--steps", "1000", "-o", f"{tmp_path}/x.mp4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("denoising"):
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert (process.returncode, rest.splitlines()[-1]) == (130, "interrupted: no clip was left half-written")
    assert list(tmp_path.iterdir()) == []
