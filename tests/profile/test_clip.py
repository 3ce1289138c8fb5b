"""`vmonarch profile clip`: whole clips of a tiny model, dense and structured, and what is advised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.make import ClipMaker
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.profile.clip_results import Circumstances, ClipProfile, ClipRow

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ("--size", "48x32", "--num-frames", "17", "--device", "cpu", "--steps", "2")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["profile", "clip", *arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def test_whole_clips_dense_and_structured_cold_and_warm(tiny_wan_folder: Path) -> None:
    given = ("-m", str(tiny_wan_folder), *TINY, "--preset", "fast", "--repeats", "2")
    result = call(*given, "--json", "out.json")
    data = json.loads(Path("out.json").read_text())
    assert (data["kind"], data["checks_passed"], data["problems"]) == ("clip", True, [])
    fast, dense = data["clip"]["rows"]
    assert (fast["name"], dense["name"]) == ("fast", "dense")
    for row in (fast, dense):
        assert row["warm_clips"] == 2
        assert row["cold"]["load_s"] > 0
        assert "load_s" not in row["warm"]
        assert {"text_s", "attention_s", "rest_s", "decode_s", "write_s"} <= row["warm"].keys()
        assert row["cold_s"] == pytest.approx(sum(row["cold"].values()))
    assert data["clip"]["speedup"] == pytest.approx(dense["warm_s"] / fast["warm_s"])
    assert 0 < fast["error"] < 1
    assert dense["error"] is None
    shown = " ".join(result.stdout.split())
    assert all(sentence in shown for sentence in data["verdicts"])
    assert data["verdicts"][0].startswith("fast: ")
    assert any(verdict.startswith("next: ") for verdict in data["verdicts"])
    assert sorted(os.listdir()) == ["out.json"]  # noqa: PTH208


def test_kernels_are_compiled_anew_and_the_users_cache_is_left_alone(
    tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    seen: list[str] = []
    real: Callable[..., object] = ClipMaker.denoise

    def denoise(self: ClipMaker, plan: Plan, index: int) -> object:
        seen.append(os.environ["TRITON_CACHE_DIR"])
        return real(self, plan, index)

    monkeypatch.setattr(ClipMaker, "denoise", denoise)
    data = json.loads(call("-m", str(tiny_wan_folder), *TINY, "--json", "-").stdout)
    assert len(set(seen)) == 1
    assert "mine" not in seen
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert [row["warm_clips"] for row in data["clip"]["rows"]] == [1, 1], "one on a CPU"


def test_clips_that_do_not_fit_the_budget_are_left_out(tiny_wan_folder: Path) -> None:
    budget = ("--steps", "100", "--repeats", "5", "--seconds", "1")
    result = call("-m", str(tiny_wan_folder), *TINY, *budget, "--json", "-", code=1)
    data = json.loads(result.stdout)
    assert data["clip"]["notes"] == ["--seconds left time for 0 of 5 warm clips of each kind"]
    assert data["problems"] == ["nothing was measured"]
    assert data["clip"]["rows"][0]["cold_s"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--preset", "dense"), "preset dense is dense attention, which is measured anyway: name a structured preset"),
        (("--ending", ".avi"), "--ending takes .mp4, .webm, .gif, .webp, .png, got '.avi'"),
        (("--repeats", "0"), "--repeats"),
        (("--size", "50x32"), "size 50x32 does not fit"),
    ],
)
def test_what_is_refused(flags: tuple[str, ...], words: str) -> None:
    result = call(*flags, code=2)
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


# Verdicts

WARM = {"text": 0.5, "attention": 1.0, "rest": 1.5, "decode": 4.0, "write": 1.0}


def profile(warm: dict[str, float], dense_attention: float = 3.0, **now: object) -> ClipProfile:
    cold = {"load": 10.0, "compile": 5.0, **warm}
    return ClipProfile(
        "m",
        (832, 480, 81),
        4,
        ClipRow("dense", cold, [{**warm, "attention": dense_attention}]),
        ClipRow("paper", cold, [warm]),
        replace(Circumstances(), **now),  # type: ignore[arg-type]
    )


def test_verdicts_name_the_gain_the_first_clip_and_what_is_next() -> None:
    assert profile(WARM, on_gpu=True).verdicts == [
        "paper: a warm clip is 1.25x as fast as dense (8 s against 10 s)",
        "the first clip takes 15 s more (10 s for the model and 5 s for kernels): several clips of one process, as of "
        "--prompts-file or --num-videos, pay for it once",
        "next: decoding is the largest part of a warm clip, 50 %: try --vae-dtype bfloat16",
        "attention that took no time at all would make the clip 1.14x as fast, no more",
    ]
    assert profile(WARM, 1.2).verdicts[0] == (
        "paper: not worth it at this size, a warm clip is 1.02x as fast as dense (8 s against 8.2 s)"
    )


@pytest.mark.parametrize(
    ("part", "now", "words"),
    [
        ("decode", {}, "it grows with pixels and frames alone"),
        ("decode", {"on_gpu": True, "vae_dtype": "bfloat16"}, "it grows with pixels and frames alone"),
        ("write", {"ending": ".png"}, "writing is the largest part of a warm clip, 88 %: try .mp4"),
        ("attention", {}, "try a lighter preset, as `vmonarch presets` shows"),
        ("attention", {"steps": 2}, "shows, or fewer --steps"),
        ("rest", {"on_gpu": True, "guided": True, "steps": 20}, "try --compile; --guidance-scale 1, which halves it"),
        ("rest", {"on_gpu": True, "compiled": True, "steps": 20}, "try fewer --steps, or --cache"),
        (
            "rest",
            {"on_gpu": True, "offload": "group", "compiled": True},
            "or --quantize, which may fit without --offload group",
        ),
        ("rest", {"on_gpu": False, "steps": 4}, "beside the attention is the largest part of a warm clip, 88 %"),
    ],
)
def test_advice_is_for_the_largest_part_and_can_be_followed(part: str, now: dict[str, object], words: str) -> None:
    warm = {"text": 0.5, "attention": 0.5, "rest": 0.5, "decode": 0.5, "write": 0.5, part: 14.0}
    said = next(verdict for verdict in profile(warm, 20.0, **now).verdicts if verdict.startswith("next"))
    assert said.endswith(words) if part == "attention" else words in said


def test_where_dense_attention_is_faster_no_lighter_preset_is_advised() -> None:
    warm = {"attention": 3.0, "rest": 1.0}
    said = profile(warm, 2.0, steps=2).verdicts[-1]
    assert said.endswith("part of a warm clip, 75 %: try --preset dense, or more frames, or fewer --steps")
    assert profile(warm, 2.0, steps=1).verdicts[-1].endswith("75 %: try --preset dense, or more frames")
