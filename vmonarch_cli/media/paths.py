"""Where clips go: names from prompt and seed, and checks that a path can be written before a long run starts."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmonarch_cli.errors import OutputError
from vmonarch_cli.text import shown
from vmonarch_cli.untrusted.files import MAX_NAME, MAX_PATH, user_path

DEFAULT_FOLDER = "outputs"
ENDINGS = (".mp4", ".webm", ".gif", ".webp", ".png")
WITH_SOUND = (".mp4", ".webm")
"""Endings of clips that hold their sound themselves."""
DEFAULT_QUALITY = 8
"""Of a clip's file, from 1 to 10; see `encoders.py`. Visually lossless; a 96x96 clip as .mp4 is below 100 KB."""
LATENTS_ENDING = ".latents.safetensors"
_SLUG_CHARACTERS = 48
_WEBP_SIDE = 16383
_FRAME = re.compile(r"frame-\d{4,}\.png|\.DS_Store|Thumbs\.db")
"""A file in the folder of a .png clip: a frame, or what a desktop puts there by itself."""


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


def sound_path(clip: Path) -> Path:
    """The file that holds a clip's sound: an .mp4 or .webm itself, and a .wav beside the others."""
    return clip if clip.suffix.lower() in WITH_SOUND else clip.with_suffix(".wav")


def is_taken(clip: Path, *, with_sound: bool = False) -> bool:
    """Whether a clip, its record, its latents or, `with_sound`, the file of its sound are there: then the name is
    another clip's, or will be.
    """
    files = (clip, record_path(clip), latents_path(clip), *((sound_path(clip),) if with_sound else ()))
    return any(os.path.lexists(path) for path in files)


def names_like(clip: Path) -> Iterator[Path]:
    """The clip's own path, then name-2, name-3 and on, without end."""
    yield clip
    for number in itertools.count(2):
        yield clip.with_stem(f"{clip.stem}-{number}")


def resolve_targets(
    output: str | None, prompt: str, seed: int, count: int, overwrite: bool, *, with_sound: bool = False
) -> tuple[Path, ...]:
    """Paths of the `count` clips of seeds seed, seed + 1, ...; OutputError when one exists or cannot be written.

    `output` is a file (.mp4, .webm, .gif, .webp, or .png for a folder of that name with one PNG per frame) or a folder,
    in which names come from the prompt and the seed and never collide with what is there. Several clips of one file
    name get -1, -2 and on. `with_sound`: clips may have a .wav beside them.
    """
    output = DEFAULT_FOLDER if output is None else output
    path = output_path(output)
    if _is_folder(output, path):
        _check_folder(path)
        found = tuple(_free_name(path, f"{slug(prompt)}-s{seed + i}", overwrite) for i in range(count))
        _check_lengths(found)
        return found
    if path.suffix.lower() not in ENDINGS:
        raise OutputError(
            f"output {path} ends in '{path.suffix}': valid endings are {', '.join(ENDINGS)} (.png makes a folder of "
            "PNGs), and a folder for the clips ends in '/'"
        )
    _check_folder(path.parent)
    names = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
    _check_lengths(names)
    for name in names:
        if os.path.lexists(latents_path(name)) and not overwrite:
            raise OutputError(
                f"{latents_path(name)} exists already: a run that did not end saved it, and vmonarch decode makes its "
                "clip; pass --overwrite to replace it, or another --output"
            )
        for taken in (name, record_path(name), *((sound_path(name),) if with_sound else ())):
            if os.path.lexists(taken) and not overwrite:
                raise OutputError(f"{taken} exists already: pass --overwrite to replace it, or another --output")
        if name.exists() and name.is_dir() != (name.suffix.lower() == ".png"):
            kind = "a folder" if name.is_dir() else "a file"
            raise OutputError(f"{name} is {kind}, which a {name.suffix} clip cannot replace: choose another --output")
        check_frames_alone(name)
    return tuple(names)


def check_frames_alone(clip: Path) -> None:
    """OutputError where a clip's folder of PNGs is there and holds what is no frame: it is replaced as a whole."""
    if not clip.is_dir():
        return
    try:
        others = sorted(entry.name for entry in clip.iterdir() if not _FRAME.fullmatch(entry.name))
    except OSError as error:
        raise OutputError(f"{clip} cannot be read ({error.strerror}), so it is not replaced") from None
    if others:
        raise OutputError(f"{clip} holds {shown(others[0])}, which is no frame of a clip and would be lost")


def check_format(paths: tuple[Path, ...], fps: int, height: int, width: int) -> None:
    """OutputError for a clip that its format cannot hold.

    A GIF counts in hundredths of a second, and players slow down what is shorter than two of them; a WebP has sides of
    14 bits.
    """
    if fps > 50 and any(path.suffix.lower() == ".gif" for path in paths):
        raise OutputError(f"a .gif cannot show {fps} frames per second: valid are 1 to 50, or an .mp4")
    if max(height, width) > _WEBP_SIDE and any(path.suffix.lower() == ".webp" for path in paths):
        raise OutputError(f"a .webp has sides of up to {_WEBP_SIDE} pixels, not {width}x{height}: choose an .mp4")


def output_path(output: str) -> Path:
    """The path that --output gives; OutputError for one that no file system, or no record in UTF-8, can name."""
    if not output.strip():
        raise OutputError("--output is empty: it takes a file ending in .mp4, .webm, .gif, .webp or .png, or a folder")
    try:
        output.encode()
    except UnicodeEncodeError:
        raise OutputError(f"output {output!a} is not UTF-8: give a path that is") from None
    return user_path(output, "output", OutputError)


def _check_lengths(clips: Sequence[Path]) -> None:
    """OutputError unless the longest name that a clip takes on its way fits the file system."""
    for clip in clips:
        spare = MAX_NAME - len(os.fsencode(latents_path(clip).name))
        if spare < 0:
            raise OutputError(
                f"output name {clip.name[:40]}... is too long by {-spare} bytes: {clip.suffix} clips take up "
                f"to {MAX_NAME - len(LATENTS_ENDING) + len(clip.suffix)} bytes, so that the latents' name fits as well"
            )
        if len(os.fsencode(clip.absolute())) + MAX_NAME > MAX_PATH:
            raise OutputError(f"output path {str(clip)[:40]}... is too long: choose a folder with a shorter path")


def _is_folder(text: str, path: Path) -> bool:
    if text.endswith(("/", os.sep)) or not path.suffix:
        return True
    return path.is_dir() and path.suffix.lower() != ".png"


def _free_name(folder: Path, stem: str, overwrite: bool) -> Path:
    """folder/stem.mp4, or the first of stem-2, stem-3, ... of which neither clip nor record nor latents exist."""
    return next(path for path in names_like(folder / f"{stem}.mp4") if overwrite or not is_taken(path))


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
