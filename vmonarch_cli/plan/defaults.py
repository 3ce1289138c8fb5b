"""Defaults of the user's own: variables, the project's file and the user's file, each checked as the flags are.

Precedence is flag > line of a prompts file > recipe > variable > project file > user file > preset > model default.
Keys are the flags' names. Every value keeps where it came from, and an error about it names that place.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vmonarch_cli.errors import InputError, VmonarchError
from vmonarch_cli.plan.noise_levels import read_sigmas
from vmonarch_cli.plan.recipes import load_recipe
from vmonarch_cli.plan.request import GenerateRequest, Level, flag_name
from vmonarch_cli.plan.seeds import is_random, read_seed
from vmonarch_cli.presets import Preset
from vmonarch_cli.text import near, shown
from vmonarch_cli.untrusted.files import read_toml
from vmonarch_cli.untrusted.shapes import fault_of

PROJECT_FILE = "vmonarch.toml"
USER_CONFIG, PROJECT_CONFIG = "user config", "project config"
PREFIX = "VMONARCH_"
FILE_VARIABLE = "VMONARCH_CONFIG"
"""Another file in place of the user's; empty: none."""
_OTHER_VARIABLES = {FILE_VARIABLE, "VMONARCH_CACHE", "VMONARCH_COMMIT"}
"""What else begins with the prefix and is no default."""
_NOT_A_DEFAULT = {"prompt", "output", "overwrite", "num_videos", "defaults"}
_NOT_A_DEFAULT |= {"image", "last_image", "video", "strength"}  # of one clip
_OWN_VARIABLES = {"cache": "VMONARCH_STEP_CACHE"}
"""Of fields whose plain name is taken: VMONARCH_CACHE is a folder."""
_MAX_FILE_BYTES = 1 << 20
_TOGETHER = (
    {"size", "height", "width"},
    {"steps", "sigmas"},
    {"flow_shift", "sigmas"},
)
"""Fields of which a later place gives none where an earlier one gives another: they would say the same thing twice."""
_OF_PRESET = ("dense_steps", "dense_layers", "impl")
_HINTS = get_type_hints(GenerateRequest)
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)

KEYS = {flag_name(field.name).replace("-", "_"): field.name for field in fields(GenerateRequest)}
"""Key of a file -> the field of a request that it fills."""
KEYS = {key: name for key, name in KEYS.items() if name not in _NOT_A_DEFAULT}


def user_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the user's defaults are, whether the file is there or not; None where the user wants none."""
    if FILE_VARIABLE in environ:
        return Path(environ[FILE_VARIABLE]).expanduser() if environ[FILE_VARIABLE] else None
    if environ.get("XDG_CONFIG_HOME"):
        folder = Path(environ["XDG_CONFIG_HOME"])
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Application Support"
    else:
        folder = Path.home() / ".config"
    return folder / "vmonarch" / "config.toml"


def read_defaults(environ: Mapping[str, str] = os.environ) -> tuple[Level, ...]:
    """All places that give something, the first of which counts; InputError with the place for what is not valid."""
    levels = [*_variables(environ)]
    for origin, path in ((PROJECT_CONFIG, Path(PROJECT_FILE)), (USER_CONFIG, user_file(environ))):
        if path is not None and os.path.lexists(path):
            table = read_toml(path, str(path), limit=_MAX_FILE_BYTES)
            levels.append(Level(origin, str(path), dict(_entry(key, value, str(path)) for key, value in table.items())))
    return tuple(level for level in levels if level.values)


def _variables(environ: Mapping[str, str]) -> Iterator[Level]:
    """A level for each variable, whose origin is its name."""
    names = {_OWN_VARIABLES.get(name, PREFIX + key.upper()): name for key, name in KEYS.items()}
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in _OTHER_VARIABLES:
            if variable not in names:
                close = near(variable, {name.lower(): name for name in names}, names={n.lower(): n for n in names})
                raise InputError(f"variable {variable} is no setting of vmonarch{close}")
            text = environ[variable]
            if text:
                name = names[variable]
                yield Level(variable, variable, {name: _value(name, _from_text(name, text), variable, "")})


def _from_text(name: str, text: str) -> Any:
    """What a variable says, before it is checked: numbers and switches are texts there, and ; parts a list."""
    kinds = str(_HINTS[name])
    if "tuple[str" in kinds:
        return [part.strip() for part in text.split(";") if part.strip()]
    if "bool" in kinds and text.strip().lower() in ("0", "1", "true", "false", "yes", "no", "on", "off"):
        return text.strip().lower() in ("1", "true", "yes", "on")
    if "int" in kinds and re.fullmatch(r"[-+]?\d{1,19}", text.strip()):
        return int(text)
    if "float" in kinds and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text.strip()):
        return float(text)
    return text


def _entry(key: str, value: Any, source: str) -> tuple[str, Any]:
    """(field, checked value) of a line of a file."""
    name = KEYS.get(key.replace("-", "_"))
    if name is None:
        close = near(key.replace("-", "_"), KEYS, cutoff=0.7)
        raise InputError(f"{source}: there is no setting {shown(key)}{close}: valid are {', '.join(KEYS)}")
    return name, _value(name, value, source, key)


def _value(name: str, value: Any, source: str, key: str) -> Any:
    """A value as the request takes it."""
    if name == "seed" and is_random(value):
        value = read_seed(value)
    subject = f"{source}: {key}" if key else source
    try:
        if name == "sigmas" and isinstance(value, str):
            value = read_sigmas(value)
        if isinstance(value, list):
            value = tuple(float(part) if name == "sigmas" and type(part) is int else part for part in value)
        return TypeAdapter(_HINTS[name], config=_STRICT).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{subject} {fault_of(error).partition(' ')[2]}") from None
    except InputError as error:
        raise InputError(f"{source}: {error.message.removeprefix('--')}") from None


@dataclass(frozen=True)
class Filled:
    """A request with the user's own defaults in place of what no flag gave."""

    request: GenerateRequest
    levels: dict[str, Level]
    """Field -> the place that gave it."""

    def origins(self) -> dict[str, str]:
        """Setting -> origin, of what the defaults gave."""
        found: dict[str, str] = {}
        for name, level in self.levels.items():
            for setting in self._settings(name):
                found[setting] = level.origin
        return found

    def _settings(self, name: str) -> tuple[str, ...]:
        if name == "size":
            return ("height", "width")
        if name == "overrides":
            return tuple(f"preset.{_assigned(text)}" for text in self.request.overrides)
        return (f"preset.{name}",) if name in _OF_PRESET else (name,)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A block in which a sentence about a flag that nobody gave names the place that gave it."""
        try:
            yield
        except VmonarchError as error:
            sentence = error.message
            for name, level in self.levels.items():
                flag = rf"--(?:no-)?{re.escape(flag_name(name))}\b(?!-)"
                if re.search(flag, sentence):
                    key = level.source if level.source.startswith(PREFIX) else flag_name(name)
                    place = f"{level.source}: "
                    place = "" if level.source.startswith(PREFIX) or sentence.startswith(place) else place
                    sentence = f"{place}{re.sub(flag, key, sentence)}"
            if sentence != error.message:
                raise type(error)(sentence, error.exit_code) from None
            raise


def fill(request: GenerateRequest) -> Filled:
    """The request with what its defaults give and it does not."""
    taken: dict[str, Level] = {}
    values: dict[str, Any] = {}
    if not request.defaults:
        return Filled(request, {})
    given = request.given()
    given |= {_assigned(text) for text in request.overrides}
    giver = next((level for level in request.defaults if "recipe" in level.values), None)
    recipe = request.recipe or (None if giver is None else giver.values["recipe"])
    if recipe is not None:
        try:
            of_recipe = set(load_recipe(recipe).settings())
        except VmonarchError as error:
            place = "" if giver is None or request.recipe else f"{giver.source}: "
            raise type(error)(f"{place}{error.message}", error.exit_code) from None
        given |= of_recipe | ({"steps", "sigmas", "flow_shift"} if of_recipe & {"steps", "sigmas"} else set())
    for level in request.defaults:
        said = set(given)
        for name, value in level.values.items():
            if name in said or any(name in group and group & said for group in _TOGETHER):
                continue
            if name == "overrides":
                value = tuple(text for text in value if _assigned(text) not in said)
                given |= {_assigned(text) for text in value}
            values[name], taken[name] = value, level
            given.add(name)
    return Filled(replace(request, **values), taken)


def default_of(request: GenerateRequest, name: str) -> Any:
    """A field of the request, or what its defaults give for it."""
    return getattr(fill(request).request, name)


def without(levels: tuple[Level, ...], names: set[str]) -> tuple[Level, ...]:
    """The defaults without some fields."""
    return tuple(
        replace(level, values={name: value for name, value in level.values.items() if name not in names})
        for level in levels
    )


def _assigned(text: str) -> str:
    name = text.partition("=")[0].strip().replace("-", "_")
    return name if name in Preset.model_fields else text
