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

from vmonarch_cli.clip.record import clip_of, read_record
from vmonarch_cli.errors import InputError
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.review import webpage
from vmonarch_cli.text import flops, seconds

INDEX = "index.html"
_POSTER_WIDTH = 480
_READERS = 4


@dataclass(frozen=True)
class Entry:
    """One clip of the page."""

    clip: Path
    record_file: Path
    record: dict[str, Any]


def write_gallery(folder: Path) -> Path:
    """Write, or write again, the page of a folder and return its path.

    Raises InputError when the folder holds no clip with a record, OutputError when the page cannot be written.
    """
    entries = find_clips(folder)
    if not entries:
        raise InputError(f"{folder} holds no clip with a record beside it, as vmonarch writes them")
    with ThreadPoolExecutor(_READERS) as pool:  # ffmpeg decodes in processes of its own
        posters = list(pool.map(_poster, entries))
    cards = [_card(entry, poster, folder) for entry, poster in zip(entries, posters, strict=True)]
    name = folder.resolve().name or str(folder)
    clips = "1 clip" if len(entries) == 1 else f"{len(entries)} clips"
    body = f"<h1>{webpage.text(name)}</h1>\n<p class='dim'>{clips} · {webpage.text(_common(entries))}</p>\n"
    body += f'<div class="cards" style="margin-top:24px">\n{"".join(cards)}</div>'
    path = folder / INDEX
    with atomic(path, overwrite=True) as temporary:
        temporary.write_text(webpage.page(f"{name} · vmonarch", body), encoding="utf-8")
    return path


def find_clips(folder: Path) -> list[Entry]:
    """Clips below a folder whose record and file are both there, oldest record first."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: a gallery is made of a folder of clips")
    entries = []
    for file in folder.rglob("*.json"):
        inside = file.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not file.is_file():
            continue
        try:
            record = read_record(file)
        except InputError:  # some other JSON file
            continue
        clip = clip_of(record, file)
        if clip.exists():
            entries.append((file.stat().st_mtime_ns, inside.as_posix(), Entry(clip, file, record)))
    return [entry for _, _, entry in sorted(entries, key=lambda found: found[:2])]


def _card(entry: Entry, poster: str | None, folder: Path) -> str:
    link = webpage.text(_link(entry.clip, folder))
    record = entry.record
    return (
        f'<article class="card">{_media(entry, link, poster)}<div class="body">'
        f'<p class="prompt">{webpage.text(record["prompt"])}</p>{webpage.facts(_figures(record))}'
        f'<details class="small"><summary>settings</summary>{webpage.facts(_settings(record))}</details>'
        f'<p class="small" style="margin:10px 0 0"><a href="{link}">{webpage.text(entry.clip.name)}</a> · '
        f'<a href="{webpage.text(_link(entry.record_file, folder))}">record</a></p></div></article>\n'
    )


def _media(entry: Entry, link: str, poster: str | None) -> str:
    alt = webpage.text(str(entry.record["prompt"])[:200])
    size = entry.record["frames"]
    shape = f'width="{int(size["width"])}" height="{int(size["height"])}"'
    if entry.clip.suffix.lower() == ".mp4":
        still = f' poster="{poster}"' if poster else ""
        preload = "none" if poster else "metadata"
        return f'<video controls loop muted playsinline preload="{preload}" {shape}{still} src="{link}"></video>'
    if entry.clip.suffix.lower() == ".gif":
        return f'<img loading="lazy" {shape} alt="{alt}" src="{link}">'
    return f'<a href="{link}/"><img {shape} alt="{alt}" src="{poster}"></a>' if poster else ""


def _figures(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What a record measured, as far as it has it."""
    timing, frames = record.get("timing") or {}, record["frames"]
    rows = [
        ("preset", str(record["preset"].get("name"))),
        ("seed", str(record["seed"])),
        ("clip", f"{frames['width']}x{frames['height']}, {frames['count']} frames, {frames['fps']} fps"),
    ]
    if _number(timing.get("attention_s")):
        gain = timing.get("attention_speedup")
        rows.append(("attention", seconds(timing["attention_s"]) + (f", {gain:.2f}x dense" if _number(gain) else "")))
    parts = [timing.get(name) for name in ("text_encode_s", "denoise_s", "decode_s", "write_s")]
    if all(_number(part) for part in parts):
        rows.append(("end to end", seconds(sum(part for part in parts if part is not None))))
    if _number(timing.get("error")):
        rows.append(("attention error", f"{timing['error']:.3f}"))
    return rows


def _settings(record: dict[str, Any]) -> list[tuple[str, str]]:
    settings = {name: entry["value"] for name, entry in record["settings"].items()}
    shown = ("steps", "guidance_scale", "guidance_scale_2", "flow_shift")
    rows = [("model", str(settings.get("model")))]
    rows += [(name.replace("_", " "), str(settings[name])) for name in shown if settings.get(name) is not None]
    planned = (record.get("flops") or {}).get("planned")
    if isinstance(planned, int | float):
        rows.append(("attention work", flops(planned)))
    if settings.get("negative_prompt"):
        rows.append(("negative prompt", str(settings["negative_prompt"])))
    device = (record.get("device") or {}).get("name")
    rows.append(("device", f"{device}, {record.get('dtype')}, {record.get('impl')}"))
    return rows


def _common(entries: list[Entry]) -> str:
    """Models and presets of the page."""
    models = dict.fromkeys(str(entry.record["model"].get("title")) for entry in entries)
    presets = dict.fromkeys(str(entry.record["preset"].get("name")) for entry in entries)
    return f"{', '.join(models)} · {'preset' if len(presets) == 1 else 'presets'} {', '.join(presets)}"


def _poster(entry: Entry) -> str | None:
    """The middle frame as a data URI; None when the clip does not decode (its link is still of use)."""
    if entry.clip.suffix.lower() == ".gif":
        return None
    from PIL import Image

    from vmonarch_cli.media.read import one_frame

    frames = entry.record["frames"]
    try:
        image = Image.fromarray(one_frame(entry.clip, frames["count"] / 2 / frames["fps"]))
    except (InputError, KeyError, TypeError, ZeroDivisionError):
        return None
    image.thumbnail((_POSTER_WIDTH, 4 * _POSTER_WIDTH))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return webpage.data_uri(stream.getvalue(), "image/jpeg")


def _link(path: Path, folder: Path) -> str:
    """Relative to the page, so that the folder can be moved; "./" keeps a name with a colon from being a scheme."""
    return "./" + quote(path.relative_to(folder).as_posix(), errors="surrogateescape")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
