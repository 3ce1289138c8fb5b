"""The ffmpeg that clips are written with: where it is, and whether it can, asked before any work starts."""

from __future__ import annotations

import functools
import subprocess

from vmonarch_cli.errors import DeviceError
from vmonarch_cli.text import first_line

CODEC = "libx264"
SOUND_CODEC = "aac"
AS_MP4 = ["-f", "mov", "-protocol_whitelist", "file"]
"""Before an input. Without these ffmpeg takes whatever the content asks for: playlists, other files, addresses."""
_CURE = "install imageio-ffmpeg again, or name another ffmpeg in IMAGEIO_FFMPEG_EXE"


def require_encoder() -> None:
    """DeviceError, with the cure, unless there is an ffmpeg that runs and has the encoders of .mp4 clips."""
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise DeviceError(f"there is no ffmpeg, which .mp4 clips are written with: {_CURE}") from None
    fault = _fault(program)
    if fault is not None:
        raise DeviceError(f"ffmpeg {program} {fault}, so that no .mp4 can be written: {_CURE}")


@functools.cache
def _fault(program: str) -> str | None:
    command = [program, "-hide_banner", "-encoders"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603 - ffmpeg
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        return f"does not run ({first_line(error)})"
    missing = [codec for codec in (CODEC, SOUND_CODEC) if codec not in done.stdout.split()]
    return f"has no {missing[0]}" if missing else None
