"""The ffmpeg that clips are written and read with: where it is, and whether it can."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from vmonarch_cli.errors import DeviceError
from vmonarch_cli.text import first_line

CODECS = {".mp4": ("libx264", "aac"), ".webm": ("libvpx-vp9", "libopus")}
"""Ending -> the encoders of pictures and of sound that its clips are written with."""
_DEMUXERS = {".webm": "matroska"}
_CURE = "install imageio-ffmpeg again, or name another ffmpeg in IMAGEIO_FFMPEG_EXE"


def as_kind(clip: Path) -> list[str]:
    """Flags before an input: what a clip's ending says that it is.

    Without these ffmpeg takes whatever the content asks for: playlists, other files, addresses.
    """
    return ["-f", _DEMUXERS.get(clip.suffix.lower(), "mov"), "-protocol_whitelist", "file"]


def reading(clip: Path) -> list[str]:
    """The beginning of a command that reads a clip, up to its name, which is absolute: one with a colon would be an
    address. It leaves this program's own stdin alone.
    """
    return [reader_of(clip), "-nostdin", "-v", "error", *as_kind(clip), "-i", str(clip.absolute())]


def frames_in(clip: Path) -> tuple[int, str | None]:
    """(frames of pictures in a clip's file, what ffmpeg says of a file that it cannot read).

    Packets are counted, since decoding them takes as long as a tenth of encoding. Each is one line of checksums, while
    the progress of ffmpeg 7.0, which imageio-ffmpeg brings, does not say how many it copied.
    """
    command = [*reading(clip), "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-"]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - ffmpeg
    if done.returncode:
        return 0, last_line(done.stderr)
    return sum(not line.startswith(b"#") for line in done.stdout.splitlines()), None


def last_line(content: bytes) -> str:
    """Of what an ffmpeg that failed wrote to stderr, the line that says why."""
    lines = content.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def reader_of(clip: Path) -> str:
    """The ffmpeg that a clip is read with; DeviceError, with the cure, unless there is one that runs."""
    return _program(clip.suffix.lower(), "read")


def require_encoder(ending: str = ".mp4") -> None:
    """DeviceError, with the cure, unless there is an ffmpeg that runs and has the encoders of clips of this ending."""
    _program(ending, "written", CODECS[ending])


def _program(ending: str, done: str, codecs: tuple[str, ...] = ()) -> str:
    """The ffmpeg, which clips of an ending are `done` with."""
    import imageio_ffmpeg

    try:
        program: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise DeviceError(f"there is no ffmpeg, which {ending} clips are {done} with: {_CURE}") from None
    encoders, fault = _asked(program)
    missing = [codec for codec in codecs if codec not in encoders]
    if fault is None and missing:
        fault = f"has no {missing[0]}"
    if fault is not None:
        raise DeviceError(f"ffmpeg {program} {fault}, so that no {ending} can be {done}: {_CURE}")
    return program


@functools.cache
def _asked(program: str) -> tuple[frozenset[str], str | None]:
    """(what an ffmpeg lists as its encoders, why it does not run); asked once, for reading and for writing."""
    command = [program, "-hide_banner", "-encoders"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603 - ffmpeg
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        return frozenset(), f"does not run ({first_line(error)})"
    return frozenset(done.stdout.split()), None
