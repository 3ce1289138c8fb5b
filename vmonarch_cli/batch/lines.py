"""A line of a prompts file: the settings that it may give, and how their names and types are read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from vmonarch_cli.batch.values import Pairs, Written, decimal, words
from vmonarch_cli.errors import InputError, InputErrors
from vmonarch_cli.plan.noise_levels import check_sigmas, read_sigmas
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.seeds import RANDOM, is_random
from vmonarch_cli.presets import Preset
from vmonarch_cli.text import near, shown

PRESET_FIELD = "preset."
"""Opens the name of a field that is one of the preset's own, as in preset.band."""
_REQUEST = {field.name for field in fields(GenerateRequest)}
_TEXTS = (
    *("prompt", "negative_prompt", "size", "preset", "transformer", "transformer_2", "image", "tuned", "output"),
    *("last_image", "video", "sampler", "recipe"),
)
_WHOLES = ("seed", "height", "width", "num_frames", "fps", "steps", "dense_steps", "dense_layers", "quality")
_NUMBERS = ("guidance_scale", "guidance_scale_2", "flow_shift", "strength")
LINE_FIELDS = tuple(name for name in (*_TEXTS, *_WHOLES, *_NUMBERS, "sigmas") if name in _REQUEST)
"""What a line may set, by the names of the request's fields; and any preset.FIELD."""
_PRESET_FIELDS = tuple(name for name in Preset.model_fields if name not in ("name", "description"))
_OTHER_NAMES = {
    "frames": "num_frames",
    "guidance": "guidance_scale",
    "num_inference_steps": "steps",
    "name": "output",
    "negative": "negative_prompt",
}
_FOR_ALL = {
    *("model", "revision", "device", "dtype", "overwrite", "num_videos", "offload", "compile", "fuse", "quantize"),
    *("graphs", "dense_below"),
}


@dataclass(frozen=True)
class Line:
    """One clip of the file: the line it begins at (from 1), and the fields of `GenerateRequest` that it sets.

    A field of the preset is there as preset.FIELD, its value as `--set` takes it.
    """

    number: int
    fields: dict[str, Any] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    """Fields that the line gives in a wrong form; they are in no `fields`, and the clip cannot be made."""


@dataclass(frozen=True)
class Prompts:
    """What a file says, right and wrong."""

    source: str
    """The file's name for sentences."""
    lines: list[Line]
    faults: list[tuple[int, str]]
    """(line, sentence) of everything whose form is wrong; line 0 for the file as a whole."""

    def checked(self) -> list[Line]:
        """The lines; InputErrors with one sentence for everything that is wrong with the file's form."""
        if self.faults:
            raise InputErrors([located(self.source, *fault) for fault in self.faults])
        return self.lines


class Reader:
    """Collects lines, and sentences about the lines that are wrong."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.faults: list[tuple[int, str]] = []

    def wrong(self, number: int, sentence: str) -> None:
        """Note what is wrong with a line."""
        self.faults.append((number, sentence))

    def add(self, number: int, pairs: list[tuple[str, Any]], *, as_text: bool = False) -> None:
        """A clip from (name, value) pairs; `as_text`: numbers come as text, and an empty text says nothing."""
        found: dict[str, Any] = {}
        refused: set[str] = set()
        for given, raw in pairs:
            if raw is None or (as_text and raw == ""):
                continue
            name = field_name(given)
            if not is_field(name):
                self.wrong(number, unknown_field(given, name))
                refused.add(name)
            elif name in found:
                self.wrong(number, f"{name} is given twice")
                refused.add(name)
            else:
                try:
                    found[name] = _value(name, raw, as_text)
                except InputError as error:
                    self.wrong(number, error.message)
                    refused.add(name)
        self.lines.append(Line(number, found, frozenset(refused)))


def located(source: str, number: int, sentence: str) -> str:
    """A sentence with its file and, where it is about one, its line."""
    return f"{source} line {number}: {sentence}" if number else f"{source} {sentence}"


def field_name(given: str) -> str:
    """A field's own name from what stands in the file: in any case, with dashes or spaces, as a flag."""
    name = re.sub(r"[\s-]+", "_", given.strip().lower().removeprefix("--"))
    return _OTHER_NAMES.get(name, name)


def is_field(name: str) -> bool:
    """Whether a line may set it."""
    return name in LINE_FIELDS or (name.startswith(PRESET_FIELD) and name[len(PRESET_FIELD) :] in _PRESET_FIELDS)


def unknown_field(given: str, name: str) -> str:
    """Why a name is not a line's to set."""
    if name in _FOR_ALL:
        return f"{name} is the same for all clips of a batch: give it as a flag"
    if name.startswith(PRESET_FIELD) or name in _PRESET_FIELDS:
        valid = [PRESET_FIELD + field for field in _PRESET_FIELDS]
        close = near(PRESET_FIELD + name.removeprefix(PRESET_FIELD), valid, cutoff=0.8)
        return f"there is no setting {shown(given)}{close}: fields of the preset are {', '.join(valid)}"
    valid = [*LINE_FIELDS, f"{PRESET_FIELD}FIELD"]
    return f"there is no setting {shown(given)}{near(name, LINE_FIELDS)}: valid are {', '.join(valid)}"


def _value(name: str, raw: Any, as_text: bool) -> Any:
    if name in _TEXTS:
        if not isinstance(raw, str):
            raise InputError(f"{name} takes a text, got {words(raw)}")
        return raw
    if name.startswith(PRESET_FIELD):
        return _preset_value(name, raw)
    if name == "seed" and is_random(raw):
        return RANDOM
    if name == "sigmas":
        return _sigmas(raw)
    whole = name in _WHOLES
    value = decimal(raw, whole=whole, as_text=as_text)
    if value is None and name == "dense_steps":  # a share of the steps
        value = decimal(raw, whole=False, as_text=as_text)
    if value is None:
        raise InputError(f"{name} takes {'a whole number' if whole else 'a number'}, got {words(raw)}")
    return value


def _sigmas(raw: Any) -> tuple[float, ...]:
    """Noise levels: a list of numbers, or a text as `--sigmas` takes it."""
    if isinstance(raw, str):
        return read_sigmas(raw)
    if isinstance(raw, list) and not isinstance(raw, Pairs):
        levels = [decimal(value, whole=False) for value in raw]
        if all(level is not None for level in levels):
            return check_sigmas(tuple(float(level) for level in levels if level is not None))
    raise InputError(f"sigmas takes a list of numbers, or a text as in 1,0.75,0.5, got {words(raw)}")


def _preset_value(name: str, raw: Any) -> str:
    """A value of a preset's field as `--set` takes it."""
    if isinstance(raw, bool):
        return "true" if raw else "false"
    text = raw.text if isinstance(raw, Written) else str(raw) if isinstance(raw, str | int | float) else ""
    if not text.strip() or len(text) > 60 or not text.isprintable():
        raise InputError(f"{name} takes a value as --set does, got {words(raw)}")
    return text.strip()
