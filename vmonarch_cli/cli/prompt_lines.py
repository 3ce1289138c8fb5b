"""Prompts files of commands whose clips all have the same settings."""

from __future__ import annotations

from vmonarch_cli.batch.lines import Line
from vmonarch_cli.errors import InputError


def prompt_of(line: Line, source: str, purpose: str) -> str:
    """The prompt of a line, which must set nothing else."""
    others = [name for name in line.fields if name != "prompt"]
    if others:
        raise InputError(
            f"{source}, line {line.number}: a line for {purpose} holds a prompt and nothing else, "
            f"got {others[0]} as well"
        )
    return str(line.fields.get("prompt", ""))
