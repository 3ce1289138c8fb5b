"""Whether a clip that should be done is there, whole, and what its record says. Cheap: nothing is decoded."""

from __future__ import annotations

import hashlib
import json
import wave
from pathlib import Path
from typing import Any

from vmonarch_cli.clip.record_model import Record, read_record
from vmonarch_cli.clip.record_parts import hashes_of
from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import record_path, sound_path
from vmonarch_cli.plan.plan import Plan

_PNG_END = b"IEND\xaeB`\x82"
_PIECE = 1 << 20


def file_facts(clip: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a clip's file, or of the files of its folder in the order of their names."""
    files = sorted(clip.iterdir()) if clip.is_dir() else [clip]
    total, digest = 0, hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE):
                total += len(piece)
                digest.update(piece)
    return {"bytes": total, "sha256": digest.hexdigest()}


def damage(clip: Path) -> str | None:
    """What is wrong with a clip that was written, as half a sentence; None for one that is whole.

    A clip that somebody edited since is whole: another size in a file that ends well.
    """
    record_file = record_path(clip)
    if not clip.exists():
        return "is gone"
    if clip.is_dir() != (clip.suffix.lower() == ".png"):
        return "is a folder now" if clip.is_dir() else "is no folder any more"
    try:
        record = read_record(record_file)
    except InputError as error:
        return f"has no record that can be read ({error.message})"
    try:
        if not _ends_well(clip, record):
            return "is cut off"
        if not _has_its_sound(clip, record):
            return f"has lost its sound, which is not in {sound_path(clip).name} as it was written"
        facts = file_facts(clip) if record.file is not None else {}
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    known = record.file
    if known is not None and facts["bytes"] == known.bytes and facts["sha256"] != known.sha256:
        return "is not as it was written: some of its bytes are others"
    return None


def is_clip_of(clip: Path, plan: Plan) -> bool:
    """Whether a clip is there and whole, and its record says that it was made with exactly this plan's settings."""
    if damage(clip) is not None:
        return False
    record = read_record(record_path(clip))
    if record.clip != clip.name or record.seed != plan.seed or record.file is None:
        return False
    if record.file.model_dump() != file_facts(clip):
        return False
    hashes = [None if tuned is None else tuned.sha256 for tuned in (record.tuned, plan.tuned)]
    if hashes[0] != hashes[1]:
        return False
    known, files = record.file_hashes, hashes_of(plan.loras, plan.given_files)
    if any(known[name] != files[name] for name in known.keys() & files.keys()):  # an earlier version kept none
        return False
    then = {name: entry.value for name, entry in record.settings.items()}
    now = {name: entry["value"] for name, entry in json.loads(json.dumps(plan.settings(), default=str)).items()}
    then = {name: plan.default_of(name) for name in now.keys() - then.keys()} | then  # an earlier version had no choice
    differing = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    return not differing - {"output", "num_videos", "device", "offload", "dense_every"}


def _ends_well(clip: Path, record: Record) -> bool:
    """Whether a file has the beginning and the end of its format; of a folder, whether every frame is there."""
    if clip.is_dir():
        frames = sorted(clip.glob("frame-*.png"))
        return len(frames) == record.frames.count and all(_end(file, len(_PNG_END)) == _PNG_END for file in frames)
    if clip.suffix.lower() == ".webp":
        head = _start(clip, 12)
        return head[:4] + head[8:] == b"RIFFWEBP" and int.from_bytes(head[4:8], "little") + 8 == clip.stat().st_size
    if clip.suffix.lower() == ".webm":
        return _segment_ends(clip)
    if clip.suffix.lower() == ".gif":
        with clip.open("rb") as file:
            return file.read(4) == b"GIF8" and _end(clip, 1) == b"\x3b"
    return _boxes(clip) >= {b"ftyp", b"moov", b"mdat"}


def _has_its_sound(clip: Path, record: Record) -> bool:
    """Whether the .wav beside a clip is as it was written; what is in the clip's own file is checked with that."""
    known, wav = record.audio, sound_path(clip)
    if known is None or wav == clip:
        return True
    try:
        with wave.open(str(wav), "rb") as file:
            return hashlib.sha256(file.readframes(file.getnframes())).hexdigest() == known.sha256
    except (OSError, EOFError, wave.Error):
        return False


def _end(file: Path, count: int) -> bytes:
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - count))
        return stream.read()


def _start(file: Path, count: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(count)


def _segment_ends(clip: Path) -> bool:
    """Whether a WebM file is an EBML header and one segment that fills it to its end."""
    head = _start(clip, 4096)
    place = 0
    for kind in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if head[place : place + 4] != kind or len(head) < place + 5:
            return False
        width = 9 - head[place + 4].bit_length()  # bytes of the size, of which the leading zeros tell
        size = int.from_bytes(head[place + 4 : place + 4 + width], "big") & ((1 << 7 * width) - 1)
        place += 4 + width + size
    return place == clip.stat().st_size


def _boxes(clip: Path) -> set[bytes]:
    """Kinds of the boxes of an MP4 file; none where they do not fill it to its end."""
    found = set()
    with clip.open("rb") as file:
        size = file.seek(0, 2)
        place = 0
        while place + 8 <= size:
            file.seek(place)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length or size - place
            found.add(head[4:8])
            if length < 8:
                return set()
            place += length
    return found if place == size else set()
