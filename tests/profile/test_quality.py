"""`vmonarch profile quality`: variants, the paper's ablation, blocks of two frames."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_packages import install
from rich.console import Console
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.cli.profile import quality_table as tables
from vmonarch_cli.cli.profile import request
from vmonarch_cli.demo.captions import plain_caption
from vmonarch_cli.demo.score import held_out_specs
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile import quality
from vmonarch_cli.profile.blocks import block_attention, block_flops
from vmonarch_cli.profile.plot import plot_quality
from vmonarch_cli.profile.quality_results import QualityProfile, QualityRow
from vmonarch_cli.profile.results import ChipPeak
from vmonarch_cli.profile.variants import SWEEPS, variants
from vmonarch_kernels import dense_attention, monarch_attention
from vmonarch_kernels.cost import monarch_flops
from vmonarch_kernels.spec import Options

TINY = ("--size", "48x32", "--num-frames", "17", "--device", "cpu", "--steps", "2", "--prompts", "2")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vmonarch_cli.profile.chip.measure_chip", lambda device, dtype: ChipPeak(1e12, 1e11))


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["profile", "quality", *arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


# Variants


@pytest.mark.parametrize("sweep", SWEEPS)
def test_variants_are_distinct_and_end_with_the_check(sweep: str) -> None:
    found = variants(sweep)
    assert len({v.name for v in found}) == len(found)
    settings = {(v.preset.model_dump_json(exclude={"name", "description"}), v.frames_per_block) for v in found}
    assert len(settings) == len(found)
    assert found[-1].name == "exact"
    groups = [v.group for v in found[:-1]]
    assert len([g for g, before in zip(groups, [None, *groups], strict=False) if g != before]) == len(set(groups))


def test_the_sweeps_ask_what_they_promise() -> None:
    assert [v.name for v in variants("quick")] == ["paper", "fast", "balanced", "quality", "exact"]
    paper = {v.name: v for v in variants("paper")}
    assert {v.paper_psnr for v in paper.values()} == {None, 11.18, 12.59, 11.65}
    assert paper["2 iterations"].paper_psnr == 12.59
    assert paper["2 iterations, no first"].preset.first_frame is False
    assert paper["frame pairs"].frames_per_block == 2
    full = variants("full")
    assert {v.group for v in full} >= {"iterations", "band", "warm start", "c_floor", "dense steps", "frame pairs"}
    assert {v.preset.c_floor for v in full} >= {0.01, 0.1, 0.5}
    assert next(v for v in full if v.name == "paper").paper_psnr == 12.59  # "2 iterations" is the same setting


# Blocks of several frames


def tensors(frames: int, positions: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(frames)
    q, k, v = (torch.randn(2, frames * positions, 3, 16, dtype=torch.float64) for _ in range(3))
    return 2 * q, k, v


@pytest.mark.parametrize("first_frame", [True, False])
def test_blocks_of_one_frame_are_the_algorithm(first_frame: bool) -> None:
    q, k, v = tensors(5)
    options: dict[str, Any] = {"num_steps": 3, "first_frame": first_frame, "c_floor": 0.2}
    expected = monarch_attention(q, k, v, (5, 3, 4), impl="reference", **options)
    found = block_attention(q, k, v, (5, 3, 4), frames_per_block=1, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_pairs_of_an_even_clip_are_the_algorithm_on_a_grid_of_pairs() -> None:
    q, k, v = tensors(6)
    expected = monarch_attention(q, k, v, (3, 6, 4), impl="reference", first_frame=False)
    found = block_attention(q, k, v, (6, 3, 4), frames_per_block=2, first_frame=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    exact = dense_attention(q[:, :12], k, v)
    with_first = block_attention(q, k, v, (6, 3, 4), frames_per_block=2)
    torch.testing.assert_close(with_first[:, :12], exact)
    torch.testing.assert_close(with_first[:, 12:], expected[:, 12:])  # the recomputation is of frame 0, not of the pair


def test_the_first_frame_of_an_odd_clip_is_a_short_block() -> None:
    q, k, v = tensors(5)
    run = {"frames_per_block": 2, "first_frame": False}
    ones = block_attention(q, k, torch.ones_like(v), (5, 3, 4), **run)  # type: ignore[arg-type]
    torch.testing.assert_close(ones, torch.ones_like(v))  # rows of L R sum to one, with nothing on masked places
    # A block by itself is exact: with one pair and no first frame to lean on, T = 2 is dense attention.
    pair = block_attention(q[:, :24], k[:, :24], v[:, :24], (2, 3, 4), **run)  # type: ignore[arg-type]
    torch.testing.assert_close(pair, dense_attention(q[:, :24], k[:, :24], v[:, :24]))
    # Keys of the first frame count once, not twice: with all keys alike, attention is the plain mean of the values.
    flat = block_attention(q, torch.zeros_like(k), v, (5, 3, 4), **run)  # type: ignore[arg-type]
    torch.testing.assert_close(flat, v.mean(1, keepdim=True).expand_as(v))


def test_operations_of_blocks() -> None:
    paper = load_preset("paper")
    unit = 13 * 144 * 144 * 64 * 4
    assert block_flops((13, 12, 12), 4, 64, paper, 1) == monarch_flops((13, 12, 12), 4, 64)
    pairs = block_flops((13, 12, 12), 4, 64, paper, 2) - 4 * unit
    assert pairs == monarch_flops((7, 24, 12), 4, 64, options=Options(first_frame=False))


# Runs


def test_every_preset_against_dense(tiny_wan_folder: Path) -> None:
    result = call("-m", str(tiny_wan_folder), *TINY, "--batch", "2", "--json", "out.json")
    data = json.loads(Path("out.json").read_text())
    assert (data["kind"], data["checks_passed"]) == ("quality", True)
    rows = {row["name"]: row for row in data["quality"]["rows"]}
    assert list(rows) == ["paper", "fast", "balanced", "quality", "exact"]
    assert rows["exact"]["latent_error"] < 1e-3
    assert 0 < rows["balanced"]["latent_error"] < rows["paper"]["latent_error"] < 1
    for row in rows.values():
        assert len(row["latent_errors"]) == len(row["psnrs"]) == len(row["ssims"]) == 2
        assert row["flops"] == pytest.approx(row["flops_share"] * data["quality"]["dense_flops"])
        assert row["attention_s"] > 0
    assert rows["paper"]["ssim"] < 1
    assert rows["quality"]["psnr"] == 100  # it recomputes more frames than there are: all are exact
    assert "exact" not in [row["name"] for row in data["quality"]["rows"] if row["frontier"]]
    assert data["quality"]["prompts"][0] in Path("out.json").read_text()
    assert "work" in result.stdout


def test_sparse_peers_are_rows_of_their_own(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", monkeypatch, "sol")
    result = call("-m", str(tiny_wan_folder), *TINY, "--dtype", "bf16", "--json", "out.json")
    assert "sol: Sol-Attn, INT8, by top-k share or threshold tau; comfy-kitchen" in " ".join(result.stdout.split())
    data = json.loads(Path("out.json").read_text())
    rows = {row["name"]: row for row in data["quality"]["rows"]}
    peers = {name: row for name, row in rows.items() if row["group"] == "peer"}
    assert list(peers) == ["sol 2 %", "sol 10 %", "sol 20 %", "sol tau 1.5", "sol tau 1", "sol tau 0.5"]
    assert list(rows)[-1] == "exact"
    assert peers["sol 20 %"]["flops_share"] == pytest.approx(0.2 + 0.8 / 64)
    assert peers["sol tau 1"]["flops"] is None
    assert all(row["latent_error"] < 1 and row["attention_s"] > 0 and not row["is_preset"] for row in peers.values())


def test_a_clip_does_not_depend_on_its_batch(tiny_wan_folder: Path) -> None:
    errors = []
    for batch in ("1", "2"):
        text = call("-m", str(tiny_wan_folder), *TINY, "--batch", batch, "--json", "-").stdout
        rows = {row["name"]: row for row in json.loads(text)["quality"]["rows"]}
        errors.append([*rows["paper"]["latent_errors"], *rows["fast"]["latent_errors"]])
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert errors[0][0] != errors[0][1]  # prompts and seeds differ


def test_the_papers_ablation(tiny_wan_folder: Path) -> None:
    result = call("-m", str(tiny_wan_folder), *TINY, "--sweep", "paper", "--json", "out.json")
    rows = {row["name"]: row for row in json.loads(Path("out.json").read_text())["quality"]["rows"]}
    assert rows["frame pairs"]["attention_s"] is None  # eager: its time would say nothing
    assert rows["frame pairs"]["latent_error"] > 0
    assert (
        rows["2 iterations"]["flops"] > rows["2 iterations, no first"]["flops"] > rows["1 iteration, no first"]["flops"]
    )
    assert "12.59" in result.stdout
    assert "the order compares, the level does not" in " ".join(result.stdout.split())


def test_own_presets_and_prompts_come_in(tiny_wan_folder: Path) -> None:
    Path("mine.toml").write_text("num_steps = 1\nband = 1\n")
    arguments = ("--preset", "./mine.toml", "-p", "a red circle", "--json", "-")
    data = json.loads(call("-m", str(tiny_wan_folder), *TINY[:-2], *arguments).stdout)
    assert data["quality"]["rows"][0]["name"] == "mine"
    assert data["quality"]["prompts"] == ["a red circle"]


def test_an_exact_preset_that_is_not_fails_the_run(tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "EXACT_BUDGET", -1.0)
    result = call("-m", str(tiny_wan_folder), *TINY, "--json", "out.json", code=1)
    assert "error: check failed: preset exact against dense, final latents" in result.stderr
    assert json.loads(Path("out.json").read_text())["checks_passed"] is False


def test_a_variant_that_raises_is_a_row(tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: Any, **options: Any) -> Any:
        raise RuntimeError("too large")

    monkeypatch.setattr("vmonarch_cli.profile.blocks.block_attention", broken)
    result = call("-m", str(tiny_wan_folder), *TINY, "--sweep", "paper", code=1)
    assert "frame pairs has no figures: RuntimeError: too large" in result.stdout


def test_a_plot_of_the_frontier(tiny_wan_folder: Path) -> None:
    pytest.importorskip("matplotlib")
    call("-m", str(tiny_wan_folder), *TINY, "--plot", "frontier.svg")
    text = Path("frontier.svg").read_text()
    assert all(words in text for words in ("paper", "balanced", "% of dense", "CPU"))


# What is shown


def row(name: str, share: float, error: float, **more: Any) -> QualityRow:
    """Of a preset."""
    clips: dict[str, Any] = {"latent_errors": [error, error], "psnrs": [20.0, 22.0], "ssims": [0.8, 0.9]}
    return QualityRow(name, "preset", True, flops=1, flops_share=share, **{**clips, **more})


def invented() -> QualityProfile:
    rows = [
        row("paper", 0.27, 0.16, attention_s=1.0, paper_psnr=12.59),
        row("fast", 0.27, 0.13, attention_s=0.9),
        row("balanced", 0.42, 0.09, attention_s=1.2),
        row("balanced, 8 dense steps", 0.60, 0.10),
        QualityRow("broken", "preset", True, failure="out of memory"),
    ]
    return QualityProfile("demo", "quick", (96, 96, 49), (13, 12, 12), 20, 4.0, ["a", "b"], rows, dense_attention_s=3.0)


def test_the_frontier_is_what_nothing_beats() -> None:
    assert [row.name for row in invented().frontier()] == ["fast", "balanced"]


def test_the_plot_explains_its_groups_and_names_what_it_cannot_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profile = invented()
    profile.rows += [
        QualityRow("exact", "preset", True, flops=1, flops_share=1.0, latent_errors=[0.0]),
        QualityRow("2 iterations, band 1", "band", False, flops=1, flops_share=0.5, latent_errors=[0.1]),
    ]
    plot_quality([profile], "CPU", tmp_path / "frontier.svg")
    text = (tmp_path / "frontier.svg").read_text()
    assert "not drawn, as its error is 0: exact" in text
    assert "band: exact frames on each side" in text
    assert "nothing has less work and less error" in text


def test_names_of_near_points_do_not_cover_each_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profile = invented()
    near = [("paper, 4 dense steps", 0.70, 0.0501), ("paper, 8 dense steps", 0.72, 0.05)]
    profile.rows += [
        QualityRow(name, "dense steps", False, flops=1, flops_share=share, latent_errors=[error])
        for name, share, error in near
    ]
    plot_quality([profile], "CPU", tmp_path / "frontier.svg")
    text = (tmp_path / "frontier.svg").read_text()
    first, second = (float(re.findall(rf'y="([\d.]+)"[^>]*>{name}<', text)[0]) for name, *_ in near)
    assert second - first >= 6  # the height of their letters


def test_a_preset_s_name_covers_no_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profile = invented()
    profile.rows = [row("paper", 0.085, 0.150), row("fast", 0.075, 0.142), row("quality", 0.33, 0.03)]
    plot_quality([profile], "CPU", tmp_path / "frontier.svg")
    texts = dict(re.findall(r"<text ([^>]*)>(paper|fast|quality)<", (tmp_path / "frontier.svg").read_text()))
    ends = {name: "text-anchor: end" in style for style, name in texts.items()}
    assert ends == {"paper": False, "fast": True, "quality": False}  # to the right of `fast` is the point of `paper`


def test_a_row_with_an_adapter_hangs_hollow_on_the_row_without(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    short, long = invented(), invented()
    long.size = (96, 96, 193)
    long.rows.append(QualityRow("fast, tuned", "preset", True, flops=1, flops_share=0.27, latent_errors=[0.05]))
    plot_quality([short, long], "CPU", tmp_path / "frontier.svg")
    text = (tmp_path / "frontier.svg").read_text()
    for words in ("demo, 49 frames", "demo, 193 frames", "preset (shipped), with its adapter"):
        assert text.count(words) == 1
    assert "fast, tuned" not in text  # its place below the preset says whose it is
    assert text.count("fill: #ffffff; stroke: #d55e00") == 2  # in the panel and in the legend
    plot_quality([short], "CPU", tmp_path / "bare.svg")
    assert "with its adapter" not in (tmp_path / "bare.svg").read_text()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    console.print(tables.quality_table(invented(), "NVIDIA H100 80GB HBM3, torch 2.11.0", width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    figures = ("21.0", "12.59") if width > 60 else ("no room for",)
    for words in ("fast *", "0.090", "H100", "broken has no figures: out of memory", *figures):
        assert words in text


# Prompts


@pytest.mark.parametrize(("frames", "motions"), [(49, {1}), (193, {1, 2, 3})])
def test_held_out_prompts_tell_as_many_motions_as_the_clip_has_time_for(frames: int, motions: set[int]) -> None:
    entry, source = find_model("demo")
    texts = request.prompts(request.ModelShape(entry, source, 96, 96, frames), None, 32)
    assert {text.count(" then ") + 1 for text in texts} == motions
    assert texts == tuple(plain_caption(spec) for spec in held_out_specs(32, frames))
