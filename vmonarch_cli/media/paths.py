"""Where clips go: names from prompt and seed, and checks that a path can be written before a long run starts."""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from pathlib import Path

from vmonarch_cli.errors import OutputError

DEFAULT_FOLDER = "outputs"
ENDINGS = (".mp4", ".gif", ".png")
LATENTS_ENDING = ".latents.safetensors"
_SLUG_CHARACTERS = 48


def slug(prompt: str) -> str:
    """A prompt as a file name: lower-case ASCII words joined by hyphens, cut at a word after 48 characters."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", plain)
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:_SLUG_CHARACTERS]
        if len(longer) > _SLUG_CHARACTERS:
            break
        name = longer
    return name or "clip"


def record_path(clip: Path) -> Path:
    """The JSON record beside a clip: the same name with the ending .json."""
    return clip.with_suffix(".json")


def latents_path(clip: Path) -> Path:
    """Where the latents of a clip are while it is not written: beside it, with an ending of their own."""
    return clip.with_suffix(LATENTS_ENDING)


def resolve_targets(output: str | None, prompt: str, seed: int, count: int, overwrite: bool) -> tuple[Path, ...]:
    """Paths of the `count` clips of seeds seed, seed + 1, ...; OutputError when one exists or cannot be written.

    `output` is a file (.mp4, .gif, or .png for a folder of that name with one PNG per frame) or a folder, in which
    names come from the prompt and the seed and never collide with what is there. Several clips of one file name get
    -1, -2 and on.
    """
    if output is not None and not output.strip():
        raise OutputError("--output is empty: it takes a file ending in .mp4, .gif or .png, or a folder")
    path = Path(output or DEFAULT_FOLDER).expanduser()
    if _is_folder(output or DEFAULT_FOLDER, path):
        _check_folder(path)
        return tuple(_free_name(path, f"{slug(prompt)}-s{seed + i}", overwrite) for i in range(count))
    if path.suffix.lower() not in ENDINGS:
        raise OutputError(
            f"output {path} ends in '{path.suffix}': valid endings are {', '.join(ENDINGS)} (.png makes a folder of "
            "PNGs), and a folder for the clips ends in '/'"
        )
    _check_folder(path.parent)
    names = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
    for name in names:
        for taken in (name, record_path(name)):
            if taken.exists() and not overwrite:
                raise OutputError(f"{taken} exists already: pass --overwrite to replace it, or another --output")
        if name.exists() and name.is_dir() != (name.suffix.lower() == ".png"):
            kind = "a folder" if name.is_dir() else "a file"
            raise OutputError(f"{name} is {kind}, which a {name.suffix} clip cannot replace: choose another --output")
    return tuple(names)


def check_rate(paths: tuple[Path, ...], fps: int) -> None:
    """A GIF counts in hundredths of a second, and players slow down what is shorter than two of them."""
    if fps > 50 and any(path.suffix.lower() == ".gif" for path in paths):
        raise OutputError(f"a .gif cannot show {fps} frames per second: valid are 1 to 50, or an .mp4")


def _is_folder(text: str, path: Path) -> bool:
    if text.endswith(("/", os.sep)) or not path.suffix:
        return True
    return path.is_dir() and path.suffix.lower() != ".png"


def _free_name(folder: Path, stem: str, overwrite: bool) -> Path:
    """folder/stem.mp4, or the first of stem-2, stem-3, ... of which neither clip nor record exists."""
    number = 1
    while True:
        path = folder / (f"{stem}.mp4" if number == 1 else f"{stem}-{number}.mp4")
        if overwrite or not (path.exists() or record_path(path).exists()):
            return path
        number += 1


def _check_folder(folder: Path) -> None:
    """OutputError unless `folder`, or the nearest folder above it that exists, takes a new file (nothing is left)."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"output folder {folder} cannot be made: {existing} is not a folder")
    try:
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        # An unnamed file: it is never visible, and it finds a read-only or full file system that access() does not.
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise OutputError(
            f"output folder {folder} cannot be written ({error.strerror}): choose another --output"
        ) from None
