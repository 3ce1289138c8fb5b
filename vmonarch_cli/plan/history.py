"""How long clips took on this machine, kept in the user's cache folder: what `vmonarch plan` expects a run to take.

`generate`, `compare` and `profile model` add lines, `plan` reads them. No torch here. The file is a convenience: a
cache that cannot be written or does not parse costs an expectation and nothing else.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vmonarch_cli.machine.hardware import device_key, uses_gpu
from vmonarch_cli.models.base import Grid, ModelEntry
from vmonarch_cli.plan.costs import branches_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.presets import Preset

CACHE_VARIABLE = "VMONARCH_CACHE"
_MAX_BYTES = 1 << 20


class Measurement(BaseModel):
    """What one clip took; a line of the file. Times in seconds, of one clip."""

    model_config = ConfigDict(frozen=True)

    device: str
    """See `device_key`."""
    model: str
    """Folder or hub id of the weights."""
    grid: Grid
    branches: int = Field(ge=1)
    """Forwards of a denoising step; see `branches_of`."""
    preset: dict[str, Any]
    """See `computed_fields`."""
    dtype: str
    steps: int = Field(ge=1)
    attention_s: float
    denoise_s: float
    rest_s: float
    """Encoding the text, decoding and writing."""
    flops: int
    """Self-attention operations of the clip."""
    peak_memory_bytes: int | None
    date: str = Field(default_factory=lambda: datetime.now(UTC).date().isoformat())

    @property
    def tokens(self) -> int:
        """Tokens of the clip."""
        frames, rows, columns = self.grid
        return max(1, frames * rows * columns)


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
    """Keep the timings of a clip's record; one that lacks a field, was stopped early or took a retry is left out."""
    if record.get("stopped_after") is not None or record.get("retries"):
        return  # its times are not those of its steps
    with contextlib.suppress(KeyError, TypeError, ValueError):
        keep(_measurement(record))


def keep(measured: Measurement) -> None:
    """Add a line to the file, whose older half goes when it has grown too long."""
    path = _file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _MAX_BYTES:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
        with path.open("a", encoding="utf-8") as file:
            file.write(measured.model_dump_json() + "\n")


def _measurement(record: dict[str, Any]) -> Measurement:
    timing, settings = record["timing"], record["settings"]
    model = ModelEntry.model_validate({key: value for key, value in record["model"].items() if key != "source"})
    return Measurement(
        device=device_key(record["device"]["type"]),
        model=record["model"]["source"],
        grid=record["grid"],
        branches=branches_of(model, settings["guidance_scale"]["value"]),
        preset=computed_fields(Preset.model_validate(record["preset"])),
        dtype=record["dtype"],
        steps=settings["steps"]["value"],
        attention_s=timing["attention_s"],
        denoise_s=timing["denoise_s"],
        rest_s=timing["text_encode_s"] + timing["decode_s"] + timing["write_s"],
        flops=record["flops"]["planned"],
        peak_memory_bytes=timing["peak_memory_bytes"],
    )


def expect(plan: Plan) -> Expectation | None:
    """From the last recorded clip of this device, model and dtype: of the same shape and preset, or else scaled."""
    device = device_key(plan.device)
    dtype = resolved_dtype(plan)
    branches = branches_of(plan.model, plan.guidance_scale)
    same_model = [
        line
        for line in reversed(_lines())
        if (line.device, line.model, line.dtype) == (device, plan.model_source, dtype)
    ]
    wanted = (plan.grid, branches, computed_fields(plan.preset), plan.steps)
    for line in same_model:
        # The first steps of a preset may run dense, so that another number of steps is not simply proportional.
        if (line.grid, line.branches, line.preset, line.steps) == wanted:
            return Expectation(line.denoise_s + line.rest_s, line.peak_memory_bytes, True, device, line.date)
    if not same_model:
        return None
    line = min(same_model, key=lambda line: abs(line.tokens - plan.tokens))
    attention = line.attention_s * plan.flops.planned / max(1, line.flops)
    work = plan.tokens / line.tokens
    forwards = branches * plan.steps / (line.branches * line.steps)
    seconds = attention + (line.denoise_s - line.attention_s) * work * forwards + line.rest_s * work
    return Expectation(seconds, None, False, device, line.date)


def resolved_dtype(plan: Plan) -> str:
    """The dtype that "auto" will be, as far as it can be known without torch."""
    if plan.dtype != "auto":
        return plan.dtype
    return "bfloat16" if will_use_gpu(plan) else "float32"


def will_use_gpu(plan: Plan) -> bool:
    """Whether a plan will run on a GPU, as far as it can be known without torch."""
    return uses_gpu(plan.device)


def computed_fields(preset: Preset) -> dict[str, Any]:
    """The fields of a preset that say what is computed; of a dense one, that it is dense."""
    if preset.attention == "dense":
        return {"attention": "dense"}
    return preset.computed_fields()


def _file() -> Path:
    return cache_folder() / "timings.jsonl"


def _lines() -> list[Measurement]:
    """Every line that this version can read, oldest first."""
    try:
        text = _file().read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    found = []
    for raw in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(Measurement.model_validate_json(raw))
    return found
