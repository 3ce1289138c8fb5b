"""Make the clip of a record again and say whether every pixel came out the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmonarch_cli.clip.events import Event
from vmonarch_cli.clip.record_model import Record, read_record
from vmonarch_cli.errors import InputError
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.timing import ClipResult


@dataclass(frozen=True)
class Repetition:
    """A clip that was made again."""

    result: ClipResult
    identical: bool
    differing: list[tuple[str, str, str]]
    """Versions, device and the like that are not as in the record: (what, then, now)."""

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        if self.identical:
            sound = ", and every sample of the sound" if "audio" in self.result.record else ""
            return f"identical: every pixel of every frame is as in the record{sound}"
        if not self.differing:
            return "different: the frames are not as in the record, though versions and device are"
        changed = ", ".join(f"{name} was {then} and is {now}" for name, then, now in self.differing)
        return f"different: the frames are not as in the record; {changed}"

    def to_json(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "differing": [{"what": name, "then": then, "now": now} for name, then, now in self.differing],
            "path": str(self.result.path),
            "record": self.result.record,
        }


def check_record(file: Path) -> Record:
    """The record of a clip that can be repeated and checked; InputError otherwise."""
    record = read_record(file)
    if not record.frames.sha256:
        raise InputError(f"record {file} has no hash of its frames, so that a repetition could not be checked")
    if record.stopped_after is not None:
        raise InputError(
            f"record {file} is of a clip that was stopped after step {record.stopped_after}, which a run with its "
            "settings does not repeat"
        )
    if record.retries:
        raise InputError(
            f"record {file} is of a clip that was made with a fallback ({record.retries[0].get('with')}), which a "
            "run with its settings does not repeat"
        )
    return record


def repeat(
    plan: Plan, machine: Machine, record: Record, on_event: Callable[[Event], None] = lambda event: None
) -> Repetition:
    """Run the plan of a record (see `record.plan_again`) and compare; raises as `clip.make.generate` does."""
    from vmonarch_cli.clip.make import generate

    (result,) = generate(plan, machine, retry_dense=False, on_event=on_event)
    now = read_record(result.record_path)
    same = now.frames.sha256 == record.frames.sha256 and _sound_hash(now) == _sound_hash(record)
    return Repetition(result, same, differing_circumstances(record, now))


def _sound_hash(record: Record) -> str | None:
    return None if record.audio is None else record.audio.sha256


def differing_circumstances(then: Record, now: Record) -> list[tuple[str, str, str]]:
    """What may change pixels and is not a setting: versions, device, dtype, implementation, and the files that the clip
    is made from, by their hashes.
    """
    files = now.file_hashes
    devices = [None if record.device is None else record.device.name for record in (then, now)]
    pairs: list[tuple[str, str | None, str | None]] = [
        *((name, version, now.versions.get(name)) for name, version in then.versions.items()),
        ("device", devices[0], devices[1]),
        ("dtype", then.dtype, now.dtype),
        *([("vae_dtype", then.vae_dtype, now.vae_dtype)] if then.vae_dtype is not None else []),
        ("impl", then.impl, now.impl),
        ("fused blocks", then.fused or "stock", now.fused or "stock"),
        *([] if then.dense_attention is None else [("dense attention", then.dense_attention, now.dense_attention)]),
        ("model", then.model.source, now.model.source),
        *((name, sha256[:12], (files.get(name) or "none")[:12]) for name, sha256 in then.file_hashes.items()),
    ]
    return [(name, str(old), str(new)) for name, old, new in pairs if old != new]
