"""Compare clips that exist: their records, and their frames as far as the files are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmonarch_cli.clip.record import clip_of, read_record, settings_of
from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import ENDINGS, record_path
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.review.compare.results import ComparedClip, Comparison, Frames

_NO_FRAMES: Frames = np.zeros((0, 0, 0, 3), np.uint8)
_FACTS = {
    "model": "model",
    "seed": "seed",
    "size": "size",
    "num_frames": "frames",
    "fps": "frames per second",
    "steps": "steps",
    "guidance_scale": "guidance scale",
    "flow_shift": "flow shift",
    "device": "device",
    "dtype": "dtype",
}
_LABELS = ("preset", "dense_every")
_TIME_DEPENDS_ON = ("model", "model.source", "size", "num_frames", "steps", "guidance_scale", "device", "dtype")


def compare_files(paths: Sequence[Path]) -> Comparison:
    """The clips (or records) of several files; the first is what the others are measured against.

    InputError when a file is neither a record nor a clip.
    """
    from vmonarch_cli.review.compare.figures import changes, distance, flicker, load_lpips

    lpips, note = load_lpips()
    notes = [note] if note else []
    contenders: list[ComparedClip] = []
    for name, path in zip(_names(paths), paths, strict=True):
        record, clip = _open(path)
        frames = _NO_FRAMES
        if clip.exists():
            frames = read_clip(clip)
        else:
            notes.append(f"the clip of {path} is not there: only its record is compared")
        measured = None
        if contenders and len(frames) and frames.shape == contenders[0].frames.shape:
            measured = distance(frames, contenders[0].frames, lpips)
        elif contenders and len(frames) and len(contenders[0].frames):
            notes.append(f"{name} has another shape than {contenders[0].name}: their frames cannot be compared")
        contenders.append(ComparedClip(name, frames, changes(frames), flicker(frames), measured, record, clip))
    if any(contender.distance for contender in contenders):
        notes.append("distances are between the files, whose lossy coding is part of them")
    reference, *others = contenders
    changed = [name for name, _ in differing(contenders) if name in _TIME_DEPENDS_ON]
    if changed:
        notes.append(f"times are not compared: {', '.join(changed)} differ")
    return Comparison(
        title=f"{', '.join(c.name for c in others)} against {reference.name}",
        prompt=_common_prompt(contenders),
        fps=int(((reference.record or {}).get("frames") or {}).get("fps") or 16),
        reference=reference,
        others=others,
        facts=shared_facts(contenders),
        differing=differing(contenders),
        notes=notes,
        times_comparable=not changed,
    )


def shared_facts(contenders: Sequence[ComparedClip]) -> list[tuple[str, str]]:
    """The main settings that all records share; nothing when one has no record."""
    tables = _tables(contenders)
    if tables is None:
        return []
    found = []
    for name, label in _FACTS.items():
        values = {str(table.get(name)) for table in tables}
        if len(values) == 1 and values != {"None"}:
            found.append((label, values.pop()))
    return found


def differing(contenders: Sequence[ComparedClip]) -> list[tuple[str, list[str]]]:
    """Settings, versions and pixels (by hash) in which the records differ, with the value of each."""
    tables = _tables(contenders)
    if tables is None:
        return []
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [_shown(table.get(name)) for table in tables]
        if len(set(values)) > 1 and name not in _LABELS:
            rows.append((name, values))
    return rows


def _tables(contenders: Sequence[ComparedClip]) -> list[dict[str, Any]] | None:
    tables = []
    for contender in contenders:
        if contender.record is None:
            return None
        table = settings_of(contender.record)
        table["size"] = f"{table.pop('width', '?')}x{table.pop('height', '?')}"
        if contender.record["preset"].get("attention") == "dense":  # its other fields say nothing
            table = {k: v for k, v in table.items() if not k.startswith("preset.") or k == "preset.attention"}
        versions = contender.record.get("versions") or {}
        tables.append({**table, **{f"version of {name}": version for name, version in versions.items()}})
    return tables


def _open(path: Path) -> tuple[dict[str, Any] | None, Path]:
    """Record (None for a clip that has none) and clip of a file."""
    if path.suffix.lower() not in ENDINGS:
        record = read_record(path)
        return record, clip_of(record, path)
    if not path.exists():
        raise InputError(f"there is no clip {path}")
    return (read_record(path) if record_path(path).exists() else None), path


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the files apart."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    longer = [f"{path.absolute().parent.name}/{path.stem}" for path in paths]
    return longer if len(set(longer)) == len(longer) else [f"{i + 1}: {stem}" for i, stem in enumerate(stems)]


def _common_prompt(contenders: Sequence[ComparedClip]) -> str | None:
    prompts = {(contender.record or {}).get("prompt") for contender in contenders}
    return prompts.pop() if len(prompts) == 1 else None


def _shown(value: Any) -> str:
    if value is None:
        return "·"
    return str(value).lower() if isinstance(value, bool) else str(value)
