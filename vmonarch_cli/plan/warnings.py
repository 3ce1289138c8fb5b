"""Sentences about what will work less well than the user may expect, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vmonarch_cli.machine.hardware import uses_gpu
from vmonarch_cli.models.base import ModelEntry, PipelineFacts
from vmonarch_cli.models.demo_vocabulary import unknown_words
from vmonarch_cli.models.lora_facts import LoraFacts, distilled_word
from vmonarch_cli.models.lora_files import parse_lora
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.plan.costs import Flops, StepCost
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.presets import Preset, parse_assignment
from vmonarch_cli.text import listed

ALL_NOISE = 0.99
"""Noise level from which on a video that is noised cannot be made out."""
COSTLY = 1.1
"""Times dense attention above which a preset's cost is said; below, the two are alike."""
FEW_STEPS = 8
"""Denoising steps up to which a step cache harms: what distilled models take."""


def of_demo(model: ModelEntry, prompt: str, shape: tuple[int, int, int]) -> list[str]:
    """Of the demo model: words and shapes that it was not trained on; ``shape`` is (height, width, frames)."""
    found: list[str] = []
    if model.alias != DEMO_ALIAS:
        return found
    unknown = unknown_words(prompt)
    if unknown:
        words = ", ".join(f"'{word}'" for word in unknown[:8]) + (" and others" if len(unknown) > 8 else "")
        found.append(f"the demo model was not trained on {words}: those words will not show in the clip")
    height, width, frames = shape
    shortest, longest = model.trained_frames
    if model.trained_sizes and ((height, width) not in model.trained_sizes or not shortest <= frames <= longest):
        sizes = listed([f"{across}x{down}" for down, across in model.trained_sizes])
        found.append(
            f"the demo model was trained at {sizes} with {shortest} to {longest} frames: "
            f"{width}x{height} with {frames} will look worse"
        )
    return found


def of_flags(request: GenerateRequest, model: ModelEntry, facts: PipelineFacts, guidance_scale: float) -> list[str]:
    """Flags that were given and change nothing."""
    found = []
    if request.guidance_scale_2 is not None and request.guidance_scale_2 > 1 >= guidance_scale:
        found.append(
            f"--guidance-scale-2 {request.guidance_scale_2:g} has no effect: with --guidance-scale {guidance_scale:g} "
            "the pipeline runs without guidance in both stages, and 1.01 would give its first stage next to none"
        )
    if facts.distilled and request.guidance_scale is not None:
        found.append(f"--guidance-scale has no effect: guidance is in the weights of {model.alias}")
    if request.negative_prompt:
        if facts.distilled:
            found.append(f"--negative-prompt has no effect: guidance is in the weights of {model.alias}")
        elif facts.negative == "never":
            found.append(
                f"--negative-prompt has no effect: guidance of {model.alias} is a number without a second text"
            )
        elif guidance_scale <= 1:
            found.append(
                f"--negative-prompt has no effect: with --guidance-scale {guidance_scale:g} there is no guidance, "
                "which begins above 1"
            )
    return found


def of_video(video: str | None, facts: PipelineFacts, sigmas: Sequence[float] | None) -> Iterator[str]:
    """A given video of which the first noise level leaves nothing."""
    if video is not None and facts.noises_video and sigmas and sigmas[0] >= ALL_NOISE:
        yield (
            f"--video has next to no effect: the clip begins at noise level {sigmas[0]:g}, and 1 is noise alone; a "
            "smaller --strength keeps more of it"
        )


def of_schedule(
    preset: Preset, schedule: Sequence[StepCost], flops: Flops, *, small: bool, or_dense: bool
) -> Iterator[str]:
    """A preset of which nothing runs structured, though it is made for that, or which costs more than dense; nothing
    where all calls run dense because they are small, which other words say. `or_dense`: the command takes dense
    attention, too.
    """
    asks_for_dense = flops.structured_call == flops.dense_call  # a band over all frames does
    if preset.attention == "dense" or small or asks_for_dense:
        return
    if all(row.dense for row in schedule):
        all_steps = "its one step is dense" if len(schedule) == 1 else f"all {len(schedule)} steps are dense"
        yield f"preset {preset.name} runs nothing structured here: {all_steps}, as with --preset dense"
    elif flops.planned > COSTLY * flops.dense:
        yield (
            f"preset {preset.name} costs more than dense attention here, {flops.planned / flops.dense:.2f} times as "
            f"much: more frames{', or --preset dense,' if or_dense else ''} would be better"
        )


def of_cache(cache: str | None, steps: int) -> Iterator[str]:
    """A step cache in a clip of few steps, where hardly one of them is like the one before."""
    if cache is not None and steps <= FEW_STEPS:
        yield (
            f"--cache {cache} leaves out work of {steps} steps, which differ much from one another: with "
            f"{FEW_STEPS} steps or fewer, as distilled models take, it harms the clip more than it saves"
        )


def of_quantize(setup: Setup, facts: PipelineFacts) -> Iterator[str]:
    """int8 products without a compiler, whose results pass the memory three times before they are numbers again."""
    if setup.quantize == "int8" and not setup.compile:
        way_out = "add --compile" if facts.compiles else f"diffusers compiles no {facts.transformer}"
        yield f"--quantize int8 saves memory and, without --compile, no time: {way_out}, or take fp8 if the GPU has it"


def without_effect(request: GenerateRequest, preset: Preset, outputs: Sequence[Path], source: str) -> Iterator[str]:
    """Flags that this preset, this machine, the format of the clips or the model's `source` makes meaningless."""
    if request.revision is not None and Path(source).is_dir():
        yield f"--revision {request.revision} changes nothing: the model's weights are in a folder, not in a repository"
    if request.quality is not None and all(path.suffix.lower() == ".png" for path in outputs):
        yield f"--quality {request.quality} changes nothing: PNGs are lossless"
    if preset.attention == "dense":
        assigned = [parse_assignment(text)[0] for text in request.overrides]
        given = [name for name in ("dense_steps", "dense_layers", "impl") if getattr(request, name) is not None]
        names = [name for name in (*assigned, *given) if name != "attention"]
        if names:
            yield f"all attention is dense with this preset: {', '.join(names)} changes nothing"
    if request.graphs and not uses_gpu(request.device or "auto"):
        yield "--graphs changes nothing on a CPU: CUDA graphs are a GPU's"
    elif request.graphs and preset.attention != "dense" and preset.impl in ("torch", "reference"):
        yield f"--graphs changes nothing with impl {preset.impl}: the calls of Triton are what is replayed"
    if request.offload not in (None, "auto", "none") and not uses_gpu(request.device or "auto"):
        yield f"--offload {request.offload} changes nothing on a CPU: there is nothing to offload to"


def of_loras(
    texts: tuple[str, ...], loras: tuple[LoraFacts, ...], model: ModelEntry, guidance_scale: float
) -> Iterator[str]:
    """A LoRA for few steps without guidance, by its name or metadata, and guidance that is on."""
    if guidance_scale <= 1 or model.embedded_guidance:
        return
    known = {facts.name: facts.distilled for facts in loras}
    for text in texts:  # of those on the hub there is a name, and no metadata yet
        source = parse_lora(text).source
        known.setdefault(source, distilled_word(source))
    name, word = next(((name, word) for name, word in known.items() if word), ("", ""))
    if word:
        yield (
            f"LoRA {name} is for few steps without guidance ('{word}' in its name or metadata), and guidance is on: "
            "add --guidance-scale 1, which also halves the work"
        )
