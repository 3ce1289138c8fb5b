"""gallery, rerun, doctor and plan: what is said of clips that exist, of this machine, and of a run to come."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page, screenshot
from PIL import Image
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record import plan_again, read_record, settings_of
from vmonarch_cli.machine import hardware
from vmonarch_cli.pipeline import doctor
from vmonarch_cli.plan import history
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.profile.remember import remember_profile
from vmonarch_cli.profile.results import ModelProfile, Spread, StepRow
from vmonarch_cli.review.gallery import write_gallery
from vmonarch_cli.review.webpage import PAGES

HOSTILE = (
    "</p><script>alert(1)</script>",
    "<img src=https://evil.example/x onerror=alert(1)>",
    "emoji 👩‍👩‍👧, 'quotes' \"double\" & ampersand\nand a second line",
    "x" * 10_000,
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def original(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a clip of the tiny model."""
    folder = tmp_path_factory.mktemp("original")
    result = call(
        *("generate", "-m", str(tiny_wan_folder), "-p", "a red circle", "--size", "48x32", "--num-frames", "17"),
        *("--steps", "3", "--fps", "8", "--preset", "fast", "--set", "band=1", "--seed", "7", "--guidance-scale", "3"),
        *("-o", f"{folder}/clip.mp4", "--quiet"),
    )
    assert result.exit_code == 0, result.stderr
    return folder / "clip.json"


# Gallery


@pytest.fixture
def batch(original: Path, tmp_path: Path) -> Path:
    """A folder of clips with hostile prompts and names."""
    folder = tmp_path / "a <b> & 'c'"
    (folder / "inner").mkdir(parents=True)
    for number, prompt in enumerate(HOSTILE):
        name = ["clip.mp4", 'a "b" #1?%41.mp4', "javascript:alert(1).mp4", "inner/deep.mp4"][number]
        record = {**json.loads(original.read_text()), "prompt": prompt, "clip": f"../../etc/{Path(name).name}"}
        shutil.copy(original.with_suffix(".mp4"), folder / name)
        (folder / name).with_suffix(".json").write_text(json.dumps(record))
    (folder / "other.json").write_text("[1, 2]")
    (folder / "broken.json").write_text("{")
    (folder / "no-clip.json").write_text(original.read_text())
    return folder


def test_the_gallery_is_self_contained_and_escapes_everything(batch: Path) -> None:
    page = Page(write_gallery(batch))
    page.check_self_contained()
    for prompt in HOSTILE:
        assert prompt in page.text
    videos = [reference for reference in page.references if reference.endswith(".mp4")]
    assert set(videos) == {
        "./clip.mp4",
        "./a%20%22b%22%20%231%3F%2541.mp4",
        "./javascript%3Aalert%281%29.mp4",
        "./inner/deep.mp4",
    }
    posters = [reference for reference in page.references if reference.startswith("data:image/jpeg;base64,")]
    assert len(posters) == 4
    for words in ("fast", "48x32, 17 frames, 8 fps", "end to end", "guidance scale"):
        assert words in page.text


def test_the_gallery_in_chromium(batch: Path, tmp_path: Path) -> None:
    with Image.open(screenshot(write_gallery(batch), tmp_path / "page.png", 500, 1200)) as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_gallery_command(batch: Path, tmp_path: Path) -> None:
    result = call("gallery", str(batch), "--json")
    assert json.loads(result.stdout)["clips"] == 4
    assert call("gallery", str(batch)).stdout == f"{batch}/index.html\n", "it is written again in place"
    (tmp_path / "empty").mkdir()
    result = call("gallery", str(tmp_path / "empty"))
    sentence = f"error: {tmp_path}/empty holds no clip with a record beside it, as vmonarch writes them\n"
    assert (result.exit_code, result.stderr) == (2, sentence)


def test_a_damaged_clip_does_not_cost_the_gallery(batch: Path) -> None:
    (batch / "clip.mp4").write_bytes(b"not a video")
    page = Page(write_gallery(batch))
    assert "./clip.mp4" in page.references


def test_text_cannot_become_markup() -> None:
    shown = PAGES.from_string("{{ value }}")
    assert shown.render(value='<a href="x">&\'') == "&lt;a href=&#34;x&#34;&gt;&amp;&#39;"
    assert shown.render(value="a\x00b\u202ec\ud800") == "a\ufffdb\ufffdc\ufffd"


# Rerun


def test_rerun_makes_identical_frames(original: Path, tmp_path: Path) -> None:
    result = call("rerun", str(original), "-o", str(tmp_path / "again.mp4"))
    assert result.exit_code == 0, result.stderr
    sentence, path = result.stdout.splitlines()
    assert sentence == "identical: every pixel of every frame is as in the record"
    assert path == str(tmp_path / "again.mp4")
    first, again = read_record(original), read_record(tmp_path / "again.json")
    assert again["frames"] == first["frames"]
    assert again["preset"] == {**first["preset"], "impl": "torch"}
    resolved = {"preset.impl": "torch", "dtype": "float32"}
    assert settings_of(again) == {**settings_of(first), **resolved, "device": first["device"]["name"]}


def test_rerun_says_when_frames_differ_and_what_else_does(original: Path, tmp_path: Path) -> None:
    record = json.loads(original.read_text())
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
        ({"frames": {"count": 1}}, "has no hash of its frames"),
        ({"preset": {"name": "x", "band": "wide"}}, "cannot be repeated"),
        ({"settings": []}, "cannot be repeated"),
        ({"retries": [{"with": "dense attention"}]}, "was made with a fallback (dense attention)"),
    ],
)
def test_rerun_refuses_what_it_cannot_repeat(original: Path, tmp_path: Path, change: Any, words: str) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps({**json.loads(original.read_text()), **change}))
    result = call("rerun", str(changed))
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [changed]


def test_every_setting_of_a_record_is_planned_again(original: Path, tmp_path: Path) -> None:
    plan = plan_again(original, str(tmp_path / "x.mp4"))
    record = read_record(original)
    assert (plan.seed, plan.guidance_scale, plan.preset.band, plan.prompt) == (7, 3.0, 1, "a red circle")
    assert plan.flops.model_dump() == record["flops"]
    assert set(plan.origins.values()) == {"record"}


# Doctor


def test_doctor_finds_this_machine_well() -> None:
    result = call("doctor", "--json")
    printed = json.loads(result.stdout)
    names = {check["name"]: check for check in printed["checks"]}
    assert result.exit_code == (0 if printed["healthy"] else 1)
    for name in ("python", "torch", "diffusers", "transformers", "ffmpeg", "attention", "self-test torch"):
        assert names[name]["status"] == "ok", names[name]
    assert {"hub cache", "triton"} <= names.keys()


def test_doctor_exits_1_when_something_essential_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ffmpeg() -> list[doctor.Finding]:
        raise RuntimeError("No ffmpeg exe could be found.\nand more")

    monkeypatch.setattr(doctor, "EXAMINATIONS", {"python": doctor.EXAMINATIONS["python"], "ffmpeg": no_ffmpeg})
    result = call("doctor")
    assert result.exit_code == 1
    assert "RuntimeError: No ffmpeg exe could be found." in result.stdout
    assert "1 broken" in result.stdout


# Plan


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(history.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_plan_takes_the_flags_of_generate_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from vmonarch_cli.cli.app import app\n"
        "try:\n    app(['plan', '-m', 'wan2.1-1.3b', '-p', 'a cat', '--preset', 'fast', '--steps', '20'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    best = 10.0
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
        best = min(best, time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    assert best < 2
    assert "32,760 tokens" in done.stdout
    assert "no record of this model on" in " ".join(done.stdout.split())


def test_plan_of_a_prompts_file_says_what_is_to_be_made(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue ring\n")
    result = call("plan", "-m", "wan2.1-1.3b", "--prompts-file", str(prompts), "-o", f"{tmp_path}/out", "--json")
    assert result.exit_code == 0, result.stderr
    assert "a-blue-ring-s0.mp4" in result.stdout
    assert not (tmp_path / "out").exists()


def test_plan_expects_what_a_clip_took(original: Path, cache: Path, tmp_path: Path) -> None:
    record = read_record(original)
    again = plan_again(original, str(tmp_path / "x.mp4"))
    flags = {"preset": again.preset.model_copy(update={"impl": "auto"})}
    assert history.expect(again) is None
    history.remember(record)
    exact = history.expect(again.model_copy(update=flags))
    assert exact is not None
    timing = record["timing"]
    assert exact.exact
    assert exact.clip_s == pytest.approx(sum(timing[k] for k in ("text_encode_s", "denoise_s", "decode_s", "write_s")))
    double = history.expect(again.model_copy(update={**flags, "steps": 6}))
    assert double is not None
    assert not double.exact
    assert double.peak_memory_bytes is None
    assert history.expect(resolve(GenerateRequest(model="wan2.1-1.3b", prompt="a cat", device="cpu"))) is None


def test_a_cache_that_cannot_be_used_costs_nothing(original: Path, cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (cache / "timings.jsonl").write_bytes(b"\xff\xfe not JSON\n[]\n{}\n")
    assert history.expect(plan_again(original, str(tmp_path / "x.mp4"))) is None
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    history.remember(read_record(original))
    history.remember({"schema": 1})


def test_gpus_are_named_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    monkeypatch.setattr(hardware, "_NVIDIA", tmp_path)
    hardware.gpu_names.cache_clear()
    try:
        assert hardware.gpu_names() == ("NVIDIA H100 80GB HBM3",) * 2
        assert hardware.device_key("cuda:1") == "NVIDIA H100 80GB HBM3"
        assert hardware.device_key("cuda:7") == "cuda:7"
    finally:
        hardware.gpu_names.cache_clear()


def test_a_profile_is_remembered_too(cache: Path) -> None:
    plan = resolve(GenerateRequest(model="wan2.1-1.3b", prompt="a cat", device="cpu", preset="fast"))
    rows = [
        StepRow("fast", "structured", "cold", Spread(9, 9, 9, 1)),
        StepRow("fast", "structured", "warm", Spread(2, 2, 2, 5), attention_s=0.5, clip_s=100.0),
        StepRow("flash", "dense", "", Spread(4, 4, 4, 5), clip_s=200.0),
        StepRow("none", "skipped", "", Spread(1, 1, 1, 5)),
    ]
    size = (plan.width, plan.height, plan.num_frames)
    profile = ModelProfile("wan", False, False, size, plan.grid, 2, plan.steps, rows, [], 1.0, 9.0)
    remember_profile(profile, plan.model, plan.model_source, [plan.preset], "cpu", "float32")
    found = history.expect(plan)
    assert found is not None
    assert (found.exact, found.clip_s) == (True, 110.0)
    dense = history.expect(resolve(GenerateRequest(model="wan2.1-1.3b", prompt="a cat", device="cpu", preset="dense")))
    assert dense is not None
    assert dense.clip_s == 210.0
