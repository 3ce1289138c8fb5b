"""The flags of a run as they came, before anything is checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

FLAG_NAMES = {"overrides": "set", "loras": "lora"}
"""Flags that are not named as their field."""


def flag_name(field_name: str) -> str:
    """The flag that fills a field, without its dashes: 'num-frames'."""
    return FLAG_NAMES.get(field_name, field_name).replace("_", "-")


@dataclass(frozen=True)
class Level:
    """One place of the user's own defaults, and what it gives."""

    origin: str
    """What settings of it say of themselves: "user config", "project config" or the name of a variable."""
    source: str
    """The file's path, or the variable's name."""
    values: dict[str, Any]
    """By the fields of a request."""


@dataclass(frozen=True)
class GenerateRequest:
    """The flags of `vmonarch generate` as they came; None (or empty) means not given."""

    model: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    size: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    recipe: str | None = None
    sampler: str | None = None
    sigmas: tuple[float, ...] = field(default=())
    seed: int | None = None
    num_videos: int | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = field(default=())
    dense_steps: int | float | None = None
    dense_layers: int | None = None
    impl: str | None = None
    dense_attention: str | None = None
    dense_every: int | None = None
    device: str | None = None
    dtype: str | None = None
    output: str | None = None
    quality: int | None = None
    overwrite: bool = False
    revision: str | None = None
    transformer: str | None = None
    transformer_2: str | None = None
    image: str | None = None
    last_image: str | None = None
    video: str | None = None
    strength: float | None = None
    audio: bool | None = None
    offload: str | None = None
    vae_tiling: bool = False
    vae_dtype: str | None = None
    quantize: str | None = None
    loras: tuple[str, ...] = field(default=())
    cache: str | None = None
    compile: bool = False
    fuse: bool | None = None
    graphs: bool | None = None
    dense_below: int | None = None
    tuned: str | None = None
    defaults: tuple[Level, ...] = field(default=())
    """What counts where no flag does, the first place first; see `plan/defaults.py`."""

    def given(self) -> set[str]:
        """The fields that were given. A seed of 0 is, and so is False where nothing else says no, as of `--no-fuse`."""
        return {each.name for each in fields(self) if _is_given(getattr(self, each.name), each.default)}


def _is_given(value: Any, default: Any) -> bool:
    return type(value) is not type(default) or value != default  # 0 == False
