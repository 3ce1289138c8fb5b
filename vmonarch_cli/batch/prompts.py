"""A file of prompts, as txt, CSV, JSONL or YAML, to one `Line` of settings per clip; all its errors at once.

Only form is checked here: fields, types, duplicates. What a value means is the plan's business.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vmonarch_cli.errors import InputError, InputErrors
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.text import near, shown

FORMATS = ("txt", "csv", "jsonl", "yaml")
STDIN = "-"
_ENDINGS = {".txt": "txt", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".yaml": "yaml", ".yml": "yaml"}
_REQUEST = {field.name for field in fields(GenerateRequest)}
_TEXTS = ("prompt", "negative_prompt", "size", "preset", "image", "output")
_WHOLES = ("seed", "height", "width", "num_frames", "fps", "steps", "dense_steps", "dense_layers")
_NUMBERS = ("guidance_scale", "guidance_scale_2", "flow_shift")
LINE_FIELDS = tuple(name for name in (*_TEXTS, *_WHOLES, *_NUMBERS) if name in _REQUEST)
"""What a line may set, by the names of the request's fields."""
_OTHER_NAMES = {
    "frames": "num_frames",
    "guidance": "guidance_scale",
    "num_inference_steps": "steps",
    "name": "output",
    "negative": "negative_prompt",
}
_FOR_ALL = {"model", "revision", "device", "dtype", "overwrite", "num_videos", "offload", "compile", "quantize"}


@dataclass(frozen=True)
class Line:
    """One clip of the file: the line it begins at (from 1), and the fields of `GenerateRequest` that it sets."""

    number: int
    fields: dict[str, Any] = field(default_factory=dict)


class _Reader:
    """Collects lines, and sentences about the lines that are wrong."""

    def __init__(self, source: str) -> None:
        self._source = source
        self.lines: list[Line] = []
        self.errors: list[str] = []

    def wrong(self, number: int, sentence: str) -> None:
        self.errors.append(f"{self._source} line {number}: {sentence}")

    def add(self, number: int, pairs: list[tuple[str, Any]], *, as_text: bool = False) -> None:
        """A clip from (name, value) pairs; `as_text`: numbers come as text, and an empty text says nothing."""
        found: dict[str, Any] = {}
        before = len(self.errors)
        for given, raw in pairs:
            if raw is None or (as_text and raw == ""):
                continue
            name = _field_name(given)
            if name not in LINE_FIELDS:
                self.wrong(number, _unknown(given, name))
            elif name in found:
                self.wrong(number, f"{name} is given twice")
            else:
                try:
                    found[name] = _value(name, raw, as_text)
                except InputError as error:
                    self.wrong(number, error.message)
        if len(self.errors) == before:
            self.lines.append(Line(number, found))


def read_prompts(source: str, format: str | None = None) -> list[Line]:
    """The lines of a file, or of stdin for "-"; `format` is one of FORMATS, by default told by the ending (stdin: txt).

    Raises InputErrors with one sentence for everything that is wrong with it.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"--prompts-format takes {', '.join(FORMATS)}, got {shown(format)}{near(format, FORMATS)}")
    name = "stdin" if source == STDIN else source
    kind = format or _format_of(source)
    return parse_prompts(_read(source), kind, name)


def parse_prompts(content: bytes, format: str, source: str) -> list[Line]:
    """As `read_prompts`, from bytes; `source` opens every sentence."""
    reader = _Reader(source)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputErrors([f"{source} line {line}: is not UTF-8 text"]) from None
    try:
        {"txt": _txt, "csv": _csv, "jsonl": _jsonl, "yaml": _yaml}[format](text, reader)
    except RecursionError:
        reader.errors.append(f"{source} is nested too deeply for a list of prompts")
    if not reader.lines and not reader.errors:
        reader.errors.append(f"{source} has no prompts: it takes one per {'item' if format == 'yaml' else 'line'}")
    if reader.errors:
        raise InputErrors(reader.errors)
    return reader.lines


def _read(source: str) -> bytes:
    if source == STDIN:
        return sys.stdin.buffer.read()
    try:
        return Path(source).expanduser().read_bytes()
    except FileNotFoundError:
        raise InputError(f"prompts file {source} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"prompts file {source} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _format_of(source: str) -> str:
    if source == STDIN:
        return "txt"
    ending = Path(source).suffix.lower()
    if ending not in _ENDINGS:
        raise InputError(
            f"prompts file {source} ends in '{ending}': valid endings are {', '.join(_ENDINGS)}, and --prompts-format "
            "says it for any other"
        )
    return _ENDINGS[ending]


def _rows(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines; str.splitlines would also cut at form feeds and at Unicode's separators."""
    for number, row in enumerate(text.split("\n"), start=1):
        yield number, row.removesuffix("\r")


def _txt(text: str, reader: _Reader) -> None:
    for number, row in _rows(text):
        if row.strip() and not row.lstrip().startswith("#"):
            reader.add(number, [("prompt", row.strip())])


def _csv(text: str, reader: _Reader) -> None:
    table = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        number = table.line_num + 1
        try:
            row = next(table, None)
        except csv.Error as error:
            reader.wrong(max(number, table.line_num), f"is not valid CSV: {error}")
            return
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            if not _good_header(header, number, reader):
                return
        elif len(row) > len(header):
            reader.wrong(number, f"has {len(row)} cells, and the header names {len(header)} columns")
        else:
            reader.add(number, list(zip(header, (cell.strip() for cell in row), strict=False)), as_text=True)


def _good_header(header: list[str], number: int, reader: _Reader) -> bool:
    names = [_field_name(cell) for cell in header]
    before = len(reader.errors)
    for given, name in zip(header, names, strict=True):
        if name not in LINE_FIELDS:
            reader.wrong(number, _unknown(given, name))
    for name in sorted({name for name in names if names.count(name) > 1 and name in LINE_FIELDS}):
        reader.wrong(number, f"{name} is given twice")
    if "prompt" not in names and len(reader.errors) == before:
        reader.wrong(number, "is the header of the CSV and has no column 'prompt'")
    return len(reader.errors) == before


def _jsonl(text: str, reader: _Reader) -> None:
    def constant(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    for number, row in _rows(text):
        if not row.strip():
            continue
        try:
            value = json.loads(row, object_pairs_hook=_Pairs, parse_constant=constant)
        except json.JSONDecodeError as error:
            reader.wrong(number, f"is not valid JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            reader.wrong(number, f"is not valid JSON: {error}")
        except RecursionError:
            reader.wrong(number, "is nested too deeply for a clip's settings")
        else:
            _add_item(number, value, reader)


class _Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object as they came, so that a name given twice is noticed."""


def _add_item(number: int, value: Any, reader: _Reader) -> None:
    if isinstance(value, _Pairs):
        reader.add(number, value)
    elif isinstance(value, str):
        reader.add(number, [("prompt", value)])
    else:
        reader.wrong(number, f"takes an object with a prompt, or a text, got {_shown(value)}")


def _yaml(text: str, reader: _Reader) -> None:
    loader: Any = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reader.wrong(line, f"is not valid YAML: {error.problem or error.context or 'it does not parse'}")
        return
    except yaml.reader.ReaderError as error:
        reader.wrong(text.count("\n", 0, error.position) + 1, "holds a character that YAML does not allow")
        return
    except (yaml.YAMLError, ValueError) as error:
        reader.wrong(1, f"is not valid YAML: {_one_line(error)}")
        return
    if root is None:
        return
    if not isinstance(root, yaml.SequenceNode):
        reader.wrong(root.start_mark.line + 1, "takes a list, in which each item is a prompt or a clip's settings")
        return
    for node in root.value:
        number = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            pairs = [_yaml_pair(loader, name, value, reader) for name, value in node.value]
            if None not in pairs:
                reader.add(number, [pair for pair in pairs if pair is not None])
        else:
            ok, value = _yaml_scalar(loader, node, reader)
            if ok:
                _add_item(number, value, reader)


def _yaml_pair(loader: Any, key: yaml.Node, value: yaml.Node, reader: _Reader) -> tuple[str, Any] | None:
    if not isinstance(key, yaml.ScalarNode):
        reader.wrong(key.start_mark.line + 1, "takes names of settings, got a list or mapping as a name")
        return None
    ok, plain = _yaml_scalar(loader, value, reader)
    return (key.value, plain) if ok else None


def _yaml_scalar(loader: Any, node: yaml.Node, reader: _Reader) -> tuple[bool, Any]:
    """(whether it is one, its value): lists and mappings within an item are not built at all, however large."""
    number = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode):
        reader.wrong(number, "takes a text or a number here, got a list or mapping")
        return False, None
    try:
        return True, loader.construct_object(node)
    except Exception as error:
        # A tag that its text does not fit makes PyYAML raise whatever comes: ValueError, KeyError, AttributeError.
        reader.wrong(number, f"is not valid YAML: {_one_line(error)}")
        return False, None


def _field_name(given: str) -> str:
    name = re.sub(r"[\s-]+", "_", given.strip().lower().removeprefix("--"))
    return _OTHER_NAMES.get(name, name)


def _unknown(given: str, name: str) -> str:
    if name in _FOR_ALL:
        return f"{name} is the same for all clips of a batch: give it as a flag"
    return f"there is no setting {shown(given)}{near(name, LINE_FIELDS)}: valid are {', '.join(LINE_FIELDS)}"


def _value(name: str, raw: Any, as_text: bool) -> Any:
    if name in _TEXTS:
        if not isinstance(raw, str):
            raise InputError(f"{name} takes a text, got {_shown(raw)}")
        return raw
    kind, word = (int, "a whole number") if name in _WHOLES else (float, "a number")
    try:
        if isinstance(raw, bool) or not isinstance(raw, (str if as_text else int) | float):
            raise ValueError
        if kind is int and isinstance(raw, float) and not raw.is_integer():
            raise ValueError
        return kind(raw)
    except (ValueError, OverflowError):
        raise InputError(f"{name} takes {word}, got {_shown(raw)}") from None


def _shown(value: Any) -> str:
    if isinstance(value, _Pairs):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    try:
        return shown(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
