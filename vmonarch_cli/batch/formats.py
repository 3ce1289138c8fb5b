"""The four formats of a prompts file: txt, CSV, JSON lines and YAML, each to calls of one `Reader`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import yaml

from vmonarch_cli.batch.lines import Reader, field_name, is_field, unknown_field
from vmonarch_cli.batch.values import Pairs, Written, words

_LONGEST_NUMBER = 40


def _rows(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines; str.splitlines would also cut at form feeds and at Unicode's separators."""
    for number, row in enumerate(text.split("\n"), start=1):
        yield number, row.removesuffix("\r")


def read_txt(text: str, reader: Reader) -> None:
    """A prompt per line; lines that start with # are comments."""
    for number, row in _rows(text):
        if row.strip() and not row.lstrip().startswith("#"):
            reader.add(number, [("prompt", row.strip())])


def read_csv(text: str, reader: Reader) -> None:
    """A header of settings and a clip per row; an empty cell says nothing."""
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


_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""What other programs put between the cells of a CSV file, and its name."""


def _good_header(header: list[str], number: int, reader: Reader) -> bool:
    only = header[0] if len(header) == 1 else ""
    for sign, plural in _SEPARATORS.items():
        if all(is_field(field_name(cell)) for cell in only.split(sign)) and sign in only:
            reader.wrong(number, f"has {plural} between its columns, and a CSV file has commas here")
            return False
    names = [field_name(cell) for cell in header]
    before = len(reader.faults)
    for given, name in zip(header, names, strict=True):
        if not is_field(name):
            reader.wrong(number, unknown_field(given, name))
    for name in sorted({name for name in names if names.count(name) > 1 and is_field(name)}):
        reader.wrong(number, f"{name} is given twice")
    if "prompt" not in names and len(reader.faults) == before:
        reader.wrong(number, "is the header of the CSV and has no column 'prompt'")
    return len(reader.faults) == before


def read_jsonl(text: str, reader: Reader) -> None:
    """An object, or a text that is the prompt, per line."""

    def constant(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    def whole(digits: str) -> int | Written:
        return int(digits) if len(digits) <= _LONGEST_NUMBER else Written(digits)

    for number, row in _rows(text):
        if not row.strip():
            continue
        try:
            value = json.loads(row, object_pairs_hook=Pairs, parse_constant=constant, parse_int=whole)
        except json.JSONDecodeError as error:
            reader.wrong(number, f"is not valid JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            reader.wrong(number, f"is not valid JSON: {error}")
        except RecursionError:
            reader.wrong(number, "is nested too deeply for a clip's settings")
        else:
            _add_item(number, value, reader)


def _add_item(number: int, value: Any, reader: Reader) -> None:
    if isinstance(value, Pairs):
        reader.add(number, value)
    elif isinstance(value, str):
        reader.add(number, [("prompt", value)])
    else:
        reader.wrong(number, f"takes an object with a prompt, or a text, got {words(value)}")


def read_yaml(text: str, reader: Reader) -> None:
    """A list of texts and mappings; nothing in it is built but texts, numbers, yes and no."""
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
    except (ValueError, OverflowError):
        # The scanner makes the character of an escape before it asks whether there is one.
        reader.wrong(loader.line + 1 if loader else 1, "is not valid YAML: an escape in it stands for no character")
        return
    if root is None:
        return
    if not isinstance(root, yaml.SequenceNode):
        reader.wrong(root.start_mark.line + 1, "takes a list, in which each item is a prompt or a clip's settings")
        return
    for node in root.value:
        number = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            _add_mapping(number, node, reader)
        else:
            ok, value = _scalar(node, reader)
            if ok:
                _add_item(number, value, reader)


def _add_mapping(number: int, node: yaml.MappingNode, reader: Reader) -> None:
    pairs: list[tuple[str, Any]] = []
    whole = True
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            reader.wrong(key.start_mark.line + 1, "takes names of settings, got a list or mapping as a name")
            whole = False
            continue
        ok, plain = _scalar(value, reader)
        if ok:
            pairs.append((key.value, plain))
        whole &= ok
    if whole:
        reader.add(number, pairs)


def _scalar(node: yaml.Node, reader: Reader) -> tuple[bool, Any]:
    """(whether it is one, its value): lists and mappings within an item are not built at all, however large."""
    number = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode):
        reader.wrong(number, "takes a text or a number here, got a list or mapping")
        return False, None
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "str":
        return True, node.value
    if kind == "null":
        return True, None
    if kind == "bool" and node.value.lower() in yaml.SafeLoader.bool_values:
        return True, yaml.SafeLoader.bool_values[node.value.lower()]
    if kind in ("bool", "int", "float", "timestamp"):
        return True, Written(node.value)
    reader.wrong(number, f"takes a text or a number here, got a value with the tag {node.tag}")
    return False, None
