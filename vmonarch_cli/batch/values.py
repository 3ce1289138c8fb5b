"""Values as they stand in a prompts file, before anybody knows which field they are for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vmonarch_cli.text import shown

_LONGEST = 40
"""Characters of a number; the longest that any setting takes has 19 digits."""
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[-+]?\d+(\.0*)?", re.ASCII)


@dataclass(frozen=True)
class Written:
    """A value that is no text, as it stands in the file: YAML's 042, 1:30 and 0x1F are numbers in no other format."""

    text: str

    def __str__(self) -> str:
        return self.text


class Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object as they came, so that a name given twice is noticed."""


def decimal(raw: Any, *, whole: bool, as_text: bool = False) -> int | float | None:
    """The number that a value is, written in decimal digits; None for any other value.

    `as_text`: a text may be one, as in CSV, which has nothing else.
    """
    if isinstance(raw, bool):
        return None
    if isinstance(raw, Written) or (as_text and isinstance(raw, str)):
        text = (raw.text if isinstance(raw, Written) else raw).strip()
        if len(text) > _LONGEST or not (_WHOLE if whole else _NUMBER).fullmatch(text):
            return None
        return int(text.partition(".")[0]) if whole else float(text)
    if isinstance(raw, int):
        return raw if whole else float(raw)
    if isinstance(raw, float) and (not whole or raw.is_integer()):
        return int(raw) if whole else raw
    return None


def words(value: Any) -> str:
    """A value for a sentence."""
    if isinstance(value, Pairs):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, Written):
        digits = len(value.text)
        return f"a number of {digits} digits" if digits > _LONGEST and value.text.isdigit() else shown(value)
    return shown(value)
