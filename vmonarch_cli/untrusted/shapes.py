"""What does not fit a pydantic model, as half a sentence for people."""

from __future__ import annotations

from pydantic import ValidationError

from vmonarch_cli.text import shown

_KINDS = {
    "string": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a table",
    "model": "a table",
    "dataclass": "a table",
    "list": "a list",
    "tuple": "a list",
    "none_required": "nothing",
    "finite_number": "a finite number",
}
_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "up to"),
}


def fault_of(error: ValidationError) -> str:
    """'it has no frames.height', 'frames.count takes a whole number, got a list': the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    kind, came = first["type"], first["input"]
    if kind == "missing":
        return f"it has no {where}"
    if kind == "extra_forbidden":
        return f"it has a field {shown(where)}, which is not known"
    subject = where or "it"
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"{subject} takes {words} {first['ctx'][name]}, got {short_value(came)}"
    if kind == "value_error":
        return f"{subject} {first['ctx']['error']}"
    valid = next((words for start, words in _KINDS.items() if kind.startswith(start)), None)
    return f"{subject} takes {valid}, got {short_value(came)}" if valid else f"{subject} cannot be {short_value(came)}"


def short_value(value: object) -> str:
    """A value of plain data for a sentence."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    return shown(value)
