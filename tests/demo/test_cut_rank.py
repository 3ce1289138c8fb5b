"""Adapters of the demo at a lower rank: files as `vmonarch tune` writes them, and the best for so few directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_whole
from safetensors.torch import load_file

from vmonarch_cli.demo.training.__main__ import main
from vmonarch_cli.demo.training.cut_rank import cut
from vmonarch_cli.models.demo import WEIGHTS
from vmonarch_cli.models.tuned import read_adapter
from vmonarch_cli.pipeline.tuned import write_adapter
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.tuned import brought
from vmonarch_cli.presets import load_preset


def layer(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (rank, 12), "B": (10, rank)}
    return {f"transformer.x.lora_{half}.weight": torch.randn(s, generator=generator) for half, s in shapes.items()}


def change(state: dict[str, torch.Tensor]) -> torch.Tensor:
    down, up = (state[f"transformer.x.lora_{half}.weight"].double() for half in "AB")
    return up @ down


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_change_of_the_rank_adds_what_is_closer(rank: int) -> None:
    """For inputs of unlike directions, where the change that is closest by itself errs more."""
    state, x = layer(8), torch.randn(400, 12, generator=torch.Generator().manual_seed(1)).double()
    x = x * torch.logspace(-2, 1, 12, dtype=torch.float64)
    made, lost = cut(state, {"transformer.x": x.T @ x}, rank)
    assert {name: tensor.shape for name, tensor in made.items()} == {
        "transformer.x.lora_A.weight": (rank, 12),
        "transformer.x.lora_B.weight": (10, rank),
    }
    wanted = x @ change(state).T
    error = (x @ change(made).T - wanted).norm()
    best = torch.linalg.svdvals(wanted)[rank:].norm()
    assert float(error) == pytest.approx(float(best), rel=1e-4, abs=1e-4)
    assert lost == pytest.approx(float(best / wanted.norm()), rel=1e-6, abs=1e-6)
    u, s, vh = torch.linalg.svd(change(state))
    plain = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert error < 0.7 * (x @ plain.T - wanted).norm()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the demo's own, as if made for short clips."""
    path = tmp_path_factory.mktemp("adapters") / "fast-4-steps.safetensors"
    source = next(own for own in brought(WEIGHTS) if own.name == path.name)
    said = read_adapter(source).model_copy(update={"size": "48x48", "num_frames": 17})
    write_adapter(path, load_file(source), said)
    return path


def test_a_file_is_cut_and_used_as_before(adapter: Path, tmp_path: Path) -> None:
    main(["rank", str(adapter), "--rank", "4", "--out", str(tmp_path)])
    path = tmp_path / adapter.name
    said, before = read_adapter(path), read_adapter(adapter)
    has = before.training["rank"]
    assert said.training == {"cut_from_rank": has, **before.training, "rank": 4, "alpha": 4}
    assert said.model_copy(update={"training": before.training}) == before
    tensors, full = load_file(path), load_file(adapter)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(full, torch.float16)
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4}
    flags: dict[str, Any] = {"preset": "fast", "steps": 4, "guidance_scale": 1.0, "size": "48x48", "num_frames": 17}
    plan = resolve(GenerateRequest(prompt="a red circle", tuned=str(path), **flags))
    assert plan.tuned is not None
    assert plan.tuned.path == str(path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rank 0", "error: --rank takes a whole number from 1 to 1024, got 0"),
        ("--rank 64", "error: --rank takes a lower rank than adapter"),
        ("--rank 4 --clips 0", "error: --clips takes a whole number from 1 to 64, got 0"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["rank", str(adapter), *flags.split(), "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(words)
    assert not list(tmp_path.iterdir())


def test_only_the_demo_s_loras_are_cut(
    adapter: Path, tiny_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, said = load_file(adapter), read_adapter(adapter)
    write_adapter(tmp_path / "other.safetensors", tensors, said.model_copy(update={"model": "wan2.1-1.3b"}))
    write_adapter(tmp_path / "alpha.safetensors", tensors, said, alpha=8)
    write_whole(tiny_wan_folder, tmp_path / "whole.safetensors", load_preset("fast"))
    for name, words in (
        ("other", "only those of the demo"),
        ("alpha", "has an alpha of its own"),
        ("whole", "no rank"),
    ):
        with pytest.raises(SystemExit):
            main(["rank", str(tmp_path / f"{name}.safetensors"), "--rank", "4", "--out", str(tmp_path / "out")])
        assert words in capsys.readouterr().err


def test_what_is_there_stays(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = adapter.read_bytes()
    with pytest.raises(SystemExit):
        main(["rank", str(adapter), "--rank", "4", "--out", str(adapter.parent)])
    assert "exists" in capsys.readouterr().err
    assert adapter.read_bytes() == before
    assert [path.name for path in adapter.parent.iterdir()] == [adapter.name]
