"""Blocks of a batch's clips, fused or not: as each clip would have them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from command import call

from vmonarch_cli.families import wan_blocks
from vmonarch_cli.pipeline import preflight
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: Path, folder: Path, lines: list[dict[str, Any]], *flags: str) -> dict[str, tuple[str | None, str]]:
    """Name of each clip of a batch -> (what its blocks were fused with, hash of its pixels)."""
    folder.mkdir()
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "red", **line}) + "\n" for line in lines))
    batch = ("generate", "-m", str(model), "--prompts-file", str(prompts), "-o", str(folder / "out"))
    call(*batch, "--num-frames", "5", "--steps", "1", "--fps", "8", "--device", "cpu", *flags)
    records = {
        str(line["output"]): json.loads((folder / "out" / f"{line['output']}.json").read_text()) for line in lines
    }
    return {name: (record["fused"], record["frames"]["sha256"]) for name, record in records.items()}


def test_a_long_clip_does_not_fuse_the_short_ones(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU decides by the stream's length; here torch runs what Triton would run there."""

    def decided(plan: Plan, machine: Machine) -> str | None:
        return "torch" if plan.width == 64 else None

    monkeypatch.setattr(preflight, "_fused_impl", decided)
    norms = Mock(wraps=wan_blocks.residual_norm)
    monkeypatch.setattr(wan_blocks, "residual_norm", norms)
    lines = [{"output": "short", "size": "32x32"}, {"output": "long", "size": "64x32"}]
    alone, counts = {}, []
    for line in lines:
        alone |= made(tiny_wan_folder, tmp_path / line["output"], [line])
        counts.append(norms.call_count)
    assert {name: fused for name, (fused, _) in alone.items()} == {"short": None, "long": "torch"}
    assert counts[0] == 0 < counts[1]
    for name, both in (("both", lines), ("turned", lines[::-1])):
        assert made(tiny_wan_folder, tmp_path / name, both) == alone
    assert norms.call_count == 3 * counts[1]


def test_a_line_s_implementation_is_its_blocks_too(tiny_wan_folder: Path, tmp_path: Path) -> None:
    lines = [{"output": impl, "size": "32x32", "preset.impl": impl} for impl in ("torch", "triton")]
    together = made(tiny_wan_folder, tmp_path / "both", lines, "--fuse")
    assert {name: fused for name, (fused, _) in together.items()} == {"torch": "torch", "triton": "triton"}
    alone = [made(tiny_wan_folder, tmp_path / line["output"], [line], "--fuse") for line in lines]
    assert together == alone[0] | alone[1]
