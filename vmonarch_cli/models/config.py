"""A component's config.json as family files read it: by key, with the type and the range that they count on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from vmonarch_cli.errors import ModelError
from vmonarch_cli.text import printable, shown

MAX_FIGURE = 1 << 20
"""Largest whole number that any config may give for a size, a width or a number of layers."""
MAX_LIST = 64
"""Longest list in a config."""


class Config:
    """Values of one config.json. Each method raises ModelError that names the file, the key and what is valid.

    A value that is missing or null is `otherwise`, and an error where that is None, too.
    """

    def __init__(self, table: Mapping[str, Any], path: Path, owner: str) -> None:
        """owner: what is described, with its article ("a Wan transformer")."""
        self._table = table
        self._path = path
        self._owner = owner

    def whole(self, key: str, otherwise: int | None = None, *, least: int = 1) -> int:
        """A whole number from `least` to MAX_FIGURE; 4.0 is one."""
        return self._whole(key, self._value(key, otherwise), least)

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value = self._value(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FIGURE:
            self._refuse(key, f"a number above 0 and at most {MAX_FIGURE}", value)
        return float(value)

    def wholes(self, key: str, length: int | None = None, otherwise: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A list of whole numbers from 1; `length` of them where that is given."""
        values = self._list(key, otherwise)
        if length is not None and len(values) != length:
            self._refuse(key, f"a list of {length} whole numbers", values)
        return tuple(self._whole(key, value, 1) for value in values)

    def length(self, key: str, otherwise: tuple[()] | None = None) -> int:
        """How long a list is."""
        return len(self._list(key, otherwise))

    def count_true(self, key: str) -> int:
        """How many values of a list are true."""
        return sum(value is True for value in self._list(key, None))

    def flag(self, key: str) -> bool:
        """True or false; false where it is missing."""
        return self._table.get(key) is True

    def text(self, key: str) -> str:
        """A text; an empty one where it is missing."""
        value = self._table.get(key)
        return value if isinstance(value, str) else ""

    def _value(self, key: str, otherwise: object) -> Any:
        value = self._table.get(key)
        if value is None and otherwise is None:
            raise ModelError(f"{printable(str(self._path))} has no '{key}', which {self._owner} needs")
        return otherwise if value is None else value

    def _list(self, key: str, otherwise: tuple[int, ...] | None) -> list[Any]:
        value = self._value(key, otherwise)
        if not isinstance(value, list | tuple) or len(value) > MAX_LIST:
            self._refuse(key, f"a list of at most {MAX_LIST} values", value)
        return list(value)

    def _whole(self, key: str, value: object, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(key, f"a whole number from {least} to {MAX_FIGURE}", value)
        if not (math.isfinite(value) and value == int(value) and least <= value <= MAX_FIGURE):
            self._refuse(key, f"a whole number from {least} to {MAX_FIGURE}", value)
        return int(value)

    def _refuse(self, key: str, valid: str, value: object) -> NoReturn:
        raise ModelError(f"{printable(str(self._path))}: '{key}' of {self._owner} is {valid}, got {shown(value)}")
