"""`vmonarch profile model`: rows, records and verdicts of whole denoising steps on tiny models."""

from __future__ import annotations

import importlib
import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_packages import install
from rich.console import Console
from tiny_wan import tiny_transformer
from typer.testing import CliRunner, Result

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.cli.app import app
from vmonarch_cli.cli.profile import model_table as tables
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.cogvideox import COGVIDEOX_2B, COGVIDEOX_5B, COGVIDEOX_15
from vmonarch_cli.models.cosmos import COSMOS_25_2B, COSMOS_25_14B
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.models.hunyuan import HUNYUAN_VIDEO
from vmonarch_cli.models.minimax import MINIMAX_H3
from vmonarch_cli.models.wan import WAN21_1_3B, WAN21_14B, WAN22_5B, transformer_config
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile import contenders, model, steps
from vmonarch_cli.profile.results import BreakEven, ChipPeak, ModelProfile, Spread, StepRow

TINY = ("--size", "48x32", "--num-frames", "17", "--device", "cpu", "--steps", "2")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vmonarch_cli.profile.chip.measure_chip", lambda device, dtype: ChipPeak(1e12, 1e11))


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["profile", "model", *arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def by_name(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{row['name']} {row['note']}".strip(): row for row in data["model"]["rows"]}


def test_steps_dense_structured_and_skipped(tiny_wan_folder: Path) -> None:
    presets = ("--preset", "paper", "--preset", "fast", "--preset", "quality")
    result = call("-m", str(tiny_wan_folder), *TINY, *presets, "--json", "out.json")
    data = json.loads(Path("out.json").read_text())
    assert (data["kind"], data["checks_passed"]) == ("model", True)
    assert (data["model"]["tokens"], data["model"]["forwards"], data["model"]["grid"]) == (30, 2, [5, 2, 3])
    rows = by_name(data)
    assert list(rows) == ["sdpa", "paper", "fast cold", "fast warm", "quality cold", "quality warm", "skipped"]
    assert all(row["failure"] is None and row["step"]["median"] > 0 for row in rows.values())
    assert rows["sdpa"]["over_fastest_dense"] == 1
    assert rows["paper"]["step"]["count"] == 2
    assert rows["paper"]["attention_s"] < rows["paper"]["step"]["median"]
    assert 0 < rows["fast warm"]["error"] < 1
    # The clip: one cold step and the rest warm; quality's first fifth of the steps dense.
    median = {name: row["step"]["median"] for name, row in rows.items()}
    steps = data["model"]["clip_steps"]
    expected = median["fast cold"] + (steps - 1) * median["fast warm"]
    assert rows["fast warm"]["clip_s"] == pytest.approx(expected)
    dense = steps // 5
    expected = dense * median["sdpa"] + median["quality cold"] + (steps - dense - 1) * median["quality warm"]
    assert rows["quality warm"]["clip_s"] == pytest.approx(expected)
    beside = data["model"]["text_encode_s"] + data["model"]["decode_s"]
    assert rows["paper"]["end_to_end_s"] == pytest.approx(rows["paper"]["clip_s"] + beside)
    # Exact attention through the swapped layers is the dense model, and the lengths were checked, too.
    assert any("exact against dense" in check["against"] for check in data["checks"])
    assert [length["frames"] for length in data["lengths"]] == [2, 5]
    assert len(data["verdicts"]) == 3
    shown = " ".join(result.stdout.split())
    assert all(sentence in shown for sentence in data["verdicts"])
    assert "2 forwards" in shown


def test_fused_blocks_have_rows_beside_the_stock_ones(tiny_wan_folder: Path) -> None:
    presets = ("--preset", "paper", "--preset", "fast")
    result = call("-m", str(tiny_wan_folder), *TINY, *presets, "--fuse", "--json", "out.json")
    data = json.loads(Path("out.json").read_text())
    rows = by_name(data)
    fused = {"paper, fused in torch": "paper", "fast, fused in torch cold": "fast", "fast, fused in torch warm": "fast"}
    others = {"sdpa, fused in torch": "sdpa", "skipped, fused in torch": "skipped"}
    assert list(rows) == [
        "sdpa",
        "paper",
        "fast cold",
        "fast warm",
        *fused,
        *list(others)[:1],
        "skipped",
        *list(others)[1:],
    ]
    assert {name: row["stock"] for name, row in rows.items() if row["stock"]} == fused | others
    for name, row in rows.items():
        assert row["failure"] is None
        if name in fused:
            stock = rows[name.replace(", fused in torch", "")]
            assert (row["error"] is None) == (stock["error"] is None) == ("cold" in name)
            assert (row["clip_s"] is None) == (stock["clip_s"] is None)
            assert row["error"] is None or row["error"] == pytest.approx(stock["error"], rel=1e-3)
    fastest = min((rows[name]["step"]["median"], name) for name in ("sdpa", "sdpa, fused in torch"))
    assert data["model"]["fastest_dense"] == fastest[1], (
        "a preset is held against dense attention among fused blocks, too"
    )
    assert rows["paper, fused in torch"]["over_fastest_dense"] == pytest.approx(
        fastest[0] / rows["paper, fused in torch"]["step"]["median"]
    )
    for name, how in (
        ("paper", ""),
        ("paper, fused in torch", ", fused in torch"),
        ("sdpa, fused in torch", ", fused in torch"),
    ):
        floor, row = rows[f"skipped{how}"]["step"]["median"], rows[name]
        assert row["attention_share"] == pytest.approx(max(0.0, 1 - floor / row["step"]["median"])), (
            "of the same blocks"
        )
    assert data["settings"]["fused"] == "torch"
    assert any("preset exact with fused blocks against dense" in check["against"] for check in data["checks"])
    assert data["checks_passed"]
    shown = " ".join(result.stdout.split())
    assert re.search(r"paper, fused in torch: .*?; with stock blocks it takes \d\.\d\d times as long", shown)
    assert (
        "--fuse: the blocks of a CogVideoXPipeline have no fused form"
        in call("-m", "cogvideox-2b", "--random-weights", "--fuse", code=2).stderr
    )


def test_random_weights_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "load_pipeline", lambda *a, **k: pytest.fail("loaded a model"))
    arguments = ("-m", "demo", "--random-weights", "--size", "32x32", "--num-frames", "9", "--guidance-scale", "1")
    data = json.loads(call(*arguments, "--steps", "1", "--device", "cpu", "--json", "-").stdout)
    assert (data["model"]["tokens"], data["model"]["forwards"]) == (3 * 4 * 4, 1)
    assert all(row["error"] is None for row in data["model"]["rows"])
    assert data["model"]["text_encode_s"] is None
    assert data["checks_passed"]


def test_fewer_layers_of_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    real = model.random_transformer

    def made(entry: ModelEntry, *rest: Any) -> Any:
        built.append(entry.layers)
        return real(entry, *rest)

    monkeypatch.setattr(model, "random_transformer", made)
    arguments = ("-m", "demo", "--random-weights", "--size", "32x32", "--num-frames", "9", "--device", "cpu")
    data = json.loads(call(*arguments, "--layers", "2", "--steps", "1", "--json", "-").stdout)
    assert built == [2]
    assert data["settings"]["layers"] == 2
    assert f"2 of the model's {DEMO.layers} layers: all times are theirs alone" in data["model"]["notes"]
    assert data["checks_passed"]
    wrong = call(*arguments, "--layers", "99", code=2).stderr
    assert f"--layers takes a whole number from 1 to {DEMO.layers}, got 99" in wrong
    assert "--layers leaves out layers of random weights" in call("-m", "demo", "--layers", "2", code=2).stderr


def test_the_random_transformer_is_the_published_one() -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        transformer = WanTransformer3DModel(**transformer_config(WAN21_1_3B))
    assert sum(p.numel() for p in transformer.parameters()) == WAN21_1_3B.transformer_params
    small = DEMO.model_copy(update={"layers": 1, "ffn_dim": 32})
    made = model.random_transformer(small, torch.device("cpu"), torch.bfloat16)
    assert made.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert made.scale_shift_table.dtype == torch.float32
    assert made.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "entry",
    [
        WAN21_14B,
        WAN22_5B,
        COGVIDEOX_2B,
        COGVIDEOX_5B,
        COGVIDEOX_15,
        HUNYUAN_VIDEO,
        MINIMAX_H3,
        COSMOS_25_2B,
        COSMOS_25_14B,
    ],
    ids=lambda entry: entry.alias,
)
def test_every_random_transformer_has_its_models_size(entry: ModelEntry) -> None:
    import diffusers

    facts = PIPELINES[entry.pipeline]
    assert facts.transformer_config is not None
    with torch.device("meta"):
        transformer = getattr(diffusers, facts.transformer)(**facts.transformer_config(entry))
    assert sum(p.numel() for p in transformer.parameters()) == entry.transformer_params


@pytest.mark.parametrize(
    "entry",
    [COGVIDEOX_2B, COGVIDEOX_5B, COGVIDEOX_15, HUNYUAN_VIDEO, MINIMAX_H3, COSMOS_25_2B],
    ids=lambda entry: entry.alias,
)
def test_other_models_with_random_weights(entry: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = entry in (HUNYUAN_VIDEO, MINIMAX_H3)
    sizes = {"layers": 3, "heads": 2, "head_dim": 128 if wide else 32, "text_dim": 32}
    if entry is MINIMAX_H3:
        sizes["ffn_dim"] = 64
    small = entry.model_copy(update={**sizes, "max_sequence_length": 16})
    monkeypatch.setattr("vmonarch_cli.cli.profile.request.find_model", lambda name: (small, ""))
    size, frames = ("96x64", "124") if entry is MINIMAX_H3 else ("64x48", "17")
    shape = ("--size", size, "--num-frames", frames, "--steps", "1", "--device", "cpu")
    data = json.loads(call("-m", entry.alias, "--random-weights", "--preset", "paper", *shape, "--json", "-").stdout)
    assert data["checks_passed"], data["checks"]
    assert any("exact against dense" in check["against"] for check in data["checks"])
    assert data["model"]["forwards"] == (1 if entry.embedded_guidance else 2)
    masked = ["dense"] if entry is HUNYUAN_VIDEO else []  # its stock model masks the text's padding
    assert [row["name"] for row in data["model"]["rows"]] == ["sdpa", *masked, "paper", "skipped"]
    assert all(row["failure"] is None for row in data["model"]["rows"])
    assert [row["name"] for row in data["model"]["rows"] if row["kind"] == "dense"] == ["sdpa", *masked]


def test_one_failing_kind_is_a_row_and_the_others_go_on(tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = AttentionSession.attend

    def attend(self: AttentionSession, *arguments: Any) -> Any:
        if self.preset.name == "paper":
            raise RuntimeError("the kernel is not for this card")
        return real(self, *arguments)

    monkeypatch.setattr(AttentionSession, "attend", attend)
    presets = ("--preset", "paper", "--preset", "fast")
    result = call("-m", str(tiny_wan_folder), *TINY, *presets, "--json", "out.json", code=1)
    rows = by_name(json.loads(Path("out.json").read_text()))
    assert rows["paper"]["failure"] == "RuntimeError: the kernel is not for this card"
    assert rows["fast warm"]["step"] is not None
    assert "error: check failed: paper" in result.stderr


def test_a_kind_that_fails_later_on_keeps_the_others(tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steps.timed_step

    def step(contender: Any, *rest: Any) -> Any:
        if contender.row.name == "paper":
            raise torch.cuda.OutOfMemoryError("a page of details")
        return real(contender, *rest)

    monkeypatch.setattr(steps, "timed_step", step)
    call("-m", str(tiny_wan_folder), *TINY, "--preset", "paper", "--preset", "fast", "--json", "out.json", code=1)
    rows = by_name(json.loads(Path("out.json").read_text()))
    assert rows["paper"]["failure"] == "out of memory"
    assert rows["fast warm"]["step"]["count"] == 2


def test_what_puts_an_attention_in_its_place_is_no_part_of_a_step() -> None:
    transformer, cpu = tiny_transformer(), torch.device("cpu")
    paper = contenders.contenders(transformer, [load_preset("paper")], cpu, torch.float32)[1]
    inputs = steps.StepTensors(torch.randn(1, 4, 5, 4, 6), torch.tensor([900.0]), (torch.randn(1, 8, 32),), 1.0)

    @contextmanager
    def slow() -> Iterator[None]:
        with paper.enter():
            time.sleep(1.0)
            yield
            time.sleep(1.0)

    with torch.no_grad():
        expected = steps.predict(paper, transformer, inputs)
        slowed = replace(paper, enter=slow)
        found = steps.timed_step(slowed, transformer, inputs, cpu)
    assert torch.equal(found, expected)
    assert max(slowed.seconds) < 1.0


def test_steps_that_recompute_no_frame_count_by_their_share(
    tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = steps.timed_step

    def step(contender: Any, *rest: Any) -> Any:
        found = real(contender, *rest)
        contender.seconds[-1] = 0.5 if len(contender.seconds) == 3 else 1.0
        return found

    monkeypatch.setattr(steps, "timed_step", step)
    presets = ("--preset", "fast", "--preset", "paper")
    call("-m", str(tiny_wan_folder), *TINY, "--steps", "5", *presets, "--json", "out.json")
    rows = by_name(json.loads(Path("out.json").read_text()))
    assert rows["fast warm"]["step"]["median"] == pytest.approx(0.9)  # `fast` leaves out every fifth
    assert rows["paper"]["step"]["median"] == 1.0


def test_broken_plumbing_fails_the_run(tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = AttentionSession.attend

    def attend(self: AttentionSession, q: Any, *rest: Any) -> Any:
        out = real(self, q, *rest)
        return 0.5 * out if self.preset.name == "exact" else out

    monkeypatch.setattr(AttentionSession, "attend", attend)
    result = call("-m", str(tiny_wan_folder), *TINY, "--json", "out.json", code=1)
    assert "preset exact against dense, one whole step: error" in result.stderr
    assert json.loads(Path("out.json").read_text())["checks_passed"] is False


def test_fail_below_looks_at_the_step(tiny_wan_folder: Path) -> None:
    result = call("-m", str(tiny_wan_folder), *TINY, "--fail-below", "1000", code=1)
    assert "error: --fail-below 1000: balanced is " in result.stderr


def test_compiled_blocks_keep_the_backends_apart() -> None:
    """Every kind of attention has its graph, and taking turns compiles nothing more."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, examples)

    torch._dynamo.reset()
    transformer = tiny_transformer()
    transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    cpu = torch.device("cpu")
    kinds = contenders.contenders(transformer, [load_preset("paper"), load_preset("fast")], cpu, torch.float32)
    layers = [block.attn1 for block in transformer.blocks]
    stock = [module.processor for module in layers]
    flash = contenders.contenders(transformer, [], cpu, torch.float32, backends=("flash",))[0]
    inputs = steps.StepTensors(torch.randn(1, 4, 5, 4, 6), torch.tensor([900.0]), (torch.randn(1, 8, 32),), 1.0)
    with torch.no_grad():
        first = {c.row.name: steps.predict(c, transformer, inputs) for c in [flash, *kinds]}
        made = len(graphs)
        for contender in [*kinds, flash]:
            steps.predict(contender, transformer, inputs)
    assert made == len(graphs) == 3  # flash, torch's own choice, and one for all that is swapped
    torch.testing.assert_close(first["flash"], first["sdpa"])
    assert not torch.allclose(first["skipped"], first["sdpa"], atol=1e-3)
    assert [module.processor for module in layers] == stock


def test_a_plot_of_the_steps(tiny_wan_folder: Path) -> None:
    pytest.importorskip("matplotlib")
    call("-m", str(tiny_wan_folder), *TINY, "--preset", "fast", "--plot", "steps.svg")
    text = Path("steps.svg").read_text()
    assert all(words in text for words in ("sdpa", "fast warm", "skipped", "30 tokens"))


# The verdict


def profile_of(structured_s: float) -> ModelProfile:
    """A 480p clip with invented figures."""

    def spread(seconds: float) -> Spread:
        return Spread(seconds, seconds, seconds, 5)

    rows = [
        StepRow("cudnn", "dense", step=spread(0.65), clip_s=32.5, peak_bytes=10**10, first_call_s=2.0),
        StepRow("flash", "dense", step=spread(0.87), clip_s=43.5, peak_bytes=10**10, first_call_s=2.0),
        StepRow("fast", "structured", "cold", spread(structured_s * 1.1), 0.1),
        StepRow("fast", "structured", "warm", spread(structured_s), 0.1, 9.0, 0.1, 10**10, 50 * structured_s),
        StepRow("skipped", "skipped", step=spread(0.3)),
    ]
    crossing = BreakEven("fast", 5120.0, "between", [(4000, 0.9), (8000, 1.6)])
    return ModelProfile("wan2.1-1.3b", True, False, (832, 480, 81), (21, 30, 52), 1, 50, rows, [crossing])


def test_the_verdict_names_the_gain() -> None:
    (sentence,) = tables.verdicts(profile_of(0.39))
    assert sentence == (
        "fast: a step is 1.67x as fast as with cudnn, the fastest dense and 2.23x as fast as with flash, 1.67x on the "
        "clip; the attention call breaks even near 5,100 tokens at 832x480"
    )


def test_the_verdict_says_when_it_is_not_worth_it() -> None:
    (sentence,) = tables.verdicts(profile_of(0.64))
    assert sentence.startswith("fast: not worth it at this size (1.02x on a step against cudnn, 1.02x on the clip); ")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    console.print(tables.model_table(profile_of(0.39), "NVIDIA H100 80GB HBM3, torch 2.11.0", width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    figures = ("54",) if width > 60 else ("no room for",)
    for words in ("32,760 tokens", "fast cold", "fast warm", "1.67x", "2.23x", "H100", *figures):
        assert words in text


def test_a_package_of_dense_attention_runs_in_the_model_like_torch_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "fa4", "sage")
    transformer, cpu = tiny_transformer().to(torch.bfloat16), torch.device("cpu")
    kinds = contenders.contenders(transformer, [], cpu, torch.bfloat16, backends=("flash", "fa4", "sage"))
    assert [(c.row.name, c.row.kind, c.row.note) for c in kinds[:3]] == [
        ("flash", "dense", ""),
        ("fa4", "dense", ""),
        ("sage", "dense", "quantised"),
    ]
    tensors = torch.randn(1, 4, 5, 4, 6, dtype=torch.bfloat16), torch.tensor([900.0])
    inputs = steps.StepTensors(*tensors, (torch.randn(1, 8, 32, dtype=torch.bfloat16),), 1.0)
    with torch.no_grad():
        flash, fa4, _ = (steps.predict(contender, transformer, inputs) for contender in kinds[:3])
    assert relative_error(fa4.float(), flash.float()) < 0.02
    assert len(importlib.import_module("flash_attn.cute").calls) == 1 + 3, "a check, and a call in each layer"
