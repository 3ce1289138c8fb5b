"""A preset written as a file: checked as it will be read, and published whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from vmonarch_cli.media.publish import atomic
from vmonarch_cli.presets import FIELD_DOCS, Preset, format_value, parse_preset


def preset_text(preset: Preset) -> str:
    """TOML of a preset's fields that are not the defaults; its name is that of the file."""
    lines = []
    for name in FIELD_DOCS:
        value = getattr(preset, name)
        if name == "name" or value == Preset.model_fields[name].get_default():
            continue
        if isinstance(value, tuple) and all(isinstance(entry, str) for entry in value):
            lines += [f"{name} = [", *(f"    {_quoted(entry)}," for entry in value), "]"]
        else:
            lines.append(f"{name} = {_quoted(value) if isinstance(value, str) else format_value(value)}")
    return "\n".join(lines) + "\n"


def write_preset(preset: Preset, path: Path, *, overwrite: bool) -> Preset:
    """Write a preset and return it as it will be read; OutputError when that cannot be done, and nothing is left."""
    text = preset_text(preset)
    read = parse_preset(text, source=str(path), stem=path.stem)
    with atomic(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return read


def _quoted(text: str) -> str:
    """A printable text as TOML has it, whose basic strings escape as JSON's do."""
    return json.dumps(text, ensure_ascii=False)
