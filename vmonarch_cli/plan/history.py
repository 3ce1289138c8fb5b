"""How long clips took on this machine, kept in the user's cache folder: what `vmonarch plan` expects a run to take.

`generate`, `compare` and `profile model` add lines, `plan` reads them. No torch here. The file is a convenience: a
cache that cannot be written or does not parse costs an expectation and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmonarch_cli.machine.hardware import can_use_gpu, device_key
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.plan.resolve import Plan, count_flops
from vmonarch_cli.presets import Preset, load_preset

if TYPE_CHECKING:
    from vmonarch_cli.profile.results import ModelProfile

CACHE_VARIABLE = "VMONARCH_CACHE"
_MAX_BYTES = 1 << 20
_LABELS = {"name", "description"}
_KEYS = {"device", "model", "grid", "branches", "preset", "dtype", "steps", "date"}
_KEYS |= {"attention_s", "denoise_s", "rest_s", "flops", "peak_memory_bytes"}


@dataclass(frozen=True)
class Expectation:
    """What one clip of a plan will probably take."""

    clip_s: float
    peak_memory_bytes: int | None
    """Of the recorded clip; None when it was of another shape."""
    exact: bool
    """Whether the recorded clip had this shape and preset; otherwise its times are scaled by operations and tokens."""
    device: str
    recorded: str
    """Date of the recorded clip."""

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__}


def cache_folder() -> Path:
    """$VMONARCH_CACHE, or `vmonarch` in the user's cache folder."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmonarch"


def remember(record: dict[str, Any]) -> None:
    """Keep the timings of a clip's record (see run.py); one that lacks a field is left out."""
    with contextlib.suppress(KeyError):
        _append(_line(record))


def remember_profile(
    profile: ModelProfile, entry: ModelEntry, source: str, presets: Sequence[Preset], device: str, dtype: str
) -> None:
    """Keep what `profile model` found of whole clips; nothing of a compiled model, which `generate` does not make."""
    if profile.compiled or profile.decode_s is None:
        return
    measured = [(preset, profile.row(preset.name, "warm") or profile.row(preset.name)) for preset in presets]
    measured.append((load_preset("dense"), profile.fastest_dense))
    for preset, row in measured:
        if row is None or row.clip_s is None or row.step is None:
            continue
        share = row.share(profile.skipped)
        attention_s = (share or 0) * row.clip_s
        if row.attention_s is not None:
            attention_s = row.clip_s * row.attention_s / row.step.median
        _append(
            {
                "device": device_key(device),
                "model": source,
                "grid": list(profile.grid),
                "branches": profile.forwards,
                "preset": _mathematics(preset.model_dump()),
                "dtype": dtype,
                "steps": profile.clip_steps,
                "attention_s": attention_s,
                "denoise_s": row.clip_s,
                "rest_s": profile.decode_s + (profile.text_encode_s or 0),
                "flops": count_flops(entry, profile.grid, preset, profile.clip_steps, profile.forwards).planned,
                "peak_memory_bytes": row.peak_bytes,
                "date": datetime.now(UTC).date().isoformat(),
            }
        )


def _line(record: dict[str, Any]) -> dict[str, Any]:
    timing, settings = record["timing"], record["settings"]
    return {
        "device": device_key(record["device"]["type"]),
        "model": record["model"]["source"],
        "grid": record["grid"],
        "branches": 2 if settings["guidance_scale"]["value"] > 1 else 1,
        "preset": _mathematics(record["preset"]),
        "dtype": record["dtype"],
        "steps": settings["steps"]["value"],
        "attention_s": timing["attention_s"],
        "denoise_s": timing["denoise_s"],
        "rest_s": timing["text_encode_s"] + timing["decode_s"] + timing["write_s"],
        "flops": record["flops"]["planned"],
        "peak_memory_bytes": timing["peak_memory_bytes"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def expect(plan: Plan) -> Expectation | None:
    """From the last recorded clip of this device, model and dtype: of the same shape and preset, or else scaled."""
    device = device_key(plan.device)
    dtype = resolved_dtype(plan)
    branches = 2 if plan.guidance_scale > 1 else 1
    same_model = [
        line
        for line in reversed(_lines())
        if (line["device"], line["model"], line["dtype"]) == (device, plan.model_source, dtype)
    ]
    wanted = [list(plan.grid), branches, _mathematics(plan.preset.model_dump())]
    for line in same_model:
        # The first steps of a preset may run dense, so that another number of steps is not simply proportional.
        if [line["grid"], line["branches"], line["preset"]] == wanted and line["steps"] == plan.steps:
            seconds = line["denoise_s"] + line["rest_s"]
            return Expectation(seconds, line["peak_memory_bytes"], True, device, line["date"])
    if not same_model:
        return None
    line = min(same_model, key=lambda line: abs(_tokens(line) - plan.tokens))
    attention = line["attention_s"] * plan.flops.planned / max(1, line["flops"])
    work = plan.tokens / _tokens(line)
    forwards = branches * plan.steps / (line["branches"] * line["steps"])
    seconds = attention + (line["denoise_s"] - line["attention_s"]) * work * forwards + line["rest_s"] * work
    return Expectation(seconds, None, False, device, line["date"])


def resolved_dtype(plan: Plan) -> str:
    """The dtype that "auto" will be, as far as it can be told without torch."""
    if plan.dtype != "auto":
        return plan.dtype
    on_gpu = plan.device.startswith("cuda") or (plan.device == "auto" and can_use_gpu())
    return "bfloat16" if on_gpu else "float32"


def _mathematics(preset: dict[str, Any]) -> dict[str, Any]:
    """The fields of a preset that say what is computed; of a dense one, that it is dense."""
    if preset["attention"] == "dense":
        return {"attention": "dense"}
    return {name: preset[name] for name in Preset.model_fields if name not in _LABELS}


def _tokens(line: dict[str, Any]) -> int:
    frames, rows, columns = line["grid"]
    return int(frames * rows * columns)


def _file() -> Path:
    return cache_folder() / "timings.jsonl"


def _append(line: dict[str, Any]) -> None:
    path = _file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _MAX_BYTES:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines() -> list[dict[str, Any]]:
    """Every line that this version can read, oldest first."""
    try:
        text = _file().read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    found = []
    for raw in text.splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(raw)
            if isinstance(line, dict) and line.keys() >= _KEYS:
                found.append(line)
    return found
