"""Presets: small TOML files that say how self-attention is computed, validated into a frozen `Preset`.

Every field carries its unit, its range and one sentence (`FIELD_DOCS`), which `vmonarch presets show` prints and every
error message quotes, so that what is documented is what is checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from vmonarch_cli.errors import PresetError
from vmonarch_cli.text import near, one_line, shown
from vmonarch_cli.untrusted.files import read_text, user_path
from vmonarch_cli.untrusted.values import Malformed, check_value, parse_toml

DEFAULT_PRESET = "balanced"
"""Of a model that was not tuned with Monarch attention: README, Measured, says what this rests on."""
MAX_BAND_FRAMES = 4096
MAX_DENSE = 1000
MAX_FILE_BYTES = 1 << 20
_LATER = {"first_turns", "step_refresh", "layer_refresh", "few_steps"}
"""Fields that not every version had; None says nothing."""
LABELS = ("name", "description", "evidence")
"""Fields that change nothing of what is computed."""
_Line = Annotated[str, Field(max_length=500), AfterValidator(one_line)]
"""Text that stands in tables, pages and records."""
_Frames = Annotated[float, Field(ge=0, le=MAX_BAND_FRAMES)]


class FewSteps(BaseModel):
    """What replaces fields of a preset in clips of at most ``up_to`` denoising steps; None replaces nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    up_to: int = Field(ge=1, le=MAX_DENSE)
    num_steps: int | None = Field(default=None, ge=1, le=8)
    warm_start: bool | None = None
    first_frame: bool | None = None
    refresh: _Frames | None = None
    shared_refresh: bool | None = None
    first_turns: float | None = Field(default=None, ge=0, le=1)
    dense_steps: int | None = Field(default=None, ge=0, le=MAX_DENSE)

    def changes(self) -> dict[str, Any]:
        """The fields that it replaces."""
        return {name: value for name, value in self.model_dump(exclude={"up_to"}).items() if value is not None}


class Preset(BaseModel):
    """How the self-attention of a run is computed (frozen; unknown fields are refused; units in `FIELD_DOCS`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: _Line = Field(min_length=1, max_length=60)
    description: _Line = ""
    attention: Literal["monarch", "dense"] = "monarch"
    num_steps: int = Field(default=2, ge=1, le=8)
    warm_start: bool = False
    c_floor: float = Field(default=0.1, gt=0.0, le=1.0)
    first_frame: bool = True
    band: int | None = Field(default=None, ge=0, le=MAX_BAND_FRAMES)
    refresh: float = Field(default=0, ge=0, le=MAX_BAND_FRAMES)
    shared_refresh: bool = False
    first_turns: float | None = Field(default=None, ge=0, le=1)
    step_refresh: tuple[_Frames, ...] | None = Field(default=None, min_length=1, max_length=MAX_DENSE)
    layer_refresh: tuple[_Frames, ...] | None = Field(default=None, min_length=1, max_length=MAX_DENSE)
    dense_steps: int | float = 0
    dense_layers: int = Field(default=0, ge=0, le=MAX_DENSE)
    few_steps: FewSteps | None = None
    evidence: tuple[_Line, ...] | None = Field(default=None, max_length=50)
    impl: Literal["auto", "reference", "torch", "triton"] = "auto"

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        """Brackets in a name read as markup, or as a choice, in every list of names."""
        if set("[]") & set(value):
            raise ValueError("brackets")
        return value

    @field_validator("band", "first_turns", "step_refresh", "layer_refresh", "few_steps", "evidence", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        """TOML has no null: the string "none" stands for "no exact band", and for what is left to the program."""
        return None if value == "none" else tuple(value) if isinstance(value, list) else value

    @field_validator("dense_steps")
    @classmethod
    def _count_or_share(cls, value: int | float) -> int | float:
        """A whole number counts steps, any other number is a share of them."""
        if not 0 <= value <= (MAX_DENSE if isinstance(value, int) else 1):
            raise ValueError("neither a count nor a share")
        return value

    def computed_fields(self) -> dict[str, Any]:
        """What tells two presets apart, as JSON has it: no labels, and no later fields that say nothing, so that clips
        and timings of earlier versions are still known.
        """
        fields = self.model_dump(mode="json", exclude=set(LABELS))
        return {name: value for name, value in fields.items() if value is not None or name not in _LATER}


@dataclass(frozen=True)
class FieldDoc:
    """What a user reads about a preset field: its unit, what is valid, and one sentence."""

    unit: str
    valid: str
    sentence: str


FIELD_DOCS: dict[str, FieldDoc] = {
    "name": FieldDoc(
        "text", "1 to 60 printable characters without brackets", "Name of the preset in tables and records."
    ),
    "description": FieldDoc(
        "text", "one line of up to 500 printable characters", "One sentence: what the preset is for."
    ),
    "attention": FieldDoc("choice", '"monarch" or "dense"', "Monarch-structured attention, or the dense original."),
    "num_steps": FieldDoc(
        "iterations", "a whole number from 1 to 8", "Alternations of R-step and L-step in a call that starts cold."
    ),
    "warm_start": FieldDoc(
        "yes/no",
        "true or false",
        "Later denoising steps start from the last step's L factor and do one iteration; costs memory for L in 8 bits.",
    ),
    "c_floor": FieldDoc(
        "weight", "a number above 0 and at most 1", "Lower bound of the weight that divides an R-step's mean query."
    ),
    "first_frame": FieldDoc(
        "yes/no", "true or false", "Recompute the queries of the first latent frame exactly, over all keys."
    ),
    "band": FieldDoc(
        "latent frames",
        f'a whole number from 0 to {MAX_BAND_FRAMES}, or "none"',
        "Key frames on each side of a query's frame that are attended exactly; 0 is the own frame alone.",
    ),
    "refresh": FieldDoc(
        "latent frames per forward",
        f"a number from 0 to {MAX_BAND_FRAMES}",
        "How many query frames each forward recomputes exactly, on average. Frames take turns, and the first turns "
        "come early in the clip. The change is kept in 8 bits and corrects the frame until its next turn.",
    ),
    "shared_refresh": FieldDoc(
        "yes/no",
        "true or false",
        "With guidance, the first of two forwards takes the turns of both, and its corrections serve both. They are "
        "younger and need half the memory, but the second forward has none of its own.",
    ),
    "first_turns": FieldDoc(
        "share of the turns",
        'a number from 0 to 1, or "none"',
        "How many of a clip's turns the first structured step takes, at most one for every frame; what is more comes "
        "in the next, and the others evenly. None: a third of a forward's, for at most half of the frames, and then "
        "most turns early.",
    ),
    "step_refresh": FieldDoc(
        "latent frames per forward, by step",
        f'a list of numbers from 0 to {MAX_BAND_FRAMES}, one for each denoising step, or "none"',
        "As refresh, for every step of the clip by itself. Steps that run dense have a number, too.",
    ),
    "layer_refresh": FieldDoc(
        "weights, by layer",
        f'a list of numbers from 0 to {MAX_BAND_FRAMES}, one for each layer, or "none"',
        "What refresh is multiplied by in each layer. A layer that no query frame leans on needs no turns.",
    ),
    "dense_steps": FieldDoc(
        "denoising steps",
        f"a whole number from 0 to {MAX_DENSE}, or a share of the steps from 0.0 to 1.0",
        "How many first denoising steps run dense. A share is rounded to the nearest whole number of steps.",
    ),
    "dense_layers": FieldDoc(
        "layers", f"a whole number from 0 to {MAX_DENSE}", "How many first layers run dense in every denoising step."
    ),
    "few_steps": FieldDoc(
        "table",
        f"a table of up_to, a whole number from 1 to {MAX_DENSE}, and of any of "
        'num_steps, warm_start, first_frame, refresh, shared_refresh, first_turns and dense_steps, or "none"',
        "Fields with other values in clips of at most up_to denoising steps.",
    ),
    "evidence": FieldDoc(
        "text",
        'a list of up to 50 lines of up to 500 printable characters, or "none"',
        "What the preset's numbers rest on: model, weights, prompts, units and errors. It changes nothing.",
    ),
    "impl": FieldDoc(
        "choice",
        '"auto", "reference", "torch" or "triton"',
        "Which implementation computes the structured call; auto takes the fastest that can run.",
    ),
}


def few_steps_of(preset: Preset, steps: int) -> dict[str, Any]:
    """The fields that `few_steps` replaces in a clip of so many denoising steps, with their values there."""
    return preset.few_steps.changes() if preset.few_steps and steps <= preset.few_steps.up_to else {}


def at_steps(preset: Preset, steps: int | None) -> Preset:
    """A preset as it is in a clip of so many denoising steps (None: not known), without shares and `few_steps`.

    Raises PresetError where the preset has a share and the number of steps is not known.
    """
    if steps is None:
        if isinstance(preset.dense_steps, float):
            raise PresetError(
                f"preset '{preset.name}' runs a share of the steps dense, and the number of steps is not known: "
                "give `begin_clip` or `begin_step` the total"
            )
        return preset
    changes = few_steps_of(preset, steps)
    dense_steps = changes.get("dense_steps", preset.dense_steps)
    if isinstance(dense_steps, float):
        dense_steps = math.floor(dense_steps * steps + 0.5)
    changes |= {"few_steps": None, "dense_steps": dense_steps}
    if preset.step_refresh:
        changes["refresh"] = sum(preset.step_refresh) / len(preset.step_refresh)
    return preset.model_copy(update=changes)


def format_value(value: object) -> str:
    """A field's value as TOML would write it (and None as "none")."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, FewSteps | dict):
        table = {"up_to": value.up_to, **value.changes()} if isinstance(value, FewSteps) else value
        return "{" + ", ".join(f"{name} = {format_value(entry)}" for name, entry in table.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def shipped_names() -> list[str]:
    """Names of the presets in the package, in the order they are listed."""
    names = {path.stem: path for path in _shipped_dir_files()}
    order = ["paper", "fast", "balanced", "quality", "exact", "dense"]
    return [n for n in order if n in names] + sorted(set(names) - set(order))


def load_preset(name_or_path: str, *, or_auto: bool = False) -> Preset:
    """A shipped preset by name, or a TOML file by path (anything with a slash or ending in .toml).

    Raises PresetError, with the near matches, when there is none; `or_auto`: it names auto, which is valid there.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        return read_preset(user_path(name_or_path, "preset file", PresetError))
    for path in _shipped_dir_files():
        if path.stem == name_or_path:
            return parse_preset(path.read_text(encoding="utf-8"), source=path.name, stem=path.stem)
    names, auto = shipped_names(), ["auto"] if or_auto else []
    said = f"there is no preset {shown(name_or_path)}{near(name_or_path, [*names, *auto])}"
    said = "preset auto is chosen for a clip, which is not what is asked for here" if name_or_path == "auto" else said
    others = " or ".join([*auto, "a path to a .toml file"])
    raise PresetError(f"{said}: shipped are {', '.join(names)}, and {others} works too")


def read_preset(path: Path) -> Preset:
    """Read and validate one preset file; PresetError with file, field, what came and what is valid."""
    missing = f"preset file {path} does not exist"
    text = read_text(path, f"preset file {path}", PresetError, missing=missing, limit=MAX_FILE_BYTES)
    return parse_preset(text, source=str(path), stem=path.stem)


def parse_preset(text: str, *, source: str, stem: str) -> Preset:
    """Validate TOML text; `source` opens every error sentence, `stem` is the name where the file gives none."""
    try:
        table = parse_toml(text)
    except Malformed as wrong:
        raise PresetError(wrong.about(f"{source}:" if wrong.line is None else source)) from None
    return _validate({"name": stem, **table}, source)


def apply_overrides(preset: Preset, overrides: dict[str, tuple[str, Any]]) -> Preset:
    """A copy with fields replaced; `overrides` maps a field to (the flag it came from, its value).

    A replaced field holds for any number of steps: `few_steps` no longer changes it.
    """
    for name, (flag, value) in overrides.items():
        if name in LABELS:
            raise PresetError(f"{flag}: field '{name}' is a label and cannot be overridden; {_fields_sentence()}")
        preset = _validate({**preset.model_dump(exclude_unset=True), name: value}, flag)
        if preset.few_steps is not None and name in preset.few_steps.changes():
            preset = preset.model_copy(update={"few_steps": preset.few_steps.model_copy(update={name: None})})
    return preset


def parse_assignment(text: str) -> tuple[str, Any]:
    """'band=1' -> ('band', 1): the value is read as TOML, and as plain text where that fails."""
    name, equals, raw = text.partition("=")
    name, raw = name.strip().replace("-", "_"), raw.strip()
    if not equals or not name or not raw:
        raise PresetError(f"--set: {shown(text)} is not of the form field=value; {_fields_sentence()}")
    try:
        table = parse_toml(f"value = {raw}")
        if set(table) == {"value"}:
            return name, table["value"]
        check_value(raw)
    except Malformed as wrong:
        if not wrong.syntax:
            raise PresetError(f"--set: the value of {shown(name)} {wrong.reason}") from None
    return name, {"True": True, "False": False, "None": "none"}.get(raw, raw)


def _validate(table: dict[str, Any], source: str) -> Preset:
    try:
        return Preset.model_validate(table)
    except ValidationError as error:
        raise PresetError(_sentence(error, source, table)) from None


def _sentence(error: ValidationError, source: str, table: dict[str, Any]) -> str:
    """The first problem as one sentence: source, field, what came, what is valid (and how many more there are)."""
    first = error.errors()[0]
    field = str(first["loc"][0])
    doc = FIELD_DOCS.get(field)
    if doc is None:
        sentence = f"{source}: there is no field {shown(field)}{near(field, FIELD_DOCS)}, {_fields_sentence()}"
    else:
        given = first["input"] if len(first["loc"]) == 1 or field not in table else table[field]
        sentence = f"{source}: field '{field}' takes {doc.valid}, got {_as_toml(given)}"
    more = len({entry["loc"][0] for entry in error.errors()}) - 1
    return f"{sentence} (and {more} more problem{'s' if more > 1 else ''})" if more else sentence


def _as_toml(value: object, limit: int = 60) -> str:
    """A value for a sentence, as TOML would write it and cut to `limit` characters."""
    text = format_value(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fields_sentence() -> str:
    return "fields are " + ", ".join(name for name in FIELD_DOCS if name not in LABELS)


def _shipped_dir_files() -> list[Any]:
    """The shipped .toml files: package data, or the folder of the source tree when the package is not installed."""
    try:
        folder: Any = resources.files("vmonarch_presets")
    except ModuleNotFoundError:
        folder = Path(__file__).parent.parent / "presets"
    return sorted((p for p in folder.iterdir() if p.name.endswith(".toml")), key=lambda p: p.name)
