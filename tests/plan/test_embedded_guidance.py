"""A model whose guidance is an input of its transformer has one forward a step, wherever a step is costed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmonarch_cli.plan.history import CACHE_VARIABLE, cache_folder, expect, remember
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def plan(**flags: Any) -> Plan:
    given = {"model": "hunyuan-video", "prompt": "a cat", "preset": "fast", "device": "cpu", **flags}
    return resolve(GenerateRequest(**given))


def record_of(made: Plan) -> dict[str, Any]:
    """The record of a clip of a plan, as far as planning and expecting read it."""
    return {
        "schema": 1,
        "prompt": made.prompt,
        "seed": made.seed,
        "clip": "clip.mp4",
        "frames": {},
        "settings": made.settings(),
        "preset": made.preset.model_dump(),
        "model": {"source": made.model_source, **made.model.model_dump(mode="json")},
        "grid": list(made.grid),
        "flops": made.flops.model_dump(),
        "device": {"type": "cpu", "name": "a CPU"},
        "dtype": "float32",
        "timing": {
            "attention_s": 60.0,
            "denoise_s": 100.0,
            "text_encode_s": 1.0,
            "decode_s": 8.0,
            "write_s": 1.0,
            "peak_memory_bytes": 1,
        },
    }


def test_what_a_clip_took_is_expected_of_the_next_one() -> None:
    remember(record_of(plan()))
    assert json.loads((cache_folder() / "timings.jsonl").read_text())["branches"] == 1, "as a profile of it counts them"
    found = expect(plan(dtype="float32"))
    assert found is not None
    assert (found.exact, found.clip_s) == (True, 110.0)
    twice = expect(plan(dtype="float32", steps=100))
    assert twice is not None
    assert twice.clip_s == pytest.approx(10 + 2 * 100, rel=0.05), "twice the steps, and not twice the forwards, too"
