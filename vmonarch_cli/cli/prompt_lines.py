"""Prompts files of commands whose clips all have the same settings."""

from __future__ import annotations

from vmonarch_cli.batch.prompts import read_prompts
from vmonarch_cli.errors import InputError


def prompts_of(source: str | None, purpose: str) -> list[str] | None:
    """The prompts of a file, of which no line may set anything else; None without a file."""
    if source is None:
        return None
    found = []
    for line in read_prompts(source).checked():
        others = [name for name in line.fields if name != "prompt"]
        if others:
            raise InputError(
                f"{source}, line {line.number}: a line for {purpose} holds a prompt and nothing else, "
                f"got {others[0]} as well"
            )
        found.append(str(line.fields.get("prompt", "")))
    return found
