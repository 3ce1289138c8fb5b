"""What the tables say, at the widths people have."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import pytest
from rich.console import Console, RenderableType

from vmonarch_cli.cli import model_tables as model_listings
from vmonarch_cli.cli import plan_tables as listings
from vmonarch_cli.cli import report
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import load_preset, shipped_names
from vmonarch_cli.text import binary_size, flops
from vmonarch_cli.timing import Coverage, StepAttention

MACHINE = Machine("cuda:0", "NVIDIA H100 80GB HBM3", "bfloat16", "triton")


def text(renderable: RenderableType, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(renderable)
    return stream.getvalue()


def flat(renderable: RenderableType, width: int = 200) -> str:
    return " ".join(text(renderable, width).split())


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def plan(**flags: Any) -> Plan:
        given = {"prompt": "a cat", "model": "wan2.1-1.3b", "steps": 4, "output": f"{tmp_path}/x.mp4", **flags}
        return resolve(GenerateRequest(**given))

    return plan


def test_header_says_that_small_calls_run_dense_and_what_that_leaves_off(make: Any) -> None:
    shown = flat(report.header(make(model="demo", prompt="a red circle", preset="fast", steps=20), MACHINE))
    assert "small calls calls of 1,872 tokens run dense: below " in shown
    assert "--dense-below 0 runs them structured; the adapter, which is for structured calls, is off" in shown
    assert "per clip, all dense" in shown
    kept = flat(report.header(make(model="demo", prompt="a red circle", dense_below=0, graphs=True), MACHINE))
    assert "run dense" not in kept
    assert "small calls replayed as CUDA graphs" in kept


def test_header_names_everything(make: Any) -> None:
    shown = flat(report.header(make(preset="quality", steps=20), MACHINE))
    for words in (
        "model Wan2.1-T2V-1.3B 30 layers, 12 heads x 128",
        "clip 832x480, 81 frames at 16 fps, 20 steps",
        "tokens 32,760 = 21 x 30 x 52 (latent frames x rows x columns)",
        "preset quality warm start, 2 iterations in the first step, own frame exact, first frame exact, 4 more "
        "frames exact in turn, first 4 steps dense",
        "; 11 frames exact in step 5, 4.6 on the mean after it",
        "device NVIDIA H100 80GB HBM3, bfloat16, attention by triton",
    ):
        assert words in shown
    assert "attention 265 TFLOP per clip against 1.58 PFLOP dense (6.0x less)" in flat(
        report.header(make(preset="paper"), MACHINE)
    ).replace("266", "265")


def test_step_table_has_every_column_and_hides_what_was_not_sampled() -> None:
    lines = text(report.step_table(fakes.steps(), 80)).splitlines()
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert rows[0] == ["1", "d", "1.000", "2.00", "1.60", "80", "%", "1.60", "·", "·"]
    assert rows[1] == ["2", "p", "0.750", "2.00", "0.50", "25", "%", "·", "·", "·"]
    assert rows[2] == ["3", "p", "0.500", "2.00", "0.50", "25", "%", "1.60", "3.20x", "0.125"]
    median = next(line.split() for line in lines if "median" in line)
    assert median == ["median", "2.00", "0.50", "25", "%", "1.60", "3.20x", "0.125"]


def test_legend_of_a_clip_without_samples_speaks_of_none(make: Any) -> None:
    sampled = fakes.result(make()).timing
    alone = [replace(step, dense_s=None, dense_call_s=None, error=None) for step in sampled.steps]
    assert "dense of the clip: steps without a sample count by the mean" in report.step_legend(sampled).plain
    assert report.step_legend(replace(sampled, steps=alone)).plain == (
        "median: of each column; clip: sums of all steps; p: some layers dense; d: a dense step"
    )


def test_first_call_is_in_no_speedup(make: Any) -> None:
    with_compile = fakes.result(make())
    alone = fakes.result(make(), first_call_s=None)
    assert with_compile.timing.attention_speedup == pytest.approx(alone.timing.attention_speedup)
    assert "first call 3.25 s with kernel compilation, in no figure above but spent" in flat(
        report.summary(with_compile, 1.5)
    )


def test_summary(make: Any) -> None:
    shown = flat(report.summary(fakes.result(make()), 1.5))
    for words in (
        "attention 3.1 s (39 % of denoising), 2.19x against dense over the whole clip",
        "error 0.125 relative L2 against dense attention, median of the samples; largest 0.125 in step 3",
        "of which text 500 ms, denoise 8 s, decode 1.25 s, write 100 ms",
        "load 1.5 s for the model, in no figure above but spent",
        "coverage 174 of 240 self-attention calls structured; dense: 60 (dense_steps), 6 (dense_layers)",
        "memory peak 3.0 GiB (device), of it 12 MiB kept between steps",
        "seed 0",
    ):
        assert words in shown


def test_where_the_seconds_went_is_a_bar_on_a_terminal_and_a_line_elsewhere(make: Any) -> None:
    result = fakes.result(make())
    timing = replace(result.timing, load_s=10.0, excluded_s=4.0, hidden_write_s=2.0)
    assert timing.parts == pytest.approx(
        {
            "load": 10.0, "text": 0.5, "compile": 3.25, "samples": 0.75, "attention": 3.1, "rest": 4.9, "decode": 1.25,
            "write": 0.1,
        }
    )  # fmt: skip
    assert sum(timing.parts.values()) == pytest.approx(timing.load_s + 8.0 + 4.0 + 0.5 + 1.25 + 0.1)
    shown = report.summary(replace(result, timing=timing), 10.0)
    assert (
        "spent load 10 s (42 %), text 500 ms (2 %), compile kernels 3.25 s (14 %), dense samples 750 ms (3 %), "
        "attention 3.1 s (13 %), rest of denoising 4.9 s (21 %), decode 1.25 s (5 %), write 100 ms (0 %) (2 s of "
        "writing beside decoding)"
    ) in flat(shown, 400)
    stream = io.StringIO()
    Console(file=stream, width=200, force_terminal=True, color_system=None, legacy_windows=False).print(shown)
    bar = next(line for line in stream.getvalue().splitlines() if "██" in line).split()[-1]
    assert (len(bar), bar.count("█")) == (60, 25 + 8), "load and attention, each as long as its share"
    assert "▒ compile kernels 3.25 s (14 %)" in stream.getvalue()


def test_a_record_keeps_where_the_seconds_went(make: Any) -> None:
    timing = replace(fakes.result(make()).timing, load_s=10.0).to_json()
    assert timing["parts"]["load_s"] == timing["load_s"] == 10.0
    assert timing["parts"]["decode_s"] == timing["decode_s"]


def test_a_slow_structured_call_is_called_by_its_name(make: Any) -> None:
    slow = fakes.result(make(), steps=fakes.steps(attention_s=2.0))
    assert "0.89x against dense over the whole clip; not worth it at this size" in flat(report.summary(slow, None))


def step(index: int, attention_s: float, dense_s: float | None, error: float | None = None) -> StepAttention:
    """A step of ten calls: dense where its attention is dense attention, sampled where that is known."""
    is_dense = dense_s == attention_s
    per_call = None if dense_s is None or is_dense else dense_s / 10
    return StepAttention(
        index=index,
        total=4,
        sigma=None,
        step_s=2.0,
        attention_s=attention_s,
        calls=10,
        structured_calls=0 if is_dense else 10,
        dense_call_s=per_call,
        dense_s=dense_s,
        sampled_attention_s=None if per_call is None else attention_s / 10,
        error=error,
    )


def test_the_speedup_of_a_clip_counts_its_dense_steps(make: Any) -> None:
    """Three dense steps and a structured one: the structured step alone would say 1.94x."""
    steps = [*(step(i, 0.97, 0.97) for i in range(3)), step(3, 0.5, 0.97, error=0.1)]
    timing = fakes.result(make(), steps=steps).timing
    assert timing.steps[3].speedup == pytest.approx(1.94)
    assert timing.attention_speedup == pytest.approx(4 * 0.97 / (3 * 0.97 + 0.5))
    assert timing.dense_attention_s == pytest.approx(4 * 0.97)
    assert timing.estimated_dense_denoise_s == pytest.approx(8.0 - 3.41 + 3.88)
    shown = flat(report.clip_report(fakes.result(make(), steps=steps), None, "", 200))
    assert "1.14x against dense over the whole clip" in shown
    assert "median 2.00 970.0 48 % 970.0 1.94x 0.100 clip 8.00 3410.0 43 % 3880.0 1.14x 0.100" in shown
    assert "median: of each column, speedup and error of structured steps alone" in shown


def test_steps_full_of_exact_frames_count_as_much_as_the_others(make: Any) -> None:
    """A first step that is slower than dense, and steps without a sample: a median would not see the first one."""
    steps = [step(0, 3.0, 1.0, 0.1), step(1, 0.5, 1.0, 0.1), step(2, 0.5, None), step(3, 0.5, 1.0, 0.1)]
    timing = fakes.result(make(), steps=steps).timing
    assert timing.attention_speedup == pytest.approx(4.0 / 4.5)
    assert timing.end_to_end_speedup is not None
    assert timing.end_to_end_speedup < 1


LOST = [0.566, 0.028, 0.045, 0.027, 0.017, 0.026]
"""Errors of the demo model's steps at 128x128 in six steps with preset paper: the star is not in the clip."""
KEPT = [0.409, 0.046, 0.115, 0.073, 0.04, 0.13]
"""The same at 96x96, where the star is in the clip."""


LOST_BALANCED = [0.421, 0.079, 0.047, 0.026, 0.017, 0.036]
KEPT_LONGER = [0.495, 0.034, 0.036, 0.049, 0.033, 0.11, 0.181, 0.092, 0.051, 0.037, 0.062, 0.048]
"""128x128 with preset fast in twelve steps."""


@pytest.mark.parametrize(
    ("errors", "advice"),
    [
        (LOST, True),
        (LOST_BALANCED, True),
        (KEPT, False),
        (KEPT_LONGER, False),
        ([0.482, 0.034, 0.068, 0.065, 0.044, 0.137], False),
        ([0.566], False),
        ([0.0] * 6, False),
    ],
)
def test_a_first_step_that_stands_out_is_said(make: Any, errors: list[float], advice: bool) -> None:
    timing = fakes.result(make(), steps=[step(i, 0.5, 1.0, error) for i, error in enumerate(errors)]).timing
    shown = flat(report.summary(fakes.result(make(), steps=timing.steps), None))
    assert (report.LOST_SUBJECT in shown) is advice
    assert f"largest {max(errors):.3f} in step 1" in shown
    record = timing.to_json()
    assert record["largest_error"] == {"step": 0, "error": max(errors)}
    assert record["first_step_stands_out"] is advice


@pytest.mark.parametrize("width", [36, 40, 50, 60, 70, 80])
def test_a_narrow_step_table_loses_columns_and_never_numbers(make: Any, width: int) -> None:
    timing = fakes.result(make()).timing
    lines = text(report.step_table(timing, width), width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert not any("…" in line for line in lines)
    shown = " ".join(" ".join(lines).split())
    for words in ("attention", "speedup", "3.20x", "0.50", "median", "clip", "2.19x"):
        assert words in shown
    assert ("no room for sigma" in shown) is (width < 75)


def test_without_sampling_there_is_no_speedup(make: Any) -> None:
    unsampled = [s for s in fakes.steps(4) if s.dense_s is None]
    shown = flat(report.clip_report(fakes.result(make(), steps=unsampled, first_call_s=None), None, "", 200))
    assert "x against dense" not in shown
    assert "first call" not in shown


def test_coverage_words() -> None:
    assert report.coverage_words(Coverage(1200, {})) == "1,200 of 1,200 self-attention calls structured"


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_or_too_wide(make: Any, width: int) -> None:
    plan = make(preset="quality", num_videos=2)
    shown = [
        report.header(plan, MACHINE),
        report.clip_report(fakes.result(plan), 1.5, "clip 1 of 2", width),
        listings.presets_table([load_preset(name) for name in shipped_names()]),
        listings.preset_table(load_preset("fast")),
        model_listings.models_table(ENTRIES),
        listings.dry_run(plan),
    ]
    for renderable in shown:
        lines = text(renderable, width).splitlines()
        assert max(len(line.rstrip()) for line in lines) <= width
        assert not any("…" in line for line in lines)


def test_markup_in_a_prompt_is_only_text(make: Any) -> None:
    assert "[red]x[/red] [/]" in flat(listings.dry_run(make(prompt="[red]x[/red] [/]")))


@pytest.mark.parametrize(
    ("value", "expected"), [(8e-7, "1 µs"), (0.0123, "12.3 ms"), (4.214, "4.21 s"), (192, "3 min 12 s")]
)
def test_durations(value: float, expected: str) -> None:
    assert report.seconds(value) == expected


def test_quantities() -> None:
    assert [flops(n) for n in (12, 5.74e10, 4e15, 1.2e18)] == ["12 FLOP", "57.4 GFLOP", "4.00 PFLOP", "1200 PFLOP"]
    assert [binary_size(n) for n in (2048, 5 * 2**20, 3.5 * 2**30)] == ["2 KiB", "5 MiB", "3.5 GiB"]
