"""`vmonarch compare`: figures with known answers, and whole comparisons with a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from pages import Page, screenshot
from PIL import Image
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record_model import parse_record
from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.pipeline import load
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.review.compare.existing import differing
from vmonarch_cli.review.compare.figures import changes, distance, flicker
from vmonarch_cli.review.compare.page import figure_notes, figure_rows
from vmonarch_cli.review.compare.pictures import contact_sheet, short_figures, side_by_side
from vmonarch_cli.review.compare.results import ComparedClip, Comparison
from vmonarch_cli.review.compare.runs import plan_comparison

HOSTILE = 'a red <script>alert(1)</script> circle "moving" \'&amp; <img src=http://evil.example/x onerror=alert(1)>'


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def clip(frames: int = 5, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


# Figures


def test_equal_clips_have_no_distance() -> None:
    found = distance(clip(), clip())
    assert found.identical
    assert (found.psnr, found.ssim, found.lpips) == (float("inf"), pytest.approx(1), None)
    assert found.to_json()["psnr"] is None
    json.dumps(found.to_json(), allow_nan=False)


def test_one_level_everywhere_is_48_decibels() -> None:
    grey = np.full((3, 16, 16, 3), 100, np.uint8)
    found = distance(grey + 1, grey)
    assert found.psnr == pytest.approx(48.13, abs=0.01)
    assert found.psnr_frames == pytest.approx([48.13] * 3, abs=0.01)
    assert not found.identical


def test_frames_smaller_than_the_window_have_no_ssim() -> None:
    assert distance(clip(2, 8, 8), clip(2, 8, 8)).ssim is None


def test_flicker_counts_what_is_taken_back_and_not_motion() -> None:
    steady = np.stack([np.full((4, 4, 3), 10 * i, np.uint8) for i in range(6)])
    assert changes(steady) == [10.0] * 5
    assert flicker(steady) == 0
    blinking = np.stack([np.full((4, 4, 3), 10 * (i % 2), np.uint8) for i in range(6)])
    assert flicker(blinking) == 10
    assert flicker(steady[:2]) is None


def test_lpips_is_used_where_it_is_installed() -> None:
    def fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape == (1, 3, 32, 48)
        assert a.abs().max() <= 1
        return torch.tensor(0.25)

    assert distance(clip(seed=1), clip(), fake).lpips == 0.25


# Pictures


def comparison(*others: np.ndarray) -> Comparison:
    reference = ComparedClip("dense", clip(), changes(clip()), None)
    held = []
    for number, film in enumerate(others):
        found = distance(film, clip()) if film.shape == clip().shape else None
        held.append(ComparedClip(f"a long name of a preset {number}", film, [], None, found))
    return Comparison("title", "prompt", 8, reference, held, [])


def test_side_by_side_holds_every_clip_unchanged() -> None:
    film = side_by_side(comparison(clip(seed=1), clip(seed=2)))
    frames, height, width, _ = film.shape
    scale = 6  # 48 pixels become the 288 that a label needs
    assert (frames, width, width % 2, height % 2) == (5, 3 * 48 * scale + 2 * 8, 0, 0)
    head = height - 32 * scale
    for number, seed in enumerate((0, 1, 2)):
        left = number * (48 * scale + 8)
        tile = film[:, head:, left : left + 48 * scale]
        assert np.array_equal(tile[:, ::scale, ::scale], clip(seed=seed))
    assert film[0, :head].std() > 5, "labels are drawn"


def test_pictures_of_clips_of_other_shapes() -> None:
    odd = comparison(clip(3, 64, 32, seed=1))
    assert side_by_side(odd).shape[0] == 5
    sheet = contact_sheet(odd)
    assert sheet.height < 3 * sheet.width


def test_the_sheet_has_a_difference_row_only_for_what_differs() -> None:
    same, other = comparison(clip()), comparison(clip(seed=1))
    assert contact_sheet(same).size == contact_sheet(other).size
    last_row = np.asarray(contact_sheet(same))[-100:-20, 200:]
    assert last_row.max() < 30, "equal frames are black"
    assert np.asarray(contact_sheet(other))[-100:-20, 200:].max() > 150


# Times


def timed(name: str, attention_s: float, other_s: float, **changes: Any) -> ComparedClip:
    """A clip of ten steps; `other_s`: text, decoding, and what a step does beside its attention."""
    steps = [{"attention_s": attention_s / 10} for _ in range(10)]
    parts = {"text_encode_s": 0.5, "decode_s": other_s / 2, "write_s": 0.5}
    table = {
        "schema": 1,
        "prompt": "p",
        "seed": 0,
        "clip": "x.mp4",
        "frames": {"count": 5, "height": 32, "width": 48, "fps": 8},
        "settings": {},
        "preset": {"name": name, "attention": "dense" if name == "dense" else "monarch", "band": 0},
        "model": {"source": "s", "alias": "a", "title": "t"},
        "flops": {"planned": 100 if name == "dense" else 40},
        "timing": {**parts, "denoise_s": attention_s + other_s / 2 - 1, "attention_s": attention_s, "steps": steps},
    }
    return ComparedClip(name, clip(), [], None, None, parse_record({**table, **changes}, "record"))


def times(*clips: ComparedClip) -> Comparison:
    return Comparison("title", "prompt", 8, clips[0], list(clips[1:]), [])


def test_a_slow_machine_is_no_speedup() -> None:
    """Attention saved 1.7 of 47 seconds; the machine was busy with something else during the first clip."""
    found = times(timed("dense", 5.0, 42.0), timed("fast", 3.3, 33.0))
    assert found.speedup(found.others[0], "end_to_end_s") == pytest.approx((37.5 + 5) / (37.5 + 3.3))
    assert found.variation == pytest.approx((20 - 15.5) / 17.75)
    assert found.differs(found.others[0]), "attention went from 5 s to 3.3 s, far more than times vary"


def test_equal_settings_have_no_speedup() -> None:
    found = times(timed("dense", 5.0, 40.0), timed("a", 4.6, 39.0), timed("b", 4.7, 38.5))
    assert [found.differs(other) for other in found.others] == [True, True]
    busy = times(timed("dense", 5.0, 40.0), timed("a", 4.6, 36.0), timed("b", 4.7, 35.0))
    assert [busy.differs(other) for other in busy.others] == [False, False]
    rows = dict(figure_rows(busy))
    assert rows["attention"] == ["5 s", "4.6 s, no difference", "4.7 s, no difference"]
    assert rows["end to end"][1:] == ["40.6 s, no difference", "39.7 s, no difference"]
    assert figure_notes(busy) == [
        "no difference measurable for a, b: times of equal work vary by 15% between these clips"
    ]
    assert busy.to_json()["others"][0]["times_differ"] is False
    assert "attention" not in short_figures(busy, busy.others[0])


def test_one_preset_under_two_names_says_how_far_times_vary() -> None:
    same = {"preset": {"name": "other name", "attention": "monarch", "band": 0}}
    found = times(timed("dense", 5.0, 40.0), timed("a", 3.0, 40.0), timed("b", 4.5, 40.0, **same))
    assert found.variation == pytest.approx(1.5 / 3.75)
    assert [found.differs(other) for other in found.others] == [True, False]


def test_uneven_dense_steps_say_how_far_times_vary() -> None:
    dense = timed("dense", 5.0, 40.0)
    assert dense.record is not None
    record = dense.record.model_dump(by_alias=True)
    for number, step in enumerate(record["timing"]["steps"]):
        step["attention_s"] = 0.3 if number % 2 else 0.7
    uneven = replace(dense, record=parse_record(record, "record"))
    found = times(uneven, timed("fast", 4.4, 40.0))
    assert found.variation == pytest.approx(0.2942, rel=1e-3)
    assert not found.differs(found.others[0])


def test_a_first_step_that_warms_up_hides_no_gain() -> None:
    """The first clip's first step waited 70 seconds for what the program reads from the disk."""
    clips = [timed("dense", 5.0, 40.0), timed("fast", 2.5, 40.0)]
    for number, one in enumerate(clips):
        assert one.record is not None
        record = one.record.model_dump(by_alias=True)
        for step in record["timing"]["steps"]:
            step["step_s"] = step["attention_s"] + 2.0
        if number == 0:
            record["timing"]["steps"][0]["step_s"] += 70
            record["timing"]["denoise_s"] += 70
        clips[number] = replace(one, record=parse_record(record, "record"))
    found = times(*clips)
    assert found.variation == pytest.approx(0.03)
    assert found.differs(found.others[0])


def test_as_many_operations_as_dense_make_no_ratio() -> None:
    """`exact`, or a clip of one frame: every call is dense attention under another name."""
    found = times(timed("dense", 5.0, 40.0), timed("exact", 1.5, 40.0, flops={"planned": 100}))
    assert dict(figure_rows(found))["attention"] == ["5 s", "1.5 s"]
    assert figure_notes(found) == ["exact: as many operations as dense, so no ratio of times"]


def test_records_without_steps_make_no_claim() -> None:
    bare = {"timing": {"attention_s": 3.0}}
    found = times(timed("dense", 5.0, 40.0, **bare), timed("fast", 3.0, 40.0, **bare))
    assert (found.variation, found.differs(found.others[0])) == (None, False)


def test_lists_of_settings_are_words() -> None:
    def setting(value: list[str]) -> dict[str, Any]:
        return {"settings": {"loras": {"value": value, "origin": "flag"}}}

    clips = [timed("dense", 5.0, 4.0, **setting([])), timed("a", 5.0, 4.0, **setting(["x.safetensors", "y/z"]))]
    assert ("loras", ["none", "x.safetensors, y/z"]) in differing(clips)


# Making clips


@pytest.fixture(scope="module")
def made(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, int]:
    """Dense, fast and exact on the tiny model, and how often a model was loaded."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    loads = []
    with pytest.MonkeyPatch.context() as patch:
        original = load.load_pipeline

        def counted(*args: object, **extra: object) -> object:
            loads.append(args)
            return original(*args, **extra)  # type: ignore[arg-type]

        patch.setattr("vmonarch_cli.clip.make.load_pipeline", counted)
        result = call(
            *("compare", "-m", str(tiny_wan_folder), "-p", HOSTILE, "--size", "48x32", "--num-frames", "17"),
            *("--steps", "3", "--fps", "8", "--preset", "fast", "--preset", "exact", "-o", f"{folder}/", "--json"),
        )
    assert result.exit_code == 0, result.stderr
    return folder, result, len(loads)


def test_one_model_load_makes_every_file(made: tuple[Path, Result, int]) -> None:
    folder, result, loads = made
    assert loads == 1
    clips = {f"{name}.{ending}" for name in ("dense", "fast", "exact") for ending in ("mp4", "json")}
    files = {"side-by-side.mp4", "contact-sheet.png", "compare.json", "report.html"}
    assert {path.name for path in folder.iterdir()} == clips | files
    printed = json.loads(result.stdout)
    assert [Path(name).name for name in printed["files"]][-1] == "report.html"
    fast, exact = printed["others"]
    assert 10 < fast["distance"]["psnr"] < 90
    assert exact["distance"]["psnr"] is None or exact["distance"]["psnr"] > 40, "exact is dense but for rounding"
    assert len(fast["distance"]["psnr_frames"]) == 17
    assert len(fast["change_frames"]) == 16
    assert fast["attention_flops"] != printed["reference"]["attention_flops"] > 0
    assert fast["attention_speedup"] > 0
    assert imageio.imread(folder / "side-by-side.mp4").shape[0] == 17
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sheet.width > 1000


def test_on_a_narrow_screen_every_cell_names_its_column(made: tuple[Path, Result, int]) -> None:
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    for title in ("PSNR", "SSIM", "flicker", "attention work", "attention", "end to end"):
        assert text.count(f'<td data-title="{title}">') == 3, title  # one for each clip
    assert '<td data-title="fast">' in text  # of the settings that differ
    assert "@media (max-width: 640px)" in text


def test_the_report_is_self_contained_and_escapes_the_prompt(made: tuple[Path, Result, int]) -> None:
    page = Page(made[0] / "report.html")
    page.check_self_contained()
    assert HOSTILE in page.text
    assert {"video", "img", "polyline"} <= set(page.tags)
    assert "http" not in "".join(reference[:40] for reference in page.references)
    for words in ("PSNR", "SSIM", "preset.band", "LPIPS is left out"):
        assert words in page.text
    sentences = [line.strip() for line in page.text.splitlines() if line.strip().startswith("fast: its frames and")]
    assert len(sentences) == 1, "the verdict"


def test_the_report_in_chromium(made: tuple[Path, Result, int], tmp_path: Path) -> None:
    for width in (1280, 500):  # headless Chromium is no narrower
        with Image.open(screenshot(made[0] / "report.html", tmp_path / f"{width}.png", width, 1600)) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape == (1600, width)
        assert (pixels < 60).mean() > 0.02, "pictures and text are drawn"


def test_records_are_compared(made: tuple[Path, Result, int]) -> None:
    folder = made[0]
    result = call("compare", str(folder / "fast.json"), str(folder / "exact.mp4"), "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["files"] == []
    assert printed["differing"]["preset.band"] == ["0", "1024"]
    assert "seed" not in printed["differing"]
    assert printed["others"][0]["distance"]["psnr"] > 10
    assert any("lossy" in note for note in printed["notes"])
    shown = call("compare", str(folder / "fast.json"), str(folder / "exact.mp4")).stdout
    assert "preset.band" in shown


def test_a_clip_that_was_stopped_early_is_told(made: tuple[Path, Result, int], tmp_path: Path) -> None:
    record = json.loads((made[0] / "fast.json").read_text())
    (tmp_path / "stopped.mp4").write_bytes((made[0] / "fast.mp4").read_bytes())
    (tmp_path / "stopped.json").write_text(json.dumps({**record, "clip": "stopped.mp4", "stopped_after": 1}))
    result = call("compare", str(made[0] / "fast.json"), str(tmp_path / "stopped.json"), "--json")
    printed = json.loads(result.stdout)
    (stopped,) = printed["others"]
    assert (stopped["attention_speedup"], stopped["attention_flops"]) == (None, None)
    assert "stopped was stopped after step 1: its frames are unfinished, its times not compared" in printed["notes"]


def test_a_record_without_its_clip_is_compared_by_its_settings(made: tuple[Path, Result, int], tmp_path: Path) -> None:
    lonely = tmp_path / "lonely.json"
    record = json.loads((made[0] / "fast.json").read_text())
    record["clip"] = "gone.mp4"
    lonely.write_text(json.dumps(record))
    result = call("compare", str(made[0] / "dense.json"), str(lonely), "-o", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["others"][0]["distance"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.json", "report.html"}


# What is refused


def test_names_and_folders() -> None:
    request = GenerateRequest(prompt="a cat", model="wan2.1-1.3b", overrides=("band=2",))
    folder, plans = plan_comparison(request, ["fast", "fast", "dense"])
    assert folder == Path("outputs/a-cat-s0-compare")
    assert list(plans) == ["dense", "fast"]
    assert (plans["fast"].preset.band, plans["dense"].preset.attention) == (2, "dense")
    assert plans["fast"].dense_every == 0
    with pytest.raises(InputError, match="other than dense"):
        plan_comparison(request, ["dense"])


def test_a_folder_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        plan_comparison(GenerateRequest(prompt="a cat", model="wan2.1-1.3b", output=str(tmp_path)), ["fast"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("a.json",), "compare takes two or more clips or records, or none and a --prompt"),
        (("a.json", "b.json"), "there is no record a.json: vmonarch writes one beside each clip, as in clip.json"),
        (("a.mp4", "b.mp4"), "there is no clip a.mp4"),
        (
            ("a.json", "b.json", "-p", "a cat"),
            "compare takes files, or --prompt and --preset to make clips, not both",
        ),
        (
            ("a.json", "b.json", "--steps", "3", "--seed", "0", "--no-fuse"),
            "compare takes files as they are: leave out --steps, --seed and --no-fuse, with which clips are made",
        ),
        (
            ("-p", "a cat", "-m", "wan2.1-1.3b", "-o", "x.mp4"),
            "--output takes a folder for a comparison, got x.mp4",
        ),
    ],
)
def test_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = call("compare", *arguments)
    assert (result.exit_code, result.stderr) == (2, f"error: {sentence}\n")
