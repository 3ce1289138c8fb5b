"""`vmonarch profile kernel` and what the three profiles share: records, budgets, plots, sentences."""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_packages import fit_everywhere, install
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.cli.profile import kernel_table as tables
from vmonarch_cli.cli.profile.model_table import break_even_words
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile import backends, kernel, plot, record
from vmonarch_cli.profile.break_even import break_even
from vmonarch_cli.profile.results import ChipPeak, KernelRow, KernelShape, OutputCheck, Spread
from vmonarch_kernels import Inputs, Options
from vmonarch_kernels.api import IMPLS
from vmonarch_kernels.cost import dense_flops, monarch_bytes, monarch_flops

SMALL = ("--shape", "5x24", "--heads", "2", "--head-dim", "16", "--repeats", "3", "--device", "cpu")
CAPTION = "CPU"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and a chip that is not measured: a product of 1024 x 1024 says nothing about a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vmonarch_cli.profile.chip.measure_chip", lambda device, dtype: ChipPeak(1e12, 1e11))


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["profile", *arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def rows_of(data: dict[str, Any], shape: int = 0) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in data["shapes"][shape]["rows"]}


# Help


@pytest.mark.parametrize("arguments", [[], ["kernel", "--help"], ["model", "--help"], ["quality", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from vmonarch_cli.cli.app import app\n"
        f"try:\n    app({['profile', *arguments]!r})\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'triton', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("kernel" in done.stdout and "quality" in done.stdout) or "--json" in done.stdout


# A run


def test_every_preset_stands_against_every_backend_and_the_record_says_where(tmp_path: Path) -> None:
    result = call("kernel", *SMALL, "--shape", "2x24", "--json", "deep/out.json")
    assert re.search(r"2x24: timing, about \d+:\d\d left\n", result.stderr)
    for words in ("5 x 24 = 120 tokens", "2 x 24 = 48 tokens", "flash", "fast warm", "balanced warm", "CPU (", "torch"):
        assert words in result.stdout
    data = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert (data["kind"], data["checks_passed"], data["skipped"]) == ("kernel", True, [])
    assert data["finished"] >= data["started"]
    assert data["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert data["device"]["name"].startswith("CPU")
    assert {"dtype": "float32", "heads": 2, "head_dim": 16, "batch": 1}.items() <= data["settings"].items()
    rows = rows_of(data)
    assert list(rows) == ["flash", "paper", "fast", "balanced", "quality", "exact"]
    grid = (5, 24, 1)
    assert rows["flash"]["flops"] == dense_flops(grid, 2, 16)
    assert rows["paper"]["flops"] == monarch_flops(grid, 2, 16)
    fast = Options(num_steps=1, first_frame=False, band=0)
    assert rows["fast"]["flops"] == monarch_flops(grid, 2, 16, options=fast, warm=True, refresh=0.6)
    assert (rows["paper"]["note"], rows["fast"]["note"], rows["quality"]["note"]) == ("cold", "warm", "exact")
    for row in rows.values():
        time = row["time"]
        assert 0 < time["low"] <= time["median"] <= time["high"]
        assert time["count"] == 3
        assert row["passed"]
        assert row["check"]["error"] <= row["check"]["budget"]
        assert row["floor_share"] == pytest.approx(row["floor_s"] / time["median"])
        assert row["over_fastest_dense"] == pytest.approx(rows["flash"]["time"]["median"] / time["median"])
    assert rows["exact"]["error"] < 1e-5 < rows["balanced"]["error"] < rows["paper"]["error"] < 1
    notes = {name: row["note"] for name, row in rows_of(data, 1).items() if row["kind"] == "structured"}
    assert notes == {"paper": "cold", "fast": "warm", "balanced": "exact", "quality": "exact", "exact": "exact"}


def test_json_on_stdout_is_all_there_is() -> None:
    data = json.loads(call("kernel", *SMALL, "--preset", "paper", "--json", "-").stdout)
    assert list(rows_of(data)) == ["flash", "paper"]


@pytest.mark.parametrize("kind", ["video", "random"])
def test_inputs_are_standard_normal(kind: Any) -> None:
    size = {"dtype": torch.float32, "device": torch.device("cpu")}
    from vmonarch_cli.profile.inputs import attention_inputs

    q, k, v = attention_inputs(kind, (2, 6, 50, 4, 32), **size)
    for x in (q, k, v):
        assert x.shape == (2, 300, 4, 32)
        assert abs(float(x.mean())) < 0.02
        assert float(x.std()) == pytest.approx(1, abs=0.02)
    frames = q.unflatten(1, (6, 50))
    neighbours = float((frames[:, 1:] * frames[:, :-1]).mean())
    assert neighbours == pytest.approx(0.9 if kind == "video" else 0.0, abs=0.03)
    assert float((q * k).mean()) == pytest.approx(0.5 if kind == "video" else 0.0, abs=0.03)
    assert torch.equal(attention_inputs(kind, (2, 6, 50, 4, 32), **size)[1], k)


def test_a_sampled_error_is_that_of_its_queries() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 30, 3, 16) for _ in range(3))
    some, everything = backends.ExactSample(q, k, v, queries=7), backends.ExactSample(q, k, v)
    assert (some.stride, some.count, everything.count) == (5, 6, 30)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert everything.error(dense) < 1e-6
    wrong = dense.clone()
    wrong[:, 1] += 1  # not among the queries that the sample looks at
    assert some.error(wrong) < 1e-6
    assert everything.error(1.1 * dense) == pytest.approx(0.1, rel=1e-3)


# Checks, failures, budgets


def test_a_wrong_kernel_is_marked_and_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    real = IMPLS["torch"]

    def wrong(inputs: Inputs, options: Options, return_l: bool) -> tuple[Tensor, Tensor | None]:
        out, factor = real(inputs, options, return_l)
        return (out if return_l else out + 1e-3), factor

    monkeypatch.setitem(IMPLS, "torch", wrong)
    result = call("kernel", *SMALL, "--preset", "paper", "--preset", "fast", "--json", "out.json", code=1)
    assert "paper cold ✗" in result.stdout
    assert "paper: check failed: error" in " ".join(result.stdout.split())
    assert "error: check failed: paper at 5x24" in result.stderr
    data = json.loads(Path("out.json").read_text())
    assert data["checks_passed"] is False
    assert not rows_of(data)["paper"]["passed"]
    assert rows_of(data)["fast"]["passed"]


def test_a_backend_that_cannot_run_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Any, k: Any, v: Any) -> Any:
        raise RuntimeError("no kernel for this card\nand a page of details")

    found = [backends.DenseBackend("fa9", broken), *backends.installed_backends(torch.device("cpu"), torch.float32, 64)]
    monkeypatch.setattr(kernel, "installed_backends", lambda device, dtype, head_dim: found)
    result = call("kernel", *SMALL, "--preset", "paper", "--json", "out.json")
    assert "fa9 has no figures: RuntimeError: no kernel for this card" in result.stdout
    data = json.loads(Path("out.json").read_text())
    assert rows_of(data)["fa9"]["failure"] == "RuntimeError: no kernel for this card"
    assert data["checks_passed"] is True
    assert data["shapes"][0]["fastest_dense"] == "flash"


def test_packages_of_dense_attention_are_rows_and_a_quantised_one_is_no_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", monkeypatch, "fa4", "fa3", "sage")
    fit_everywhere(monkeypatch)
    result = call("kernel", *SMALL, "--dtype", "bf16", "--preset", "paper", "--json", "out.json")
    assert "quantised backends are not what speedups refer to" in " ".join(result.stdout.split())
    data = json.loads(Path("out.json").read_text())
    rows = rows_of(data)
    assert [name for name, row in rows.items() if row["kind"] == "dense"] == ["flash", "fa4", "fa3", "sage"]
    assert all(row["passed"] and row["time"] for row in rows.values())
    assert rows["sage"]["note"] == "quantised"
    assert data["shapes"][0]["fastest_dense"] in ("flash", "fa4", "fa3")


SOL = ["sol 2 %", "sol 10 %", "sol 20 %", "sol tau 1.5", "sol tau 1", "sol tau 0.5"]


def test_sparse_peers_are_rows_with_their_error_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--shape", "13x96", "--heads", "2", "--repeats", "3", "--device", "cpu", "--preset", "paper")
    install(tmp_path / "packages", monkeypatch, "sol")
    result = call("kernel", *small, "--head-dim", "64", "--dtype", "bf16", "--json", "out.json")
    assert "sol: Sol-Attn, INT8, by top-k share or threshold tau; comfy-kitchen" in " ".join(result.stdout.split())
    data = json.loads(Path("out.json").read_text())
    rows = rows_of(data)
    assert [name for name, row in rows.items() if row["kind"] == "peer"] == SOL
    assert all(rows[name]["note"].startswith("comfy-kitchen ") and rows[name]["time"] for name in SOL)
    errors = [rows[name]["error"] for name in SOL]
    assert errors[0] > errors[1] > errors[2] > 0, "more blocks, less error"
    assert errors[3] > errors[4] > errors[5] > 0
    dense = rows["flash"]["flops"]
    assert rows["sol 10 %"]["flops"] == round(dense * (0.1 + 0.9 / 64))
    assert rows["sol tau 1"]["flops"] is None
    assert rows["sol tau 1"]["floor_s"] is None
    assert data["shapes"][0]["fastest_dense"] == "flash", "no peer is a dense backend"
    calls = importlib.import_module("comfy_kitchen").calls
    assert set(calls) == {
        ((1, 1248, 2, 128), 64**-0.5, share, tau)
        for share, tau in [(0.02, 1.0), (0.1, 1.0), (0.2, 1.0), (0.0, 1.5), (0.0, 1.0), (0.0, 0.5)]
    }, "heads are filled up, the scale stays that of 64"
    narrow = call("kernel", *small, "--head-dim", "64", "--dtype", "fp32", "--json", "wide.json")
    assert "sol" not in narrow.stdout, "it takes 16 bit"


def test_a_peer_that_fails_is_a_row_with_its_reason_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = ("    calls.append", "    raise MemoryError('too long')\n    calls.append")
    install(tmp_path / "packages", monkeypatch, "sol", change=fails)
    small = ("--shape", "5x24", "--heads", "2", "--head-dim", "128", "--repeats", "3", "--device", "cpu")
    result = call("kernel", *small, "--dtype", "bf16", "--preset", "paper", "--json", "out.json")
    assert "sol 2 % has no figures: MemoryError: too long" in result.stdout
    assert json.loads(Path("out.json").read_text())["checks_passed"] is True


def test_a_preset_that_cannot_run_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = call("kernel", *SMALL, "--preset", "paper", "--impl", "triton", code=1)
    assert "paper has no figures" in result.stdout
    assert "TRITON_INTERPRET" in " ".join(result.stdout.split())
    assert "flash" in result.stdout


def test_a_result_that_is_not_finite_fails_and_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLS, "torch", lambda inputs, options, return_l: (torch.full_like(inputs.q, math.nan), None))
    call("kernel", *SMALL, "--preset", "paper", "--json", "out.json", code=1)
    row = rows_of(json.loads(Path("out.json").read_text()))["paper"]
    assert (row["error"], row["check"]["error"], row["passed"]) == (None, None, False)


def test_what_does_not_fit_the_budget_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "estimate_seconds", lambda done, frames, positions: 1e9 if done else 0.0)
    result = call("kernel", *SMALL, "--shape", "9x24", "--seconds", "600", "--preset", "paper", "--json", "out.json")
    assert "warning: 9x24 was left out: --seconds 600 would not be enough" in result.stderr
    data = json.loads(Path("out.json").read_text())
    assert [entry["what"] for entry in data["skipped"]] == ["9x24"]
    assert len(data["shapes"]) == 1


def test_compilation_is_not_expected_to_grow_with_the_shape() -> None:
    row = KernelRow("paper", "structured", first_call_s=20.0)
    done = [(KernelShape(5, 24, [row]), 22.0)]
    assert kernel.estimate_seconds(done, 10, 24) == pytest.approx(20 + 4 * 2)
    assert kernel.estimate_seconds([], 10, 24) == 0


def test_the_record_is_written_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel.profile_shape
    seen: list[int] = []

    def watched(settings: Any, chip: Any, frames: int, *rest: Any) -> Any:
        data = json.loads(Path("out.json").read_text())
        seen.append(len(data.get("shapes", [])))
        assert data["finished"] is None
        return real(settings, chip, frames, *rest)

    monkeypatch.setattr(kernel, "profile_shape", watched)
    call("kernel", *SMALL, "--shape", "2x24", "--preset", "paper", "--json", "out.json")
    assert seen == [0, 1]
    assert [path.name for path in Path.cwd().iterdir()] == ["out.json"]


def test_fail_below() -> None:
    call("kernel", *SMALL, "--fail-below", "0")
    result = call("kernel", *SMALL, "--fail-below", "1e5", code=1)
    assert "error: --fail-below 100000: paper is " in result.stderr
    assert "x flash at 5x24" in result.stderr
    result = call("kernel", *SMALL, "--preset", "fast", "--fail-below", "1e5", code=1)
    assert "--fail-below 100000: fast is " in result.stderr
    assert "paper" not in result.stderr


def test_repeats_stop_with_the_time_but_never_before_three() -> None:
    from vmonarch_cli.profile.repeat import MIN_ROUNDS, Budget, timed

    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = timed(calls, torch.device("cpu"), repeats=50, seconds=0.0)
    assert [len(values) for values in found.values()] == [MIN_ROUNDS] * 3
    assert Budget(None).allows(1e12)
    assert not Budget(1.0).allows(2.0)


def test_no_call_always_follows_the_same_other_and_every_process_has_the_same_order() -> None:
    from vmonarch_cli.profile.repeat import timed

    orders: list[list[str]] = [[], []]
    for order in orders:
        timed({name: (lambda name=name, order=order: order.append(name)) for name in "abc"}, torch.device("cpu"), 40)
    assert orders[0] == orders[1]
    rounds = ["".join(orders[0][i : i + 3]) for i in range(0, 120, 3)]
    assert {tuple(sorted(names)) for names in rounds} == {("a", "b", "c")}
    assert {pair for names in rounds for pair in (names[:2], names[1:])} == {"ab", "ac", "ba", "bc", "ca", "cb"}


def test_short_calls_on_a_gpu_are_timed_in_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    from vmonarch_cli.profile import repeat

    order: list[str] = []

    class CountingClock:
        seconds = staticmethod(lambda start, stop: 1.0)

        def __init__(self, device: torch.device) -> None: ...

        def settle(self) -> None: ...

        def mark(self) -> float:
            order.append("|")
            return 0.0

    def taking(seconds: float, name: str) -> Callable[[], None]:
        run = functools.partial(order.append, name)
        durations[run] = seconds
        return run

    durations: dict[Any, float] = {}
    calls = {"a": taking(0.01, "a"), "b": taking(0.2, "b")}
    monkeypatch.setattr(repeat, "Clock", CountingClock)
    monkeypatch.setattr(repeat, "wall", lambda run, device: (durations[run], None))
    found = repeat.timed(calls, torch.device("cuda"), 1, burst_s=0.03)
    assert "".join(order) in ("aaa|aaa||b|", "|b|aaa|aaa|")
    assert found == {"a": [pytest.approx(1 / 3)], "b": [1.0]}


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_file_that_is_there_is_kept(flag: str) -> None:
    pytest.importorskip("matplotlib")
    path = Path("kept.json" if flag == "--json" else "kept.svg")
    path.write_text("an hour of work")
    result = call("kernel", *SMALL, "--preset", "paper", flag, str(path), code=2)
    assert result.stderr == (f"error: {flag}: {path} exists already: pass --overwrite to replace it, or another file\n")
    assert path.read_text() == "an hour of work"
    call("kernel", *SMALL, "--preset", "paper", flag, str(path), "--overwrite")
    assert "paper" in path.read_text()


def test_a_commit_can_be_named_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(record.COMMIT_VARIABLE, "abc123")
    assert record.commit() == {"id": "abc123", "dirty": None}


# Bad input: one sentence, exit 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("kernel", "--shape", "21"),
            "--shape takes latent frames x positions per frame, as in 21x1560 or 20x1456, got '21'",
        ),
        (("kernel", "--shape", "300x4"), "--shape takes 1 to 256 latent frames, got 300"),
        (("kernel", "--shape", "200x99999"), "--shape takes shapes of 1 to 2,000,000 tokens, got 19,999,800"),
        (("kernel", "--heads", "0"), "--heads takes a whole number from 1 to 256, got 0"),
        (("kernel", "--dtype", "int8"), "--dtype takes auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16)"),
        (("kernel", "--impl", "cuda"), "--impl takes auto, reference, torch or triton, got 'cuda'"),
        (("kernel", "--inputs", "noise"), "--inputs takes video or random, got 'noise'"),
        (("kernel", "--preset", "dense"), "--preset dense is dense attention, which is measured anyway"),
        (("kernel", "--seconds", "0"), "--seconds takes a number from 1 to 1e+06, got 0"),
        (("kernel", "--plot", "x.pdf"), "--plot takes a file that ends in .png or .svg, got x.pdf"),
        (("kernel", "--json", "."), "--json takes a file, and . is a folder"),
        (("kernel", "--json", "a\0b"), "--json 'a\\x00b' holds a NUL character, which no path can"),
        (("model", "-m", "nothing"), "there is no model 'nothing'"),
        (("model", "-m", "wan2.1-1.3b", "--random-weights", "--num-frames", "80"), "80 frames do not fit wan2.1-1.3b"),
        (
            ("model", "-m", "allegro", "--random-weights"),
            "whole models are profiled for WanPipeline, CogVideoXPipeline",
        ),
        (("model", "-m", "wan2.1-1.3b", "--random-weights", "--backend", "fa9"), "--backend takes cudnn, flash"),
        (("quality", "--sweep", "ful"), "--sweep takes quick, full, paper, got 'ful' (did you mean full?)"),
        (("quality", "-m", "wan2.1-1.3b", "--prompts", "9"), "--prompts takes at most 8 for wan2.1-1.3b, got 9"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], expected: str) -> None:
    result = call(*arguments, code=2)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr
    assert list(Path.cwd().iterdir()) == []


def test_an_error_is_json_only_where_stdout_is() -> None:
    assert call("kernel", "--heads", "0", "--json", "out.json", code=2).stdout == ""
    assert json.loads(call("kernel", "--heads", "0", "--json", "-", code=2).stdout)["exit_code"] == 2


def test_a_plot_without_matplotlib_is_refused_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    monkeypatch.setattr(kernel, "run_kernel", lambda *a: pytest.fail("measured all the same"))
    result = call("kernel", *SMALL, "--plot", "x.png", code=2)
    assert result.stderr == ("error: --plot needs matplotlib, which is not installed: pip install 'vmonarch[plot]'\n")


def test_calls_that_differ_in_turn_count_by_their_mean() -> None:
    # Three calls of four recompute a frame: the median of all of them would leave the fourth out.
    spread = Spread.over([1.0, 1.0, 1.1, 0.5] * 3, period=4)
    assert spread.median == pytest.approx(0.9)
    assert spread.width == pytest.approx(0)
    assert Spread.over([1.0, 2.0, 3.0], period=1) == Spread.of([1.0, 2.0, 3.0])
    assert Spread.over([1.0], period=4) == Spread.of([1.0])
    assert Spread.over([1.0, 1.0, 1.1, 0.5], period=4) == Spread(pytest.approx(0.9), 0.5, 1.1, 4)


# What is shown


def shape_of(frames: int, positions: int, *, gain: float = 4.0, on_gpu: bool = True) -> KernelShape:
    """A result with invented figures."""
    good = OutputCheck(1e-3, 2e-3, "a wider type")
    dense_s = 1e-10 * (frames * positions) ** 2
    common: dict[str, Any] = {"flops": 10**12, "floor_s": 1e-3, "error": 0.1, "check": good, "first_call_s": 1.0}
    peak = 10**8 if on_gpu else None

    def spread(seconds: float) -> Spread:
        return Spread(seconds, 0.99 * seconds, 1.02 * seconds, 20)

    return KernelShape(
        frames,
        positions,
        [
            KernelRow("flash", "dense", time=spread(1.6 * dense_s), peak_bytes=peak, **common),
            KernelRow("cudnn", "dense", time=spread(dense_s), peak_bytes=peak, **common),
            KernelRow("sage", "dense", note="quantised", time=spread(0.1 * dense_s), peak_bytes=peak, **common),
            KernelRow("paper", "structured", note="cold", time=spread(dense_s / gain), peak_bytes=peak, **common),
            KernelRow("exact", "structured", note="exact", time=spread(dense_s), peak_bytes=peak, **common),
            KernelRow("fa3", "dense", failure="ImportError: no"),
        ],
    )


def test_speedups_refer_to_the_fastest_dense_backend_that_is_right() -> None:
    shape = shape_of(21, 1560)
    assert shape.fastest_dense is shape.row("cudnn")  # not the quantised one, which is faster
    paper = shape.row("paper")
    assert paper is not None
    assert shape.speedup(paper, shape.fastest_dense) == pytest.approx(4.0)
    assert shape.speedup(paper, shape.row("flash")) == pytest.approx(6.4)
    assert shape.speedup(paper, shape.row("fa3")) is None


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    caption = "NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, triton 3.6.0, bfloat16, batch 1, 12 heads x 128"
    console = Console(width=width, file=io.StringIO())
    console.print(tables.kernel_table(shape_of(81, 1456), caption, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    for words in ("117,936 tokens", "paper cold", "4.00x", "6.40x", "H100", "fa3 has no figures: ImportError: no"):
        assert words in text
    assert ("first call" in text) == (width == 120)


@pytest.mark.parametrize(("on_gpu", "papers"), [(True, True), (False, False)])
def test_the_plot_marks_what_the_paper_reports(tmp_path: Path, on_gpu: bool, papers: bool) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "x.svg"
    plot.plot_kernel([shape_of(20, 1456, on_gpu=on_gpu), shape_of(81, 1456, on_gpu=on_gpu)], CAPTION, target)
    text = target.read_text()
    assert ("VMonarch paper, as it reports" in text) == papers
    assert ("&gt;5x" in text) == papers
    assert "against the fastest dense backend" in text
    assert "81 x 1456" in text
    assert CAPTION in text


@pytest.mark.parametrize(
    ("shapes", "lines"),
    [
        pytest.param([(13, 144), (13, 256), (13, 576)], 1, id="each length has a frame size of its own"),
        pytest.param([(13, 144), (25, 144), (13, 576)], 2, id="two lengths of one frame size, and another"),
    ],
)
def test_points_of_a_preset_are_joined(tmp_path: Path, shapes: list[tuple[int, int]], lines: int) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    drawn: list[tuple[str, int]] = []
    plotted = matplotlib.axes.Axes.plot

    def watched(self: Any, x: Any, y: Any, *args: Any, **more: Any) -> Any:
        drawn.append((more.get("color", ""), len(x)))
        return plotted(self, x, y, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.axes.Axes, "plot", watched)
        plot.plot_kernel([shape_of(*shape, on_gpu=False) for shape in shapes], CAPTION, tmp_path / "x.svg")
    first = [count for colour, count in drawn if colour == drawn[0][0]]
    assert len(first) % lines == 0
    assert sum(first) % len(shapes) == 0
    assert max(first) == (3 if lines == 1 else 2)
    text = (tmp_path / "x.svg").read_text()
    assert "latent frames x positions in a frame" in text
    assert ("a dot alone has another size" in text) == (lines == 2)


def test_a_plot_is_drawn_by_the_command() -> None:
    pytest.importorskip("matplotlib")
    call("kernel", *SMALL, "--preset", "paper", "--plot", "x.png")
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


# Where it begins to pay


def test_break_even_lies_where_the_lines_cross() -> None:
    found = break_even("paper", [shape_of(8, 100, gain=2.0), shape_of(2, 100, gain=0.5)])
    assert found is not None
    assert (found.kind, found.tokens) == ("between", pytest.approx(400.0))
    assert "breaks even near 400 tokens at 8x8" in break_even_words(found, (8, 8, 1))


@pytest.mark.parametrize(
    ("gains", "kind", "tokens", "words"),
    [
        ((2.0, 4.0), "below", None, "faster from the shortest length measured on (200 tokens"),
        ((0.25, 0.5), "above", 3200.0, "break-even would be near 3,200 tokens"),
        ((0.5, 0.25), "above", None, "no break-even in sight up to 800 tokens"),
        ((0.5, 0.5 + 1e-9), "above", None, "no break-even in sight up to 800 tokens"),
    ],
)
def test_break_even_outside_of_what_was_measured(
    gains: tuple[float, float], kind: str, tokens: float | None, words: str
) -> None:
    shapes = [
        shape_of(2, 100, gain=gains[0]),
        shape_of(4, 100, gain=math.sqrt(gains[0] * gains[1])),
        shape_of(8, 100, gain=gains[1]),
    ]
    found = break_even("paper", shapes)
    assert found is not None
    assert found.kind == kind
    assert found.tokens == (None if tokens is None else pytest.approx(tokens, rel=1e-6))
    assert words in break_even_words(found, (8, 8, 1))
    assert break_even("paper", shapes[:1]) is None


def test_bytes_of_a_call() -> None:
    tensor = 21 * 1560 * 12 * 128 * 2
    assert monarch_bytes((21, 30, 52), 12, 128) == 17 * tensor  # R 3, L 3, R with V 5, L 4, first frame 2
    assert monarch_bytes((21, 30, 52), 12, 128, options=Options(band=30)) == 4 * tensor
    warm = monarch_bytes((21, 30, 52), 12, 128, options=Options(num_steps=1, band=0), warm=True)
    assert warm == 18 * tensor + 2 * 12 * 1560 * 21 * 24
    preset = load_preset("paper")
    assert (preset.num_steps, preset.band) == (2, None)
