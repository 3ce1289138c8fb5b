"""Flags that several of the profiles share, in the groups that their commands take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vmonarch_cli.cli.completion import preset_names
from vmonarch_cli.cli.options import (
    ATTENTION,
    OUTPUT,
    SAMPLING,
    SHAPE,
    Model,
    number_option,
    option,
    whole_option,
)

Presets = Annotated[
    list[str] | None,
    option(
        "--preset",
        panel=ATTENTION,
        autocompletion=preset_names,
        help="Name or .toml file of a preset to measure (repeatable).",
    ),
]
Size = Annotated[str | None, option("--size", panel=SHAPE, help="WIDTHxHEIGHT in pixels, as in 832x480.")]
Height = Annotated[int | None, whole_option("--height", panel=SHAPE, help="Height in pixels.")]
Width = Annotated[int | None, whole_option("--width", panel=SHAPE, help="Width in pixels.")]
NumFrames = Annotated[int | None, whole_option("--num-frames", panel=SHAPE, help="Frames of the clip.")]
Guidance = Annotated[
    float | None, number_option("--guidance-scale", panel=SAMPLING, help="1 is off: one forward per step.")
]
FlowShift = Annotated[float | None, number_option("--flow-shift", panel=SAMPLING, help="Timestep shift.")]
TunedFiles = Annotated[
    list[str] | None,
    option(
        "--tuned",
        panel=ATTENTION,
        metavar="FILE",
        help="Adapter to add a row for, or none (repeatable). Default: those that the model brings for the presets.",
    ),
]
Seed = Annotated[int | None, whole_option("--seed", panel=SAMPLING, help="Seed of all random numbers. Default: 0.")]
DeviceName = Annotated[str | None, option("--device", panel=OUTPUT, help="auto, cpu, cuda or cuda:N.")]
DtypeName = Annotated[str | None, option("--dtype", panel=OUTPUT, help="auto, float32, bfloat16 or float16.")]
Seconds = Annotated[
    float | None,
    number_option(
        "--seconds", panel=OUTPUT, help="Wall-clock budget; what does not fit is left out and named in the record."
    ),
]
Json = Annotated[
    str | None, option("--json", panel=OUTPUT, metavar="FILE|-", help="Write a record; - prints it and nothing else.")
]
Plot = Annotated[str | None, option("--plot", panel=OUTPUT, metavar="FILE", help="Draw a plot, .png or .svg.")]
Overwrite = Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace a record or plot that exists.")]


@dataclass(frozen=True)
class ShapeFlags:
    """Which model, and what clip of it."""

    model: Model = None
    size: Size = None
    height: Height = None
    width: Width = None
    num_frames: NumFrames = None


@dataclass(frozen=True)
class RunFlags:
    """Where a profile runs, for how long, and what becomes of its figures."""

    seed: Seed = None
    device: DeviceName = None
    dtype: DtypeName = None
    seconds: Seconds = None
    as_json: Json = None
    plot: Plot = None
    overwrite: Overwrite = False
