"""Presets: small TOML files that say how self-attention is computed, validated into a frozen `Preset`.

Every field carries its unit, its range and one sentence (`FIELD_DOCS`), which `vmonarch presets show` prints and every
error message quotes, so that what is documented is what is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vmonarch_cli.errors import PresetError
from vmonarch_cli.text import near, shown
from vmonarch_cli.untrusted.files import read_text, user_path
from vmonarch_cli.untrusted.values import Malformed, check_value, parse_toml
from vmonarch_kernels.cost import band_with_refresh, is_exact
from vmonarch_kernels.spec import Options

DEFAULT_PRESET = "balanced"
"""Of a model that was not tuned with Monarch attention: README, Measured, says what this rests on."""
MAX_BAND_FRAMES = 4096
MAX_DENSE = 1000
MAX_FILE_BYTES = 1 << 20


class Preset(BaseModel):
    """How the self-attention of a run is computed (frozen; unknown fields are refused; units in `FIELD_DOCS`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=60)
    description: str = Field(default="", max_length=500)
    attention: Literal["monarch", "dense"] = "monarch"
    num_steps: int = Field(default=2, ge=1, le=8)
    warm_start: bool = False
    c_floor: float = Field(default=0.1, gt=0.0, le=1.0)
    first_frame: bool = True
    band: int | None = Field(default=None, ge=0, le=MAX_BAND_FRAMES)
    refresh: float = Field(default=0, ge=0, le=MAX_BAND_FRAMES)
    shared_refresh: bool = False
    dense_steps: int = Field(default=0, ge=0, le=MAX_DENSE)
    dense_layers: int = Field(default=0, ge=0, le=MAX_DENSE)
    impl: Literal["auto", "reference", "torch", "triton"] = "auto"

    @field_validator("name", "description")
    @classmethod
    def _label(cls, value: str) -> str:
        """Labels stand in tables, pages and records: one line, without control characters."""
        if not value.isprintable():
            raise ValueError("not one printable line")
        return value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        """Brackets in a name read as markup, or as a choice, in every list of names."""
        if set("[]") & set(value):
            raise ValueError("brackets")
        return value

    @field_validator("band", mode="before")
    @classmethod
    def _band_none(cls, value: object) -> object:
        """TOML has no null: the string "none" stands for "no exact band"."""
        return None if value == "none" else value


@dataclass(frozen=True)
class CallOptions:
    """What one structured call computes; ``options_for`` makes it from a preset."""

    kernel: Options
    """For the kernels. With ``refresh`` the band covers every frame where every frame would be recomputed anyway."""
    exact: bool
    """The band covers every frame: the call is dense attention, has no L and keeps nothing."""
    warm: bool
    """The call starts from the L of an earlier one."""
    keeps_l: bool
    refresh: float
    shared_refresh: bool

    def cost(self) -> dict[str, Any]:
        """Keyword arguments of ``monarch_flops`` and ``monarch_bytes``."""
        return {"options": self.kernel, "warm": self.warm, "refresh": self.refresh}


def options_for(preset: Preset, frames: int, *, warm: bool = False) -> CallOptions:
    """What a structured call of ``frames`` latent frames computes under a preset.

    ``warm``: the L of an earlier call is at hand. The session, the profile and the cost count all ask here, so that
    what is measured and counted is what runs.
    """
    band = band_with_refresh(frames, preset.band, preset.refresh, first_frame=preset.first_frame)
    exact = is_exact(frames, band)
    keeps_l = preset.warm_start and not exact
    warm = warm and keeps_l
    return CallOptions(
        kernel=Options(1 if warm else preset.num_steps, preset.c_floor, preset.first_frame, band),
        exact=exact,
        warm=warm,
        keeps_l=keeps_l,
        refresh=0 if exact else preset.refresh,
        shared_refresh=preset.shared_refresh,
    )


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
    "dense_steps": FieldDoc(
        "denoising steps", f"a whole number from 0 to {MAX_DENSE}", "How many first denoising steps run dense."
    ),
    "dense_layers": FieldDoc(
        "layers", f"a whole number from 0 to {MAX_DENSE}", "How many first layers run dense in every denoising step."
    ),
    "impl": FieldDoc(
        "choice",
        '"auto", "reference", "torch" or "triton"',
        "Which implementation computes the structured call; auto takes the fastest that can run.",
    ),
}


def format_value(value: object) -> str:
    """A field's value as TOML would write it (and None as "none")."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def shipped_names() -> list[str]:
    """Names of the presets in the package, in the order they are listed."""
    names = {path.stem: path for path in _shipped_dir_files()}
    order = ["paper", "fast", "balanced", "quality", "exact", "dense"]
    return [n for n in order if n in names] + sorted(set(names) - set(order))


def load_preset(name_or_path: str) -> Preset:
    """A shipped preset by name, or a TOML file by path (anything with a slash or ending in .toml).

    Raises PresetError, with the near matches, when there is none.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        return read_preset(user_path(name_or_path, "preset file", PresetError))
    for path in _shipped_dir_files():
        if path.stem == name_or_path:
            return parse_preset(path.read_text(encoding="utf-8"), source=path.name, stem=path.stem)
    names = shipped_names()
    raise PresetError(
        f"there is no preset {shown(name_or_path)}{near(name_or_path, names)}: "
        f"shipped are {', '.join(names)}, and a path to a .toml file works too"
    )


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
    """A copy with fields replaced; `overrides` maps a field to (the flag it came from, its value)."""
    for name, (flag, value) in overrides.items():
        if name in ("name", "description"):
            raise PresetError(f"{flag}: field '{name}' is a label and cannot be overridden; {_fields_sentence()}")
        preset = _validate({**preset.model_dump(exclude_unset=True), name: value}, flag)
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
        raise PresetError(_sentence(error, source)) from None


def _sentence(error: ValidationError, source: str) -> str:
    """The first problem as one sentence: source, field, what came, what is valid (and how many more there are)."""
    first = error.errors()[0]
    field = str(first["loc"][0])
    doc = FIELD_DOCS.get(field)
    if doc is None:
        sentence = f"{source}: there is no field {shown(field)}{near(field, FIELD_DOCS)}, {_fields_sentence()}"
    else:
        sentence = f"{source}: field '{field}' takes {doc.valid}, got {_as_toml(first['input'])}"
    more = error.error_count() - 1
    return f"{sentence} (and {more} more problem{'s' if more > 1 else ''})" if more else sentence


def _as_toml(value: object, limit: int = 60) -> str:
    """A value for a sentence, as TOML would write it and cut to `limit` characters."""
    text = format_value(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fields_sentence() -> str:
    return "fields are " + ", ".join(name for name in FIELD_DOCS if name not in ("name", "description"))


def _shipped_dir_files() -> list[Any]:
    """The shipped .toml files: package data, or the folder of the source tree when the package is not installed."""
    try:
        folder: Any = resources.files("vmonarch_presets")
    except ModuleNotFoundError:
        folder = Path(__file__).parent.parent / "presets"
    return sorted((p for p in folder.iterdir() if p.name.endswith(".toml")), key=lambda p: p.name)
