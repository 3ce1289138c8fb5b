"""How flags are declared: grouped in the help, and read so that a wrong value is named in one sentence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, TypedDict, get_type_hints

import typer

from vmonarch_cli.cli.completion import model_names, preset_names, recipe_names
from vmonarch_cli.cli.output import Output
from vmonarch_cli.errors import InputError
from vmonarch_cli.plan.defaults import read_defaults
from vmonarch_cli.plan.noise_levels import SAMPLERS, read_sigmas
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.seeds import read_seed
from vmonarch_cli.text import shown

MODEL, SHAPE, SAMPLING, ATTENTION, OUTPUT = "Model and prompt", "Shape", "Sampling", "Attention", "Machine and output"
MEMORY, SPEED = "Memory", "Beside the attention"


def option(*names: str, panel: str, help: str, **extra: Any) -> Any:
    """A flag in a panel of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **extra)


def whole_option(*names: str, panel: str, help: str) -> Any:
    """A flag that takes a whole number; typer's own sentence would not say what came."""

    def parse(text: str | int) -> int:
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{names[0]} takes a whole number, got {shown(text)}") from None

    return option(*names, panel=panel, help=help, parser=parse, metavar="<int>")


def share_option(*names: str, panel: str, help: str) -> Any:
    """A flag that takes a count, which is a whole number, or a share, which has a point."""

    def parse(text: str | float) -> int | float:
        try:
            return int(text) if isinstance(text, str) and text.strip().lstrip("+-").isdecimal() else float(text)
        except ValueError:
            valid = "a whole number, or a share from 0.0 to 1.0"
            raise InputError(f"{names[0]} takes {valid}, got {shown(text)}") from None

    return option(*names, panel=panel, help=help, parser=parse, metavar="<int|share>")


def number_option(*names: str, panel: str, help: str) -> Any:
    """A flag that takes a number."""

    def parse(text: str | float) -> float:
        try:
            return float(text)
        except ValueError:
            raise InputError(f"{names[0]} takes a number, got {shown(text)}") from None

    return option(*names, panel=panel, help=help, parser=parse, metavar="<float>")


Model = Annotated[
    str | None,
    option(
        "--model",
        "-m",
        panel=MODEL,
        autocompletion=model_names,
        help="Alias, hub id or local diffusers folder. Default: the demo model.",
    ),
]


class RequestFlags(TypedDict, total=False):
    """Every flag that describes a clip, named as the field of `GenerateRequest` that it fills."""

    prompt: Annotated[str | None, option("--prompt", "-p", panel=MODEL, help="What the clip should show.")]
    negative_prompt: Annotated[
        str | None, option("--negative-prompt", panel=MODEL, help="What it should not show. Default: the model's own.")
    ]
    model: Model
    size: Annotated[str | None, option("--size", panel=SHAPE, help="WIDTHxHEIGHT in pixels, as in 832x480.")]
    height: Annotated[int | None, whole_option("--height", panel=SHAPE, help="Height in pixels.")]
    width: Annotated[int | None, whole_option("--width", panel=SHAPE, help="Width in pixels.")]
    num_frames: Annotated[int | None, whole_option("--num-frames", panel=SHAPE, help="Frames of the clip.")]
    fps: Annotated[int | None, whole_option("--fps", panel=SHAPE, help="Frames per second of the file.")]
    steps: Annotated[
        int | None, whole_option("--steps", "--num-inference-steps", panel=SAMPLING, help="Denoising steps.")
    ]
    guidance_scale: Annotated[
        float | None,
        number_option("--guidance-scale", panel=SAMPLING, help="How strongly the prompt steers; 1 is off."),
    ]
    guidance_scale_2: Annotated[
        float | None, number_option("--guidance-scale-2", panel=SAMPLING, help="The same for the second transformer.")
    ]
    flow_shift: Annotated[
        float | None,
        number_option("--flow-shift", panel=SAMPLING, help="Timestep shift; higher spends steps on noise."),
    ]
    recipe: Annotated[
        str | None,
        option(
            "--recipe",
            panel=SAMPLING,
            autocompletion=recipe_names,
            help="Settings for a distilled model: name or .toml file; `vmonarch recipes` lists them. Flags beat it.",
        ),
    ]
    sampler: Annotated[
        str | None,
        option(
            "--sampler",
            panel=SAMPLING,
            help=f"{', '.join(SAMPLERS)}. Default: own, the model's; its long clips may have another.",
        ),
    ]
    sigmas: Annotated[
        Any,
        option(
            "--sigmas",
            panel=SAMPLING,
            metavar="S,S,...",
            parser=read_sigmas,
            help="Noise level at which each step begins, falling from 1, as in 1,0.94,0.83,0.62.",
        ),
    ]
    seed: Annotated[
        int | None,
        option(
            "--seed",
            panel=SAMPLING,
            parser=read_seed,
            metavar="<int>",
            help="Seed of the first clip; random (or -1) draws one. Default: 0.",
        ),
    ]
    num_videos: Annotated[
        int | None, whole_option("--num-videos", panel=SAMPLING, help="Clips to make, of seeds seed, seed + 1, ...")
    ]
    preset: Annotated[
        str | None,
        option(
            "--preset",
            panel=ATTENTION,
            autocompletion=preset_names,
            help="Name, .toml file, or auto: by tokens, steps and card. `vmonarch presets` lists them.",
        ),
    ]
    overrides: Annotated[
        list[str] | None,
        option("--set", panel=ATTENTION, metavar="FIELD=VALUE", help="Change a preset field (repeatable)."),
    ]
    dense_steps: Annotated[
        float | None,
        share_option("--dense-steps", panel=ATTENTION, help="First steps to run dense: a count, or a share as 0.2."),
    ]
    dense_layers: Annotated[
        int | None, whole_option("--dense-layers", panel=ATTENTION, help="First layers to run dense.")
    ]
    impl: Annotated[
        str | None, option("--impl", panel=ATTENTION, help="auto, reference, torch or triton; never falls back.")
    ]
    dense_attention: Annotated[
        str | None,
        option(
            "--dense-attention",
            panel=ATTENTION,
            help="What runs dense calls: auto, sdpa, cudnn, flash, efficient, math, fa4, fa3, fa2 or sage (quantised).",
        ),
    ]
    dense_every: Annotated[
        int | None,
        whole_option("--dense-every", panel=ATTENTION, help="Time dense attention too on every n-th step; 0 is never."),
    ]
    device: Annotated[str | None, option("--device", panel=OUTPUT, help="auto, cpu, cuda or cuda:N.")]
    dtype: Annotated[str | None, option("--dtype", panel=OUTPUT, help="auto, float32, bfloat16 or float16.")]
    output: Annotated[
        str | None,
        option(
            "--output",
            "-o",
            panel=OUTPUT,
            help="File (.mp4, .webm, .gif, .webp, .png for a folder of frames) or folder.",
        ),
    ]
    quality: Annotated[
        int | None,
        whole_option("--quality", panel=OUTPUT, help="Of the clip's file: 1 (small) to 10 (large). Default: 8."),
    ]
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace files that exist.")]
    revision: Annotated[
        str | None, option("--revision", panel=MODEL, help="Branch, tag or commit of a hub repository.")
    ]
    transformer: Annotated[
        str | None,
        option("--transformer", panel=MODEL, metavar="FILE", help="Its transformer's weights: .safetensors or .gguf."),
    ]
    transformer_2: Annotated[
        str | None,
        option("--transformer-2", panel=MODEL, metavar="FILE", help="The same for the second transformer."),
    ]
    image: Annotated[str | None, option("--image", panel=MODEL, help="First frame, for models that continue one.")]
    last_image: Annotated[str | None, option("--last-image", panel=MODEL, help="Last frame, for models that take one.")]
    video: Annotated[
        str | None,
        option("--video", panel=MODEL, metavar="FILE", help="Video to make the clip from, for models that take one."),
    ]
    strength: Annotated[
        float | None,
        option("--strength", panel=MODEL, help="How far --video is noised, up to 1 (default 0.8): all steps run."),
    ]
    audio: Annotated[
        bool | None,
        option("--audio/--no-audio", panel=OUTPUT, help="Sound, of models that make it: the default, and none."),
    ]
    offload: Annotated[
        str | None,
        option("--offload", panel=MEMORY, help="auto, none, model, group or sequential: what waits off the GPU."),
    ]
    vae_tiling: Annotated[bool, option("--vae-tiling", panel=MEMORY, help="Decode in tiles: less memory, slower.")]
    vae_dtype: Annotated[
        str | None,
        option("--vae-dtype", panel=MEMORY, help="The VAE decodes in auto (default), float32, bfloat16 or float16."),
    ]
    quantize: Annotated[
        str | None,
        option("--quantize", panel=MEMORY, help="fp8 or int8: compute in 8 bits; fp8-storage or int8-storage: store."),
    ]
    loras: Annotated[
        list[str] | None,
        option(
            "--lora",
            panel=SPEED,
            metavar="[high:|low:]PATH[:SCALE]",
            help="Add a LoRA: file, folder, hub id or owner/name/file; high: or low: for one of two transformers "
            "(repeatable).",
        ),
    ]
    tuned: Annotated[
        str | None,
        option("--tuned", panel=ATTENTION, metavar="FILE", help="Adapter that was tuned for the preset, or none."),
    ]
    cache: Annotated[
        str | None, option("--cache", panel=SPEED, help="first-block, pab or taylorseer: skip work between steps.")
    ]
    compile: Annotated[bool, option("--compile", panel=SPEED, help="Compile the transformer's blocks.")]
    fuse: Annotated[
        bool | None,
        option("--fuse/--no-fuse", panel=SPEED, help="Fused kernels within blocks. Default: on a GPU, of long clips."),
    ]
    graphs: Annotated[
        bool | None,
        option("--graphs/--no-graphs", panel=SPEED, help="Replay small structured calls as CUDA graphs. Default: off."),
    ]
    dense_below: Annotated[
        int | None,
        whole_option("--dense-below", panel=SPEED, help="Tokens below which calls run dense. Default: by the GPU."),
    ]


AsJson = Annotated[bool, option("--json", panel=OUTPUT, help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, option("--quiet", "-q", panel=OUTPUT, help="Print only the paths.")]
Debug = Annotated[bool, option("--debug", panel=OUTPUT, help="Show tracebacks.")]


def configured(request: GenerateRequest) -> GenerateRequest:
    """The request with the user's own defaults, of variables and files, for what no flag gives."""
    return replace(request, defaults=read_defaults())


@dataclass(frozen=True)
class Shown:
    """The flags that say how much is printed."""

    as_json: AsJson = False
    quiet: Quiet = False

    def output(self, main: bool = True) -> Output:
        """Where a command with these flags prints."""
        return Output(as_json=self.as_json, quiet=self.quiet, main=main)


def takes_request(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that takes its flags in groups: on the command line each field of a group is a flag.

    A group is a parameter of type GenerateRequest, which becomes the flags of `RequestFlags` (except `without`), or of
    a dataclass whose fields are annotated as flags. Other parameters stay as they are, in their place.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        groups = {name: found for name, p in own.items() if (found := _flags_of(p.annotation, without))}
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.items():
            named = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += groups.get(name, [named])

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for name, flags in groups.items():
                values = {flag.name: given.pop(flag.name) for flag in flags}
                values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
                # What was not given is left to the group's own default.
                given[name] = own[name].annotation(**{key: v for key, v in values.items() if v is not None})
            command(**given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flags_of(group: Any, without: Sequence[str]) -> list[inspect.Parameter]:
    """The flags of a group as parameters of a command; none of a type that is no group."""
    named = inspect.Parameter.KEYWORD_ONLY
    defaults: dict[str, Any]
    if group is GenerateRequest:
        flags = get_type_hints(RequestFlags, include_extras=True)
        defaults = {name: False if annotation.__origin__ is bool else None for name, annotation in flags.items()}
    elif is_dataclass(group):
        flags = get_type_hints(group, include_extras=True)
        defaults = {field.name: field.default for field in fields(group)}
    else:
        return []
    return [
        inspect.Parameter(name, named, default=defaults[name], annotation=annotation)
        for name, annotation in flags.items()
        if name not in without
    ]
