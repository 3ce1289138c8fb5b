"""Recipes: small TOML files with sampler, steps, shift, guidance, LoRA and preset of a distilled setup. No torch."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.plan.noise_levels import check_sampler, check_sigmas
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.text import near, one_line, shown, with_article
from vmonarch_cli.untrusted.files import read_text, user_path
from vmonarch_cli.untrusted.shapes import fault_of
from vmonarch_cli.untrusted.values import Malformed, parse_toml

MAX_FILE_BYTES = 1 << 20
SETTINGS = ("sampler", "steps", "sigmas", "flow_shift", "guidance_scale", "guidance_scale_2", "loras", "preset")
"""The fields of a request that a recipe may give; a flag beats each of them."""

_Line = Annotated[str, AfterValidator(one_line)]


class Recipe(BaseModel):
    """Settings for one kind of distilled model (frozen; unknown fields are refused); None or empty is not given."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: _Line = Field(min_length=1, max_length=60)
    description: _Line = Field(default="", max_length=500)
    source: tuple[_Line, ...] = ()
    """Where the numbers come from."""
    family: str
    pipelines: tuple[str, ...] = ()
    """Pipeline classes that it is for; empty for all of its family."""
    transformers: int | None = Field(default=None, ge=1, le=2)
    sampler: str | None = None
    steps: int | None = Field(default=None, ge=1, le=1000)
    sigmas: tuple[float, ...] = ()
    flow_shift: float | None = Field(default=None, ge=0.01, le=100)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    guidance_scale_2: float | None = Field(default=None, ge=0, le=100)
    loras: tuple[str, ...] = ()
    preset: str | None = None

    @field_validator("family")
    @classmethod
    def _family(cls, value: str) -> str:
        known = sorted({facts.family for facts in PIPELINES.values()})
        if value not in known:
            raise ValueError(f"takes {', '.join(known)}, got {shown(value)}")
        return value

    @field_validator("sampler", "sigmas")
    @classmethod
    def _schedule(cls, value: Any) -> Any:
        try:
            return check_sampler(value) if not isinstance(value, tuple) else check_sigmas(value) if value else value
        except InputError as error:
            raise ValueError(f"cannot be so: {error.message}") from None

    def check_model(self, model: ModelEntry) -> None:
        """InputError for a model of another family, or another pipeline of it."""
        made_for = f"recipe {self.name} is for {self.family}"
        if model.family != self.family:
            raise InputError(f"{made_for}, and {model.alias} is of the family {model.family}")
        if model.alias == DEMO.alias:
            raise InputError(f"{made_for}, and the demo model was trained for itself: name a model with --model")
        if self.pipelines and model.pipeline not in self.pipelines:
            raise InputError(
                f"{made_for} in a {' or '.join(self.pipelines)}, and {model.alias} is {with_article(model.pipeline)}"
            )
        if self.transformers is not None and model.transformers != self.transformers:
            raise InputError(
                f"{made_for} models with {self.transformers} transformer{'s' if self.transformers > 1 else ''}, and "
                f"{model.alias} has {model.transformers}"
            )

    def settings(self) -> dict[str, Any]:
        """What it gives, by the fields of a request."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if value not in (None, ())}


def with_recipe(request: GenerateRequest, recipe: Recipe) -> tuple[GenerateRequest, set[str]]:
    """The request with what the recipe gives and no flag does; (it, the fields that the recipe gave).

    A flag about the noise levels (steps, shift or the levels) takes the place of the recipe's that do not go with it.
    """
    given = recipe.settings()
    flags = {name for name in given if getattr(request, name) not in (None, ())}
    if request.sigmas:
        flags |= {"steps", "flow_shift"}
    if request.flow_shift is not None or (request.steps is not None and request.steps != len(recipe.sigmas)):
        flags.add("sigmas")
    taken = {name: value for name, value in given.items() if name not in flags}
    return replace(request, **taken), set(taken)


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name, or a TOML file by path (anything with a slash or ending in .toml); InputError."""
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        path = user_path(name_or_path, "recipe file")
        missing = f"recipe file {path} does not exist"
        text = read_text(path, f"recipe file {path}", missing=missing, limit=MAX_FILE_BYTES)
        return parse_recipe(text, source=str(path), stem=path.stem)
    for found in _shipped_files():
        if found.name == f"{name_or_path}.toml":
            return parse_recipe(found.read_text(encoding="utf-8"), source=found.name, stem=name_or_path)
    names = shipped_recipes()
    raise InputError(
        f"there is no recipe {shown(name_or_path)}{near(name_or_path, names)}: `vmonarch recipes` lists them, and a "
        "path to a .toml file works too"
    )


def parse_recipe(text: str, *, source: str, stem: str) -> Recipe:
    """Validate TOML text; `source` opens every error sentence, `stem` is the name where the file gives none."""
    try:
        return Recipe.model_validate({"name": stem, **parse_toml(text)})
    except Malformed as wrong:
        raise InputError(wrong.about(f"{source}:" if wrong.line is None else source)) from None
    except ValidationError as error:
        raise InputError(f"{source} is not a recipe: {fault_of(error)}") from None


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return [path.name.removesuffix(".toml") for path in _shipped_files()]


def _shipped_files() -> list[Any]:
    """The shipped files: package data, or the folder of the source tree when the package is not installed."""
    try:
        folder: Any = resources.files("vmonarch_presets")
    except ModuleNotFoundError:
        folder = Path(__file__).parents[2] / "presets"
    files = (path for path in folder.joinpath("recipes").iterdir() if path.name.endswith(".toml"))
    return sorted(files, key=lambda path: str(path.name))
