"""Compare clips that exist: their records, and their frames as far as the files are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmonarch_cli.clip.record_model import Record, clip_of, read_record
from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import ENDINGS, record_path, sound_path
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.media.sound import Sound, read_sound
from vmonarch_cli.review.compare.results import ComparedClip, Comparison, Frames

_DEFAULT_FPS = 16  # of a side-by-side video of clips without records
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

    opened = [_open(path) for path in paths]
    lpips, note = load_lpips()
    notes = [note] if note else []
    clips: list[ComparedClip] = []
    for name, path, (record, file) in zip(_names(paths), paths, opened, strict=True):
        frames = _NO_FRAMES
        if file.exists():
            frames = read_clip(file, None if record is None else record.frames.fps)
        else:
            notes.append(f"the clip of {path} is not there: only its record is compared")
        measured = None
        if clips and len(frames) and frames.shape == clips[0].frames.shape:
            measured = distance(frames, clips[0].frames, lpips)
        elif clips and len(frames) and len(clips[0].frames):
            notes.append(f"{name} has another shape than {clips[0].name}: their frames cannot be compared")
        sound = read_sound_of(file, record)
        clips.append(ComparedClip(name, frames, changes(frames), flicker(frames), measured, record, file, sound))
    if any(clip.distance for clip in clips):
        notes.append("distances are between the files, whose lossy coding is part of them")
    reference, *others = clips
    if reference.sound is not None:
        notes.append(whose_sound(reference.name))
    changed = [name for name, _ in differing(clips) if name in _TIME_DEPENDS_ON]
    if changed:
        notes.append(f"times are not compared: {', '.join(changed)} differ")
    stopped = [clip for clip in clips if clip.stopped_after is not None]
    notes += [
        f"{clip.name} was stopped after step {clip.stopped_after}: its frames are unfinished, its times not compared"
        for clip in stopped
    ]
    return Comparison(
        title=f"{', '.join(clip.name for clip in others)} against {reference.name}",
        prompt=_common_prompt(clips),
        fps=_DEFAULT_FPS if reference.record is None else reference.record.frames.fps,
        reference=reference,
        others=others,
        facts=shared_facts(clips),
        differing=differing(clips),
        notes=notes,
        times_comparable=not changed and not stopped,
    )


def read_sound_of(clip: Path, record: Record | None) -> Sound | None:
    """The sound that a record says a clip has, from its file; None for a silent one, or where the file is not there."""
    if record is None or record.audio is None:
        return None
    return read_sound(sound_path(clip), record.audio.rate, record.audio.channels)


def whose_sound(name: str) -> str:
    """A note: of several clips one is heard."""
    return f"the side-by-side video has the sound of {name}"


def shared_facts(clips: Sequence[ComparedClip]) -> list[tuple[str, str]]:
    """The main settings that all records share; nothing when one has no record."""
    tables = _tables(clips)
    if tables is None:
        return []
    found = []
    for name, label in _FACTS.items():
        values = {str(table.get(name)) for table in tables}
        if len(values) == 1 and values != {"None"}:
            found.append((label, values.pop()))
    return found


def differing(clips: Sequence[ComparedClip]) -> list[tuple[str, list[str]]]:
    """Settings, versions and pixels (by hash) in which the records differ, with the value of each."""
    tables = _tables(clips)
    if tables is None:
        return []
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [_shown(table.get(name)) for table in tables]
        if len(set(values)) > 1 and name not in _LABELS:
            rows.append((name, values))
    return rows


def _tables(clips: Sequence[ComparedClip]) -> list[dict[str, Any]] | None:
    tables = []
    for clip in clips:
        if clip.record is None:
            return None
        table = clip.record.settings_values()
        table["size"] = f"{table.pop('width', '?')}x{table.pop('height', '?')}"
        if clip.record.preset.attention == "dense":  # its other fields say nothing
            table = {k: v for k, v in table.items() if not k.startswith("preset.") or k == "preset.attention"}
        tables.append({**table, **{f"version of {name}": version for name, version in clip.record.versions.items()}})
    return tables


def _open(path: Path) -> tuple[Record | None, Path]:
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


def _common_prompt(clips: Sequence[ComparedClip]) -> str | None:
    prompts = {None if clip.record is None else clip.record.prompt for clip in clips}
    return prompts.pop() if len(prompts) == 1 else None


def _shown(value: Any) -> str:
    if value is None:
        return "·"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
