"""How flags are declared: grouped in the help, and read so that a wrong value is named in one sentence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypedDict, get_type_hints

import typer

from vmonarch_cli.errors import InputError
from vmonarch_cli.plan.request import GenerateRequest
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


def number_option(*names: str, panel: str, help: str) -> Any:
    """A flag that takes a number."""

    def parse(text: str | float) -> float:
        try:
            return float(text)
        except ValueError:
            raise InputError(f"{names[0]} takes a number, got {shown(text)}") from None

    return option(*names, panel=panel, help=help, parser=parse, metavar="<float>")


class RequestFlags(TypedDict, total=False):
    """Every flag that describes a clip, named as the field of `GenerateRequest` that it fills."""

    prompt: Annotated[str | None, option("--prompt", "-p", panel=MODEL, help="What the clip should show.")]
    negative_prompt: Annotated[
        str | None, option("--negative-prompt", panel=MODEL, help="What it should not show. Default: the model's own.")
    ]
    model: Annotated[
        str | None,
        option("--model", "-m", panel=MODEL, help="Alias, hub id or local diffusers folder. Default: the demo model."),
    ]
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
    seed: Annotated[int | None, whole_option("--seed", panel=SAMPLING, help="Seed of the first clip. Default: 0.")]
    num_videos: Annotated[
        int | None, whole_option("--num-videos", panel=SAMPLING, help="Clips to make, of seeds seed, seed + 1, ...")
    ]
    preset: Annotated[
        str | None, option("--preset", panel=ATTENTION, help="Name or .toml file; `vmonarch presets` lists them.")
    ]
    overrides: Annotated[
        list[str] | None,
        option("--set", panel=ATTENTION, metavar="FIELD=VALUE", help="Change a preset field (repeatable)."),
    ]
    dense_steps: Annotated[
        int | None, whole_option("--dense-steps", panel=ATTENTION, help="First denoising steps to run dense.")
    ]
    dense_layers: Annotated[
        int | None, whole_option("--dense-layers", panel=ATTENTION, help="First layers to run dense.")
    ]
    impl: Annotated[
        str | None, option("--impl", panel=ATTENTION, help="auto, reference, torch or triton; never falls back.")
    ]
    dense_every: Annotated[
        int | None,
        whole_option("--dense-every", panel=ATTENTION, help="Time dense attention too on every n-th step; 0 is never."),
    ]
    device: Annotated[str | None, option("--device", panel=OUTPUT, help="auto, cpu, cuda or cuda:N.")]
    dtype: Annotated[str | None, option("--dtype", panel=OUTPUT, help="auto, float32, bfloat16 or float16.")]
    output: Annotated[
        str | None,
        option("--output", "-o", panel=OUTPUT, help="File (.mp4, .gif, .png for a folder of frames) or folder."),
    ]
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace files that exist.")]
    revision: Annotated[
        str | None, option("--revision", panel=MODEL, help="Branch, tag or commit of a hub repository.")
    ]
    image: Annotated[str | None, option("--image", panel=MODEL, help="First frame, for models that continue one.")]
    offload: Annotated[
        str | None,
        option("--offload", panel=MEMORY, help="auto, none, model, group or sequential: what waits off the GPU."),
    ]
    vae_tiling: Annotated[bool, option("--vae-tiling", panel=MEMORY, help="Decode in tiles: less memory, slower.")]
    quantize: Annotated[str | None, option("--quantize", panel=MEMORY, help="fp8 or int8 weights for the transformer.")]
    loras: Annotated[
        list[str] | None,
        option("--lora", panel=SPEED, metavar="PATH[:SCALE]", help="Add a LoRA: file, folder or hub id (repeatable)."),
    ]
    cache: Annotated[
        str | None, option("--cache", panel=SPEED, help="first-block, pab or taylorseer: skip work between steps.")
    ]
    compile: Annotated[bool, option("--compile", panel=SPEED, help="Compile the transformer's blocks.")]


AsJson = Annotated[bool, option("--json", panel=OUTPUT, help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, option("--quiet", "-q", panel=OUTPUT, help="Print only the paths.")]
Debug = Annotated[bool, option("--debug", panel=OUTPUT, help="Show tracebacks.")]


def takes_request(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command whose first parameter is a GenerateRequest: on the command line that one becomes all the
    flags of `RequestFlags` (except `without`), and its other parameters follow.
    """
    flags = get_type_hints(RequestFlags, include_extras=True)
    kept = [name for name in flags if name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {name: given.pop(name) for name in kept}
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            command(GenerateRequest(**{name: value for name, value in values.items() if value is not None}), **given)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        named = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(
                name, named, default=False if flags[name].__origin__ is bool else None, annotation=flags[name]
            )
            for name in kept
        ]
        parameters = [*shared, *(parameter.replace(kind=named) for parameter in own)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
