"""What a clip's own file says of the clip: title, description and, as its comment, the record. No torch.

Of .mp4 and .webm, the containers that have a place for it. ffmpeg writes a copy that has it, and encodes nothing anew.
"""

from __future__ import annotations

import re
import subprocess
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from vmonarch_cli.media.ffmpeg import last_line, reading
from vmonarch_cli.untrusted.files import MAX_BYTES

TAGGED = (".mp4", ".webm")
"""Endings of files that can say what they are."""
RECORD = "comment"
"""The tag that holds the record."""
_HEAD = ";FFMETADATA1"
_SPECIAL = re.compile(r"([=;#\\\n])")


def write_tags(file: Path, tags: Mapping[str, str]) -> None:
    """Give a file tags, name -> text, in place of those that it has; OSError when ffmpeg cannot."""
    file = file.absolute()  # ffmpeg takes the colon of a relative path for the end of a protocol's name
    listed = file.with_name("tags.txt")
    copy = file.with_name("tagged")  # no clip has this name: it has no ending
    lines = [_HEAD, *(f"{name}={_SPECIAL.sub(_escaped, _plain(text))}" for name, text in tags.items())]
    listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        *reading(file),
        *("-y", "-f", "ffmetadata", "-i", str(listed)),
        *("-map", "0", "-map_metadata", "1", "-c", "copy", "-fflags", "+bitexact"),
        *(["-movflags", "+faststart"] if file.suffix.lower() == ".mp4" else []),
        *("-f", file.suffix[1:].lower(), str(copy)),
    ]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - ffmpeg
    listed.unlink()
    if done.returncode:
        copy.unlink(missing_ok=True)
        raise OSError(f"ffmpeg could not write what the clip is into it; is the disk full? ({last_line(done.stderr)})")
    copy.replace(file)


def read_tag(file: Path, name: str = RECORD) -> str | None:
    """The text of a tag of a file that may be a stranger's; None where it has none, or none that can be read.

    DeviceError without an ffmpeg that runs.
    """
    command = [*reading(file), "-f", "ffmetadata", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:  # noqa: S603 - ffmpeg
        content = b"" if process.stdout is None else process.stdout.read(MAX_BYTES + 1)
        process.kill()
    if len(content) > MAX_BYTES:
        return None
    # A line ends where no backslash stands before its end.
    found = re.search(rf"(?ims)^{re.escape(name)}=((?:\\.|[^\\\n])*)$", content.decode("utf-8", "replace"))
    return None if found is None else re.sub(r"(?s)\\(.)", r"\1", found[1])


def _escaped(match: re.Match[str]) -> str:
    return f"\\{match[1]}"


def _plain(text: str) -> str:
    """Without control characters, which no tag may hold."""
    return "".join(" " if unicodedata.category(sign) in ("Cc", "Cs") else sign for sign in text)
