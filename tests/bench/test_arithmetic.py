"""tests/bench/arithmetic.py: what fused blocks, fp8 and a bfloat16 VAE change in the demo's clips."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from scripts import ROOT, bench_script

SMALL = ("--prompts", "1", "--steps", "1", "--batch", "1", "--frames", "17", "--size", "32", "--device", "cpu")


def test_each_way_to_compute_is_a_row_beside_the_stock_one(tmp_path: Path) -> None:
    record = tmp_path / "cpu-arithmetic.json"
    bench_script("arithmetic", ROOT / "tests" / "bench").main([*SMALL, "--json", str(record)])
    found = json.loads(record.read_text())
    rows = {(row["preset"], row["variant"]): row for row in found["rows"]}
    assert found["checks_passed"] is True
    assert rows["dense", "stock"]["latent_error"] == 0 < rows["paper", "stock"]["latent_error"]
    for preset in ("dense", "paper"):
        assert rows[preset, "fused blocks"]["from_stock"] < 1e-3
        assert rows[preset, "bfloat16 VAE"]["from_stock"] == 0
        assert 40 < rows[preset, "bfloat16 VAE"]["psnr_from_stock"] < 100
    if not torch.cuda.is_available():
        assert [one["what"] for one in found["skipped"]] == ["fp8", "all"]
        assert "this run is on the CPU" in found["skipped"][0]["why"]
    page = bench_script("report").markdown([(record.name, found)])
    assert "| paper, bfloat16 VAE |" in page
