"""YAML of strangers, as nodes with their lines and scalars as YAML 1.2 reads them."""

from __future__ import annotations

import re

import yaml

from vmonarch_cli.text import shown
from vmonarch_cli.untrusted.values import TOO_DEEP, Malformed, decimal_number, line_at, whole_number

_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")


def parse_yaml(text: str) -> yaml.Node | None:
    """The root node of a YAML text, None when it holds nothing; Malformed with the line when it does not parse.

    Nodes and not values: a caller takes what it knows, each with its line (`node.start_mark.line`, from 0), through
    `yaml_scalar`. So no alias is ever written out and no tag makes an object.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = f"is not valid YAML: {error.problem or error.context or 'it does not parse'}"
        raise Malformed(reason, mark.line + 1 if mark else None, syntax=True) from None
    except yaml.reader.ReaderError as error:
        where = line_at(text, error.position)
        raise Malformed("holds a character that YAML does not allow", where, syntax=True) from None
    except RecursionError:
        raise Malformed(TOO_DEEP) from None
    except (ValueError, OverflowError):  # an escape such as \UFFFFFFFF: PyYAML asks Python for that character
        line = loader.line + 1 if loader is not None else None
        raise Malformed(
            "is not valid YAML: an escape names a character that does not exist", line, syntax=True
        ) from None
    return root


def yaml_scalar(node: yaml.Node) -> str | int | float | bool | None:
    """The value of a scalar node as YAML 1.2 reads it; Malformed with its line for a list, a mapping or another tag.

    042, 1:30, 0x1F, 1_000, yes, no and dates are texts: YAML 1.1 made 34, 90, 31, 1000, booleans and dates of them.
    """
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode):
        raise Malformed("takes a text or a number here, got a list or mapping", line)
    try:
        return _scalar(node.tag, node.value)
    except Malformed as wrong:
        wrong.line = line
        raise


def _scalar(tag: str, text: str) -> str | int | float | bool | None:
    match tag.removeprefix("tag:yaml.org,2002:"):
        case "str":
            return _whole_pairs(text)
        case "null" if text in _NULLS:
            return None
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "int" if _WHOLE.fullmatch(text):
            return whole_number(text)
        case "float" if _DECIMAL.fullmatch(text):
            return decimal_number(text)
    raise Malformed(f"is not valid YAML: {shown(text)} does not fit its tag {shown(tag)}")


_NULLS = ("", "~", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Nodes with the tags of YAML 1.2's core schema, less its octal, hex, infinite and NaN numbers."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)"), list("tTfF")),
    ("int", _WHOLE, list("-+0123456789")),
    ("float", _DECIMAL, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern.pattern + r"\Z"), _first)


def _whole_pairs(word: str) -> str:
    """A text, its escaped surrogate pairs as the characters that they stand for: so JSON does, which is YAML, too."""
    if "\0" in word:
        raise Malformed("holds a NUL character")
    try:
        return word.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise Malformed("holds half of a surrogate pair") from None
