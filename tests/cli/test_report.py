"""What the tables say, at the widths people have."""

from __future__ import annotations

import io
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
from vmonarch_cli.timing import Coverage

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


def test_header_names_everything(make: Any) -> None:
    shown = flat(report.header(make(preset="quality"), MACHINE))
    for words in (
        "model Wan2.1-T2V-1.3B 30 layers, 12 heads x 128",
        "clip 832x480, 81 frames at 16 fps, 4 steps",
        "tokens 32,760 = 21 x 30 x 52 (latent frames x rows x columns)",
        "preset quality warm start, 2 iterations in the first step, own frame exact, first frame exact, 4 more "
        "frames exact in turn, first 4 steps dense",
        "device NVIDIA H100 80GB HBM3, bfloat16, attention by triton",
    ):
        assert words in shown
    assert "attention 265 TFLOP per clip against 1.58 PFLOP dense (6.0x less)" in flat(
        report.header(make(preset="paper"), MACHINE)
    ).replace("266", "265")


def test_step_table_has_every_column_and_hides_what_was_not_sampled() -> None:
    lines = text(report.step_table(fakes.steps())).splitlines()
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert rows[0] == ["1", "d", "1.000", "2.00", "1.60", "80", "%", "1.60", "·", "·"]
    assert rows[1] == ["2", "p", "0.750", "2.00", "0.50", "25", "%", "·", "·", "·"]
    assert rows[2] == ["3", "p", "0.500", "2.00", "0.50", "25", "%", "1.60", "3.20x", "0.125"]
    median = next(line.split() for line in lines if "median" in line)
    assert median == ["median", "2.00", "0.50", "25", "%", "1.60", "3.20x", "0.125"]


def test_first_call_is_in_no_speedup(make: Any) -> None:
    with_compile = fakes.result(make())
    assert with_compile.timing.attention_speedup == pytest.approx(3.2)
    assert "first call 3.25 s with kernel compilation, in no figure above" in flat(report.summary(with_compile, 1.5))


def test_summary(make: Any) -> None:
    shown = flat(report.summary(fakes.result(make()), 1.5))
    for words in (
        "attention 3.1 s (39 % of denoising), 3.20x against dense, sampled in this run",
        "of which text 500 ms, denoise 8 s, decode 1.25 s, write 100 ms",
        "load 1.5 s for the model, in no figure above",
        "coverage 174 of 240 self-attention calls structured; dense: 60 (dense_steps), 6 (dense_layers)",
        "memory peak 3.0 GiB (device), of it 12 MiB kept between steps",
        "seed 0",
    ):
        assert words in shown


def test_a_slow_structured_call_is_called_by_its_name(make: Any) -> None:
    slow = fakes.result(make(), steps=fakes.steps(attention_s=2.0))
    assert "0.80x against dense, sampled in this run; not worth it at this size" in flat(report.summary(slow, None))


def test_without_sampling_there_is_no_speedup(make: Any) -> None:
    unsampled = [s for s in fakes.steps(4) if s.dense_s is None]
    shown = flat(report.clip_report(fakes.result(make(), steps=unsampled, first_call_s=None), None))
    assert "x against dense" not in shown
    assert "first call" not in shown


def test_coverage_words() -> None:
    assert report.coverage_words(Coverage(1200, {})) == "1,200 of 1,200 self-attention calls structured"


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_or_too_wide(make: Any, width: int) -> None:
    plan = make(preset="quality", num_videos=2)
    shown = [
        report.header(plan, MACHINE),
        report.clip_report(fakes.result(plan), 1.5, "clip 1 of 2"),
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
