"""The benchmark of several processes runs, checks what they made together, and refuses what they cannot share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def scaling(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    shape = ["--model", "demo", "--size", "48x48", "--frames", "17", "--repeats", "2"]
    return subprocess.run(
        [*launch, str(ROOT / "tests" / "bench" / "scaling.py"), *shape, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_predict_what_one_does(tmp_path: Path) -> None:
    done = scaling(2, "--json", str(tmp_path / "two.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "two.json").read_text())
    assert record["checks_passed"]
    assert record["settings"]["processes"] == 2
    (clip,) = record["clips"]
    assert clip["size"] == "48x48"
    assert set(clip["rows"]) == {"dense", "paper", "balanced", "skipped"}
    for row in clip["rows"].values():
        assert row["passed"]
        assert row["error"] < 1e-4
        assert row["efficiency"] > 0
        assert len(row["together"]["peak_bytes"]) == 2
    assert clip["rows"]["paper"]["together"]["attention_s"] > 0
    assert clip["exchange_s"] > 0


@pytest.mark.slow
def test_heads_that_cannot_be_shared_are_said_once() -> None:
    done = scaling(3)
    assert done.returncode != 0
    assert done.stderr.count("3 processes cannot share the 4 heads of WanTransformer3DModel evenly") == 1
