"""Texts of strangers to values: UTF-8, JSON and TOML without long numbers, deep nesting, NUL or half characters.

Each `parse_*` raises `Malformed`, so that a caller can add the name and the line that it knows.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)
MAX_DEPTH = 64
"""Deepest nesting of lists and tables."""
MAX_DIGITS = 100
"""Longest number, in characters: the longest of a float64 written out has 24, of a 64-bit integer 20."""
_LONG_NUMBER = f"holds a number of more than {MAX_DIGITS} digits"
TOO_DEEP = "is nested too deeply"


class Malformed(ValueError):
    """What is wrong with a file or a text: half a sentence that follows its name, and the line (from 1) if known.

    `syntax` is true when the text does not parse at all, false when it parses and holds what is not taken.
    """

    def __init__(self, reason: str, line: int | None = None, *, syntax: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.syntax = syntax

    def about(self, name: str) -> str:
        """The whole sentence about what has this name."""
        return f"{name} {self.reason}" if self.line is None else f"{name} line {self.line}: {self.reason}"


def parse_text(content: bytes) -> str:
    """UTF-8 text, without its byte order mark; Malformed with the line for other bytes and for NUL."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed("is not UTF-8 text", content.count(b"\n", 0, error.start) + 1) from None
    if "\0" in text:
        raise Malformed("holds a NUL character", line_at(text, text.index("\0")))
    return text


def parse_json(
    text: str, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None, constants: bool = False
) -> Any:
    """The value of a JSON text; Malformed for bad syntax, long numbers, deep nesting, NUL and half surrogate pairs.

    pairs: makes a value of an object's (name, value) pairs, as `object_pairs_hook` of json.loads.
    constants: takes NaN, Infinity and -Infinity, which Python writes and JSON does not have.
    """

    def constant(word: str) -> float:
        if not constants:
            raise Malformed(f"is not valid JSON: {word} is not JSON", _line_of(text, word), syntax=True)
        return float(word.replace("Infinity", "inf"))

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_int=_placed(whole_number, text),
            parse_float=_placed(decimal_number, text),
            parse_constant=constant,
        )
    except json.JSONDecodeError as error:
        reason = f"is not valid JSON: {error.msg} at column {error.colno}"
        raise Malformed(reason, error.lineno, syntax=True) from None
    except RecursionError:
        raise Malformed(TOO_DEEP) from None
    check_value(value, text)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text; Malformed as for `parse_json`."""
    try:
        table = tomllib.loads(text, parse_float=_placed(_toml_float, text))
    except Malformed:
        raise
    except tomllib.TOMLDecodeError as error:
        raise Malformed(f"is not valid TOML: {error}", syntax=True) from None
    except RecursionError:
        raise Malformed(TOO_DEEP) from None
    except ValueError:  # Python makes no number of more than 4,300 decimal digits
        found = re.search(r"[0-9_]{4300,}", text)
        raise Malformed(_LONG_NUMBER, line_at(text, found.start()) if found else None) from None
    check_value(table, text)
    return table


def _toml_float(word: str) -> float:
    plain = word.replace("_", "")
    return float(plain) if plain.lstrip("+-") in ("inf", "nan") else decimal_number(plain)


def check_value(value: Any, text: str = "") -> None:
    """Malformed when a value holds a NUL, half of a surrogate pair, a number too long, or nests too deeply.

    value: dicts, lists, tuples, texts and numbers; text: where it was read from, to find the line.
    """
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            _check_characters(item, text)
        elif isinstance(item, int) and not isinstance(item, bool):
            if item.bit_length() > MAX_DIGITS * math.log2(10):
                raise Malformed(_LONG_NUMBER, _line_of(text, f"[0-9A-Fa-fox_]{{{MAX_DIGITS // 2},}}"))
        elif isinstance(item, dict | list | tuple):
            if depth >= MAX_DEPTH:
                raise Malformed(TOO_DEEP)
            waiting.extend((inner, depth + 1) for inner in _inside(item))


def _inside(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        yield from item
        yield from item.values()
    else:
        yield from item


def _check_characters(word: str, text: str) -> None:
    if "\0" in word:
        raise Malformed("holds a NUL character", _line_of(text, r"\\u0000|\\U00000000|\\x00"))
    if not _encodes(word):
        raise Malformed("holds half of a surrogate pair", _line_of(text, r"\\u[dD][89a-fA-F]"))


def _encodes(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_number(word: str) -> int:
    """The integer of decimal digits; Malformed, without a line, for more than MAX_DIGITS."""
    return int(_short(word))


def decimal_number(word: str) -> float:
    """The float of a number in decimal; Malformed, without a line, when it is too long or too large."""
    number = float(_short(word))
    if math.isinf(number):
        raise Malformed(f"holds the number {word}, which is too large")
    return number


def _short(word: str) -> str:
    if len(word) > MAX_DIGITS:
        raise Malformed(_LONG_NUMBER)
    return word


def _placed(make: Callable[[str], Number], text: str) -> Callable[[str], Number]:
    """`make`, whose Malformed gets the line of its word in a text."""

    def number(word: str) -> Number:
        try:
            return make(word)
        except Malformed as wrong:
            wrong.line = _line_of(text, re.escape(word))
            raise

    return number


def _line_of(text: str, pattern: str) -> int | None:
    found = re.search(pattern, text)
    return line_at(text, found.start()) if found else None


def line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
