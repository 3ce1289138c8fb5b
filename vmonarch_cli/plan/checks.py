"""Checks of single flags: each returns the value as the plan uses it, or raises a sentence that says what is valid."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.pictures import load_picture
from vmonarch_cli.models.base import ModelEntry, PipelineFacts
from vmonarch_cli.models.catalogue import ENTRIES, PIPELINES
from vmonarch_cli.models.single_file import GGUF, check_single_file
from vmonarch_cli.plan.request import GenerateRequest, flag_name
from vmonarch_cli.presets import Preset
from vmonarch_cli.text import near, shown, with_article
from vmonarch_cli.untrusted.files import once_a_content, user_path
from vmonarch_kernels.spec import MAX_FRAMES

STRENGTHS = (0.01, 1.0)
"""Least and largest `--strength`."""
_STRENGTH = 0.8
"""Of diffusers' own pipelines."""
EXAMPLE_PROMPT = "a red circle moves from left to right on a blue background"
DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


def texts(request: GenerateRequest) -> None:
    """InputError for a flag whose text no record can hold, because it is not UTF-8, and no path, because it has a NUL.

    The prompt and the negative prompt may hold anything that is UTF-8.
    """
    for field in fields(request):
        value = getattr(request, field.name)
        flag = f"--{flag_name(field.name)}"
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str) or field.name in ("prompt", "output"):  # which have sentences of their own
                continue
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise InputError(f"{flag} is not valid UTF-8 text") from None
            if "\0" in text and field.name != "negative_prompt":
                raise InputError(f"{flag} holds a NUL character")


def prompt(text: str | None) -> str:
    """A prompt with some text in it that can be written as UTF-8; surrounding spaces are dropped."""
    if text is None:
        raise InputError(f'a prompt is missing: say what the clip should show, as in --prompt "{EXAMPLE_PROMPT}"')
    if not text.strip():
        raise InputError(f'the prompt is empty: say what the clip should show, as in --prompt "{EXAMPLE_PROMPT}"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid UTF-8 text") from None
    return text.strip()


def size(text: str | None, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """(height, width) in pixels from `--size WIDTHxHEIGHT` or from the two flags; None where nothing was given."""
    for flag, side in (("--height", height), ("--width", width)):
        whole(flag, side, 1, 16384)
    if text is None:
        return height, width
    sides = [flag for flag, side in (("--height", height), ("--width", width)) if side is not None]
    if sides:
        raise InputError(f"--size and {' and '.join(sides)} say the same thing twice: give --size or the sides")
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX*×]\s*(\d{1,5})\s*", text)
    if match is None:
        raise InputError(f"--size takes WIDTHxHEIGHT in pixels, as in 832x480, got {shown(text)}")
    return int(match[2]), int(match[1])


def whole(flag: str, value: int | None, low: int, high: int) -> int | None:
    """A whole number within [low, high], or None."""
    if value is not None and not low <= value <= high:
        raise InputError(f"{flag} takes a whole number from {low} to {high}, got {shown(value)}")
    return value


def number(flag: str, value: float | None, low: float, high: float) -> float | None:
    """A finite number within [low, high], or None."""
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise InputError(f"{flag} takes a number from {low:g} to {high:g}, got {value:g}")
    return value


def device(text: str | None) -> str | None:
    """'auto', 'cpu', 'cuda' or 'cuda:N' (whether the device is there is found out later, by torch)."""
    if text is not None and not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise InputError(f"--device takes auto, cpu, cuda or cuda:N, got {shown(text)}")
    return text


def dtype(text: str | None, flag: str = "--dtype") -> str | None:
    """A floating-point type under its torch name."""
    if text is None:
        return None
    if text.lower() not in DTYPES:
        valid = "auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16)"
        raise InputError(f"{flag} takes {valid}, got {shown(text)}{near(text, DTYPES)}")
    return DTYPES[text.lower()]


def second_guidance(model: ModelEntry, value: float | None) -> None:
    """Only a model with a second transformer has a second guidance scale."""
    if value is not None and model.transformers < 2:
        raise InputError(f"--guidance-scale-2 is for models with two transformers, and {model.alias} has one")


def steps(model: ModelEntry, value: int) -> None:
    """InputError for fewer denoising steps than a model's schedule can be made of."""
    if value < model.min_steps:
        raise InputError(
            f"--steps {value} does not fit {model.alias}: its noise schedule takes {model.min_steps} at least"
        )


def flow_shift(model: ModelEntry, value: float | None, sigmas: tuple[float, ...] = ()) -> None:
    """InputError for a flow shift of a model whose noise schedule has none, or beside noise levels that are given."""
    if value is not None and sigmas:
        raise InputError("--sigmas and --flow-shift both say what the noise levels are: give one of them")
    if value is not None and not model.has_flow_shift:
        raise InputError(f"--flow-shift cannot be set: the noise schedule of {model.alias} has no shift")


def latent_frames(preset: Preset, model: ModelEntry, frames: int, num_frames: int, *, or_dense: bool = True) -> None:
    """InputError for more latent frames than structured attention takes of this model; `or_dense`: the command takes
    dense attention, too.
    """
    most = MAX_FRAMES // model.clips_attended
    if preset.attention != "dense" and frames > most:
        raise InputError(
            f"{num_frames} frames are {frames} latent frames, and structured attention"
            f"{f' of {model.alias}' if model.clips_attended > 1 else ''} takes {most} at most: "
            f"choose fewer frames{', or --preset dense' if or_dense else ''}"
        )


def one_of(flag: str, value: str | None, valid: tuple[str, ...]) -> str | None:
    """A value out of a few, or None; InputError that names them."""
    if value is not None and value not in valid:
        *first, last = valid
        raise InputError(f"{flag} takes {', '.join(first)} or {last}, got {shown(value)}{near(value, valid)}")
    return value


def audio(model: ModelEntry, facts: PipelineFacts, wanted: bool | None) -> bool | None:
    """Whether clips have sound, None where the model makes none; InputError for a choice there."""
    if wanted is not None and not facts.sound:
        raise InputError(
            f"{model.alias} makes silent clips: leave out {'--audio' if wanted else '--no-audio'}, which is for models "
            "that make sound, as ltx-2 does"
        )
    return wanted is not False if facts.sound else None


def transformer_files(model: ModelEntry, facts: PipelineFacts, request: GenerateRequest) -> dict[str, str]:
    """The single files that take the place of transformers, by component; InputError or ModelError for any that cannot.

    Of the files only the headers are read.
    """
    given = {"transformer": request.transformer, "transformer_2": request.transformer_2}
    found = {}
    for name, text in given.items():
        flag = f"--{name.replace('_', '-')}"
        if text is None:
            continue
        if name == "transformer_2" and model.transformers < 2:
            raise InputError(f"{flag} is for models with two transformers, and {model.alias} has one")
        path = check_single_file(text, flag, model.alias, facts)
        if path.suffix.lower() == GGUF and request.quantize is not None:
            raise InputError(
                f"--quantize {request.quantize}: the weights of {path} are quantised already, leave it out"
            )
        found[name] = str(path)
    if found and request.quantize == "int8-storage":
        raise InputError(
            "--quantize int8-storage reads the weights of a folder alone: with --transformer use --quantize "
            "fp8-storage, or int8, which computes in 8 bits"
        )
    return found


def fps(model: ModelEntry, value: int | None, *, sound: bool) -> int | None:
    """Frames per second within what files take; InputError for a rate that a clip with sound cannot have."""
    whole("--fps", value, 1, 240)
    only = None if model.packed is None else model.packed.fps
    if value is not None and sound and only is not None and value != only:
        raise InputError(
            f"--fps {value} does not fit {model.alias}: it makes {only} frames per second, and no other "
            "rate keeps in step with its sound, which --no-audio leaves out"
        )
    return value


def sound_length(model: ModelEntry, num_frames: int, fps: int) -> None:
    """InputError for a clip that lasts longer than the model's positions of sound reach; the pipeline makes sound with
    every clip.
    """
    if model.longest_sound is not None and num_frames / fps > model.longest_sound:
        raise InputError(
            f"{num_frames} frames at --fps {fps} do not fit {model.alias}: they last {num_frames / fps:.1f} seconds, "
            f"and its positions of sound reach {model.longest_sound:.1f}"
        )


def guidance(model: ModelEntry, value: float | None) -> float | None:
    """A guidance scale; InputError for one above 1 of a model whose weights hold guidance already."""
    if model.distilled and value is not None and value > 1:
        raise InputError(
            f"--guidance-scale {value:g} does not fit {model.alias}: guidance is in its weights, and the valid scale "
            "is 1"
        )
    return number("--guidance-scale", value, 0, 100)


def last_image(model: ModelEntry, facts: PipelineFacts, text: str | None) -> str | None:
    """The path of a last frame; InputError when the model takes none, or it cannot be read."""
    if text is None:
        return None
    if not facts.last_image:
        raise InputError(
            f"{model.alias} takes no last frame: leave out --last-image, which is for models that end on one, as "
            "minimax-h3 does"
        )
    return _picture(text, "last image")


def image(model: ModelEntry, text: str | None, *, needed: bool = True) -> str | None:
    """The path of a first frame; InputError when the model needs one (where one is `needed` at all), cannot take one,
    or it cannot be read.
    """
    if text is None:
        if model.takes_image and needed:
            raise InputError(f"{model.alias} continues a picture and none was given: add --image FILE")
        return None
    if not (model.takes_image or model.image_pipeline):
        raise InputError(f"{model.alias} makes clips from text alone: leave out --image, or choose an i2v model")
    return _picture(text, "image")


def video(
    model: ModelEntry, text: str | None, num_frames: int, image: str | None, *, needed: bool = True
) -> str | None:
    """The path of a video that a clip is made from; InputError when the model needs one (where one is `needed` at all),
    takes none, or the file cannot be read or has too few frames.
    """
    if text is None:
        if model.takes_video and needed:
            raise InputError(f"{model.alias} changes a video and none was given: add --video FILE")
        return None
    if model.video_pipeline is None:
        *first, last = [entry.alias for entry in ENTRIES if entry.video_pipeline]
        raise InputError(
            f"{model.alias} takes no video: leave out --video, which is for models that do, as {', '.join(first)} and "
            f"{last}"
        )
    if image is not None:
        raise InputError("--image and --video both say what the clip is made from: give one of them")
    path = user_path(text, "video")
    _look_at_video(path, num_frames, PIPELINES[model.video_pipeline].continues)
    return str(path)


@once_a_content
def _look_at_video(path: Path, num_frames: int, continues: int) -> None:
    """InputError unless a video's first `num_frames` can be read or, where a clip continues some, its last ones."""
    from vmonarch_cli.media.read import last_frames, read_frames

    if continues:
        last_frames(path, continues)
    else:
        read_frames(path, num_frames)


def strength(facts: PipelineFacts, video: str | None, value: float | None, sigmas: tuple[float, ...]) -> float | None:
    """How much of the noise schedule a given video goes through, None where none is noised or `sigmas` say so."""
    if value is None:
        return _STRENGTH if video is not None and facts.noises_video and not sigmas else None
    number("--strength", value, *STRENGTHS)
    if video is None:
        raise InputError("--strength is how far a given video is changed, and none was given: add --video FILE")
    if not facts.noises_video:
        raise InputError(
            f"--strength is for videos that are noised, and {with_article(facts.name)} follows one: leave it out"
        )
    if sigmas:
        raise InputError("--sigmas and --strength both say at which noise level the clip begins: give one of them")
    return value


def _picture(text: str, thing: str) -> str:
    path = user_path(text, thing)
    _look_at_picture(path, f"{thing} {text}")
    return str(path)


@once_a_content
def _look_at_picture(path: Path, name: str) -> None:
    """InputError unless a picture can be read."""
    load_picture(path, name, missing=f"there is no {name}")


def structured(preset: Preset, why: str, chosen: str | None = None) -> None:
    """InputError, which says why, for a preset that is dense attention; `chosen`: why `--preset auto` chose it."""
    if preset.attention != "dense":
        return
    if chosen is not None:
        raise InputError(f"--preset auto takes dense attention here ({chosen}), {why}: name a structured preset")
    raise InputError(f"preset {preset.name} is dense attention, {why}: name a structured preset")
