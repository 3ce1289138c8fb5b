"""A file of prompts to one `Line` of settings per clip, and everything that is wrong with its form, at once.

Only form is checked here: fields, types, duplicates. What a value means is the plan's business.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from vmonarch_cli.batch import formats
from vmonarch_cli.batch.lines import Prompts, Reader
from vmonarch_cli.errors import InputError
from vmonarch_cli.text import near, shown
from vmonarch_cli.untrusted.files import limited, regular_bytes, user_path
from vmonarch_cli.untrusted.values import Malformed

FORMATS = ("txt", "csv", "jsonl", "yaml")
STDIN = "-"
_ENDINGS = {".txt": "txt", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".yaml": "yaml", ".yml": "yaml"}


def read_prompts(source: str, format: str | None = None) -> Prompts:
    """The prompts of a file, or of stdin for "-"; `format` is one of FORMATS, by default the ending's (stdin: txt).

    Raises InputError when it cannot be read at all.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"--prompts-format takes {', '.join(FORMATS)}, got {shown(format)}{near(format, FORMATS)}")
    kind = format or _format_of(source)
    return parse_prompts(_read(source), kind, "stdin" if source == STDIN else source)


def parse_prompts(content: bytes, format: str, source: str) -> Prompts:
    """As `read_prompts`, from bytes; `source` opens every sentence."""
    reader = Reader()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Prompts(source, [], [(content.count(b"\n", 0, error.start) + 1, "is not UTF-8 text")])
    readers: dict[str, Callable[[str, Reader], None]] = {
        "txt": formats.read_txt,
        "csv": formats.read_csv,
        "jsonl": formats.read_jsonl,
        "yaml": formats.read_yaml,
    }
    try:
        readers[format](text, reader)
    except RecursionError:
        reader.wrong(0, "is nested too deeply for a list of prompts")
    if not reader.lines and not reader.faults:
        reader.wrong(0, f"has no prompts: it takes one per {'item' if format == 'yaml' else 'line'}")
    return Prompts(source, reader.lines, reader.faults)


def _read(source: str) -> bytes:
    """The bytes of a regular file, of a shell's `<(command)` or of stdin, up to a limit."""
    name = "stdin" if source == STDIN else f"prompts file {source}"
    try:
        if source == STDIN:
            return limited(sys.stdin.buffer.read)
        return regular_bytes(user_path(source, "prompts file"), shell_pipes=True)
    except Malformed as wrong:
        raise InputError(wrong.about(name)) from None
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None


def _format_of(source: str) -> str:
    if source == STDIN:
        return "txt"
    if Path(source).is_dir():
        raise InputError(f"prompts file {source} is a folder, not a file")
    ending = Path(source).suffix.lower()
    if ending not in _ENDINGS:
        raise InputError(
            f"prompts file {source} ends in '{ending}': valid endings are {', '.join(_ENDINGS)}; give --prompts-format "
            "for any other"
        )
    return _ENDINGS[ending]
