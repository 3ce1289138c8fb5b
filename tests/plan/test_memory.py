"""One model of memory: what `plan` says of this machine and of other cards, and what all clips of a batch take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.models.base import ClipShape
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.plan.memory import decoding_bytes, footprint, peaks_of, totals
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

GIB = 2**30


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(**flags: Any) -> Plan:
    return resolve(GenerateRequest(**{"prompt": "a cat", "model": "wan2.1-14b", "preset": "paper", **flags}))


def memory_of(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["plan", "-m", "wan2.1-14b", "--preset", "paper", *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["memory"]


def test_plan_answers_for_a_card_that_is_not_here() -> None:
    peaks = peaks_of(plan(), "bfloat16")
    for vram in (4.0, 24.0, 80.0):
        memory = memory_of("--vram", str(vram))
        assert memory["peak_bytes"] == peaks, "the figures by which a run chooses its mode"
        assert memory["fits"] == [mode for mode, peak in peaks.items() if peak <= vram * GIB]
        assert (memory["on"], memory["dtype"], memory["vram_bytes"]) == ("gpu", "bfloat16", vram * GIB)
    assert memory_of("--vram", "1000")["fits"] == ["none", "model", "group", "sequential"]
    assert "fits" not in memory_of("--device", "cpu")


def test_plan_says_what_to_change_where_nothing_fits() -> None:
    given = ["plan", "-m", "wan2.1-14b", "--preset", "balanced", "--vram", "24"]
    said = " ".join(CliRunner().invoke(app, given).stdout.split())
    assert "no offload mode fits; --set refresh=0 does, or choose a smaller size" in said
    result = CliRunner().invoke(app, ["plan", "--vram", "nan"])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        2,
        "error: --vram takes a number from 0.5 to 10000, got nan",
    )


def test_a_small_model_on_a_cpu_is_mostly_the_libraries() -> None:
    """Measured: 1,018 MiB of a process that makes the demo's default clip."""
    demo = plan(model="demo", prompt="a red circle", preset=None, device="cpu")
    found = footprint(demo, "float32", on_gpu=False)
    assert list(found.peaks) == ["none"]
    assert found.peaks["none"] == pytest.approx(1018 * 2**20, rel=0.1)


def test_plan_needs_no_prompt_and_generate_does() -> None:
    result = CliRunner().invoke(app, ["plan", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["settings"]["prompt"] == {"value": "", "origin": "default"}
    for command in (["generate"], ["generate", "--dry-run"]):
        assert "a prompt is missing" in CliRunner().invoke(app, command).stderr


def test_totals_are_sums_over_all_clips() -> None:
    plans = [plan(), plan(num_videos=3, steps=10)]
    found = totals(plans, lambda made: float(made.steps))
    assert (found.clips, found.seconds) == (4, 50.0 + 3 * 10.0)
    assert found.planned_flops == plans[0].flops.planned + 3 * plans[1].flops.planned
    assert found.dense_flops == plans[0].flops.dense + 3 * plans[1].flops.dense
    assert totals(plans, lambda made: 1.0 if made.steps == 10 else None).seconds is None


def test_a_planned_batch_has_totals_of_what_is_left_to_make(tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("prompt,steps,num_frames\na cat,10,81\na dog,20,161\n")
    command = [
        "plan",
        "-m",
        "wan2.1-14b",
        "--preset",
        "paper",
        "--device",
        "cpu",
        "--prompts-file",
        "two.csv",
        "-o",
        "out/",
    ]
    told = CliRunner().invoke(app, [*command, "--vram", "24", "--json"])
    assert told.exit_code == 0, told.stderr
    found = json.loads(told.stdout)["totals"]
    plans = [plan(steps=10, num_frames=81), plan(steps=20, num_frames=161)]
    assert (found["clips"], found["seconds"]) == (2, None)
    assert found["flops"]["planned"] == sum(made.flops.planned for made in plans)
    assert found["memory"]["peak_bytes"] == peaks_of(plans[1], "bfloat16"), "the larger clip decides"
    assert found["memory"]["vram_bytes"] == 24 * GIB
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "120"}).stdout
    assert "for 2 clips against" in shown
    assert "of this machine in float32" in shown
    refused = CliRunner().invoke(app, [*command, "--vram", "0.1"])
    assert (refused.exit_code, refused.stderr) == (2, "error: --vram takes a number from 0.5 to 10000, got 0.1\n")


def test_flags_without_effect_are_named() -> None:
    assert plan(preset="dense", overrides=("band=2",), dense_steps=1, device="cuda").warnings == (
        "all attention is dense with this preset: band, dense_steps changes nothing",
    )
    assert plan(offload="model", device="cpu").warnings == (
        "--offload model changes nothing on a CPU: there is nothing to offload to",
    )
    assert plan(graphs=True, device="cpu").warnings == ("--graphs changes nothing on a CPU: CUDA graphs are a GPU's",)
    assert plan(graphs=True, device="cuda", impl="torch").warnings == (
        "--graphs changes nothing with impl torch: the calls of Triton are what is replayed",
    )
    assert plan(graphs=True, device="cuda").warnings == ()
    quiet = [plan(offload="model", device="cuda"), plan(offload="none", device="cpu"), plan(overrides=("band=2",))]
    assert [made.warnings for made in quiet] == [(), (), ()]


@pytest.mark.parametrize(
    ("model", "shape", "whole", "tiled"),
    [
        # On an H200, workspaces included.
        ("wan2.1-1.3b", (480, 832, 33), 5741, 1071),
        ("wan2.2-5b", (704, 1280, 33), 6009, 572),
        ("cogvideox-5b", (480, 720, 33), 22_909, 5831),
        ("ltx-video", (512, 704, 33), 1714, 1243),
        ("ltx-2", (512, 768, 33), 1996, 429),
        ("mochi-1", (480, 848, 31), 31_215, 5430),
        # Tensors alone.
        ("hunyuan-video", (720, 1280, 129), 20_139, 1936),
        ("cogvideox-5b", (480, 720, 49), 22_893, 5851),
        ("kandinsky-5-lite", (720, 1280, 129), 20_139, 1936),
        ("hunyuan-video-1.5", (480, 832, 121), 92_932, 15_685),
    ],
)
def test_decoding_takes_what_was_measured(model: str, shape: ClipShape, whole: int, tiled: int) -> None:
    """In channels of one full-size frame."""
    entry = find_model(model)[0]
    channel = shape[0] * shape[1] * 4
    found = decoding_bytes(entry, shape, "float32")
    assert found[0] / channel == pytest.approx(whole, rel=0.02)
    assert found[1] / channel == pytest.approx(tiled, rel=0.02)
    narrow = decoding_bytes(entry, shape, "float32", "bfloat16")
    assert narrow[0] == pytest.approx(found[0] / 2, rel=0.01)


def test_decoding_of_other_shapes() -> None:
    wan, mochi = find_model("wan2.1-1.3b")[0], find_model("mochi-1")[0]

    def of(model: Any, height: int, width: int, frames: int) -> tuple[int, int]:
        return decoding_bytes(model, (height, width, frames), "float32")

    assert of(wan, 480, 832, 161)[0] < 1.1 * of(wan, 480, 832, 81)[0], "it decodes four frames at a time"
    assert of(mochi, 480, 848, 163)[0] > 1.8 * of(mochi, 480, 848, 85)[0], "it decodes the whole clip at once"
    assert of(wan, 960, 1664, 81)[0] == pytest.approx(4 * of(wan, 480, 832, 81)[0])
    assert of(wan, 960, 1664, 81)[1] < 2.1 * of(wan, 480, 832, 81)[1], "tiles stay as they are"
    assert of(wan, 128, 128, 81)[0] == of(wan, 128, 128, 81)[1], "a frame smaller than a tile"
    allegro = find_model("allegro")[0]
    unmeasured = of(allegro, 720, 1280, 88)
    assert unmeasured[0] == unmeasured[1] > 88 * 720 * 1280 * 15, "no tiles are chosen that may not be there"


def test_a_plan_says_where_tiles_make_it_fit() -> None:
    given = ["plan", "-m", "mochi-1", "--preset", "paper", "--vram"]
    large, middle, small = (
        " ".join(CliRunner().invoke(app, [*given, vram], env={"COLUMNS": "150"}).stdout.split())
        for vram in ("200", "48", "4")
    )
    assert "of the card in bfloat16, fits" in large
    assert "in tiles" not in large
    assert "of the card in bfloat16, fits, decoding in tiles" in middle
    assert "fits, decoding" not in small
    memory = json.loads(CliRunner().invoke(app, [*given, "48", "--json"]).stdout)["memory"]
    assert memory["full_frames_peak_bytes"]["none"] > 48 * GIB
    forced = json.loads(CliRunner().invoke(app, [*given, "48", "--vae-tiling", "--json"]).stdout)["memory"]
    assert forced["full_frames_peak_bytes"] == forced["peak_bytes"] == memory["peak_bytes"]
