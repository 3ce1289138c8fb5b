"""`index.html` of a folder of clips: poster frames, videos, prompts and figures, from the records beside the clips.

Posters are inside the page and videos are linked beside it, so that it opens from a file and can be moved with the
folder. No torch: it can be written while another process denoises.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vmonarch_cli.clip.record_model import Record, clip_of, read_record
from vmonarch_cli.errors import DeviceError, InputError
from vmonarch_cli.media.paths import ENDINGS, sound_path
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.review import webpage
from vmonarch_cli.review.words import error_words, lost_subject
from vmonarch_cli.text import as_fast, flops, seconds

INDEX = "index.html"
_POSTER_WIDTH = 480
_READERS = 4
_KINDS = {".mp4": "video", ".webm": "video", ".gif": "image", ".webp": "image"}
"""Ending -> what a page shows it as."""


@dataclass(frozen=True)
class GalleryClip:
    """One clip of the page."""

    clip: Path
    record_file: Path
    record: Record


@dataclass(frozen=True)
class Gallery:
    """A page that was written."""

    path: Path
    clips: int
    left_out: list[str]
    """A sentence for each clip that has no card, because its record cannot be read."""


def write_gallery(folder: Path) -> Gallery:
    """Write, or write again, the page of a folder.

    Raises InputError when the folder holds no clip with a record, OutputError when the page cannot be written.
    """
    clips, left_out = find_clips(folder)
    if not clips and not left_out:
        raise InputError(f"{folder} holds no clip with a record beside it, as vmonarch writes them")
    with ThreadPoolExecutor(_READERS) as pool:  # ffmpeg decodes in processes of its own
        posters = list(pool.map(_poster, clips))
    page = webpage.render(
        "gallery.html",
        name=folder.resolve().name or str(folder),
        subtitle=_subtitle(clips),
        cards=[_card(clip, poster, folder) for clip, poster in zip(clips, posters, strict=True)],
        left_out=left_out,
    )
    path = folder / INDEX
    with atomic(path, overwrite=True) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Gallery(path, len(clips), left_out)


def find_clips(folder: Path) -> tuple[list[GalleryClip], list[str]]:
    """Clips below a folder whose record and file are both there, oldest record first; and what is wrong with others.

    A JSON file without a clip of its name is something else, and nobody's concern.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: a gallery is made of a folder of clips")
    found, left_out = [], []
    for file in sorted(folder.rglob("*.json")):
        inside = file.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if not any(file.with_suffix(ending).exists() for ending in ENDINGS):
            continue
        try:
            record = read_record(file)
            clip = clip_of(record, file)
            changed = file.stat().st_mtime_ns
        except InputError as error:
            left_out.append(error.message)
        except OSError as error:
            left_out.append(f"record {file} cannot be read: {error.strerror}")
        else:
            if clip.exists():
                found.append((changed, inside.as_posix(), GalleryClip(clip, file, record)))
    return [clip for _, _, clip in sorted(found, key=lambda item: item[:2])], left_out


def _card(entry: GalleryClip, poster: str | None, folder: Path) -> dict[str, Any]:
    """What the template shows of a clip."""
    record = entry.record
    return {
        "kind": _KINDS.get(entry.clip.suffix.lower(), "folder"),
        "name": entry.clip.name,
        "link": _link(entry.clip, folder),
        "record_link": _link(entry.record_file, folder),
        "heard": record.audio is not None,
        "sound": _sound_link(entry, folder),
        "poster": poster,
        "width": record.frames.width,
        "height": record.frames.height,
        "prompt": record.prompt,
        "alt": record.prompt[:200],
        "figures": _measured(record),
        "settings": _settings(record),
        "advice": lost_subject(record),
    }


def _measured(record: Record) -> list[tuple[str, str]]:
    """What a record measured, as far as it has it."""
    timing, frames = record.timing, record.frames
    rows = [
        ("preset", record.preset.name),
        ("seed", str(record.seed)),
        ("steps", _steps(record)),
        ("clip", f"{frames.width}x{frames.height}, {frames.count} frames, {frames.fps} fps"),
    ]
    if record.audio is not None:
        rows.append(("sound", record.audio.words))
    whole = timing.whole
    if timing.attention_s is not None:
        gain = None if whole is None else whole.attention_speedup
        rows.append(("attention", seconds(timing.attention_s) + (f", {as_fast(gain)} as dense" if gain else "")))
    if timing.end_to_end_s is not None:
        rows.append(("end to end", seconds(timing.end_to_end_s)))
    error = error_words(record)
    if error is not None:
        rows.append(("attention error", error))
    return rows


def _steps(record: Record) -> str:
    """How many denoising steps the clip has, and of how many where it was stopped early."""
    planned = record.setting("steps")
    whole = str(planned if planned is not None else len(record.timing.steps) or "?")
    return whole if record.stopped_after is None else f"{record.stopped_after} of {whole}, stopped early"


def _settings(record: Record) -> list[tuple[str, str]]:
    shown = ("guidance_scale", "guidance_scale_2", "flow_shift")
    rows = [("model", str(record.setting("model")))]
    rows += [(name.replace("_", " "), str(record.setting(name))) for name in shown if record.setting(name) is not None]
    if record.flops.planned is not None:
        rows.append(("attention work", flops(record.flops.planned)))
    if record.setting("negative_prompt"):
        rows.append(("negative prompt", str(record.setting("negative_prompt"))))
    ran = [None if record.device is None else record.device.name, record.dtype, record.impl]
    rows.append(("device", ", ".join(word for word in ran if word is not None)))
    return rows


def _subtitle(clips: list[GalleryClip]) -> str:
    """How many clips the page has, their models and presets."""
    count = "1 clip" if len(clips) == 1 else f"{len(clips)} clips, oldest first"
    if not clips:
        return count
    models = dict.fromkeys(entry.record.model.title for entry in clips)
    presets = dict.fromkeys(entry.record.preset.name for entry in clips)
    return f"{count} · {', '.join(models)} · {'preset' if len(presets) == 1 else 'presets'} {', '.join(presets)}"


def _poster(entry: GalleryClip) -> str | None:
    """The middle frame as a data URI; None where none can be read (its link is still of use)."""
    if entry.clip.suffix.lower() in (".gif", ".webp"):
        return None
    from PIL import Image

    from vmonarch_cli.media.read import one_frame

    frames = entry.record.frames
    try:
        image = Image.fromarray(one_frame(entry.clip, frames.count / 2 / frames.fps))
    except (InputError, DeviceError):
        return None
    image.thumbnail((_POSTER_WIDTH, 4 * _POSTER_WIDTH))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return webpage.data_uri(stream.getvalue(), "image/jpeg")


def _sound_link(entry: GalleryClip, folder: Path) -> str | None:
    """The .wav beside a clip, where it is there; an .mp4 or .webm plays its own sound."""
    wav = sound_path(entry.clip)
    return _link(wav, folder) if entry.record.audio is not None and wav != entry.clip and wav.is_file() else None


def _link(path: Path, folder: Path) -> str:
    """Relative to the page, so that the folder can be moved; "./" keeps a name with a colon from being a scheme."""
    return "./" + quote(path.relative_to(folder).as_posix(), errors="surrogateescape")
