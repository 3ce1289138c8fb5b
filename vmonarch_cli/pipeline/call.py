"""What the pipelines of all families have in common for a run: text in, the denoising call, frames out."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vmonarch_cli.errors import NonFiniteError
from vmonarch_cli.families.base import Shape
from vmonarch_cli.families.registry import facts_of, family_of
from vmonarch_cli.media.sound import Sound
from vmonarch_cli.pipeline import step_cache
from vmonarch_cli.pipeline.modular import free_models, input_names, is_modular, without_decoding
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.text import with_article

Frames = npt.NDArray[np.uint8]
Embeddings = dict[str, Any]
"""Encoded text, by the names under which the pipeline's call takes it; the prompt itself where that call encodes it."""


@torch.no_grad()
def encode(
    pipeline: Any, prompt: str | list[str], negative_prompt: str, guidance_scale: float, max_tokens: int
) -> Embeddings:
    """Text embeddings of the prompt and, where guidance uses one, of the negative prompt.

    prompt: of one clip, or of several that are made together, by a family that has `batches`.
    """
    facts, family, guided = facts_of(pipeline), family_of(pipeline), guidance_scale > 1.0
    if family.check_prompt is not None:
        for text in [prompt] if isinstance(prompt, str) else prompt:
            family.check_prompt(pipeline, text)
    if facts.modular:
        return {"prompt": prompt}
    if facts.text_with_image:
        return {"prompt": prompt, "max_sequence_length": max_tokens}

    def call(**given: Any) -> Embeddings:
        values = pipeline.encode_prompt(**_accepted(pipeline.encode_prompt, max_sequence_length=max_tokens, **given))
        return family.encoded(dict(zip(facts.text, values, strict=True)))

    if facts.negative == "together":
        return call(prompt=prompt, negative_prompt=negative_prompt, do_classifier_free_guidance=guided)
    texts = family.prompt(prompt) if isinstance(prompt, str) else prompt
    found = call(prompt=texts, do_classifier_free_guidance=False)
    if facts.negative == "apart" and guided:
        negative = call(prompt=family.prompt(negative_prompt), do_classifier_free_guidance=False)
        found |= {f"negative_{name}": value for name, value in negative.items()}
    return found


class Latents(NamedTuple):
    """What a pipeline's denoising loop made: of the frames, and of the sound (B, C, length, mel bins) with them."""

    frames: torch.Tensor
    sound: torch.Tensor | None


def sampling_of(plan: Plan, seed: int) -> dict[str, Any]:
    """How a plan's clip is sampled, as options of `call`; `seed`: of the clip."""
    return {
        "num_inference_steps": plan.steps,
        "guidance_scale": plan.guidance_scale,
        "guidance_scale_2": plan.guidance_scale_2,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "fps": plan.fps,
    }


def call(pipeline: Any, embeddings: Embeddings, shape: Shape, **options: Any) -> torch.Tensor:
    """Latents of the frames alone, see `call_with_sound`."""
    return call_with_sound(pipeline, embeddings, shape, **options).frames


def call_with_sound(pipeline: Any, embeddings: Embeddings, shape: Shape, **options: Any) -> Latents:
    """Latents of the pipeline's own denoising loop; options that its call does not know are left out.

    `fps` goes to the pipelines whose model wants to know it, and guidance to the guider of those that have one.
    """
    height, width, num_frames = shape
    if facts_of(pipeline).guider:
        pipeline.guider = pipeline.guider.new(guidance_scale=options["guidance_scale"])
    given = {**options, "frame_rate": options.get("fps"), "height": height, "width": width, "num_frames": num_frames}
    if facts_of(pipeline).modular:
        return _call_modular(pipeline, {**given, **embeddings})
    known = _accepted(type(pipeline).__call__, **family_of(pipeline).conditions(pipeline, given))
    step_cache.forget(pipeline)
    with family_of(pipeline).adjusted(pipeline, known) as adjusted:
        # Motif's image pipeline has no default for the prompt, which the embeddings replace.
        made = pipeline(**{"prompt": None, **embeddings}, **adjusted, output_type="latent")
    return Latents(made.frames, made.audio if facts_of(pipeline).sound else None)


def _call_modular(pipeline: Any, given: dict[str, Any]) -> Latents:
    """The same of a pipeline of blocks, whose latents stay in the state that its call ends with."""
    known = {name: given[name] for name in input_names(pipeline) if given.get(name) is not None}
    with without_decoding(pipeline), family_of(pipeline).adjusted(pipeline, known) as adjusted:
        made = pipeline(**adjusted, output=["latents", "audio_latents"])
    free_models(pipeline)
    sound = made.get("audio_latents") if facts_of(pipeline).sound else None
    return Latents(made["latents"], None if sound is None else sound[None])


def takes_callback(pipeline: Any) -> bool:
    """Whether the pipeline calls back after each step."""
    return "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters


def _accepted(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    known = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in known and value is not None}


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None = None) -> Iterator[Frames]:
    """Latents of `call` -> frames in parts (f, height, width, 3), uint8, in order, as soon as each part is made; the
    end of the pipeline's own call.

    shape: of the clip; CogVideoX 1.5, LTX and Allegro cannot do without. Raises NonFiniteError when the decoder makes
    a value that is not finite.
    """
    vae = pipeline.vae
    # An offloaded VAE is elsewhere until it runs.
    device = pipeline._execution_device if _is_offloaded(vae) else vae.device
    waiting: deque[Callable[[], Frames]] = deque()
    for part in family_of(pipeline).decode(pipeline, latents.to(device), shape):
        waiting.append(_to_host(pipeline, part))
        # A GPU has its next part to work on before this thread waits for the last one.
        if len(waiting) > (device.type == "cuda"):
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()
    _free_models(pipeline, vae)


def decode_whole(pipeline: Any, latents: torch.Tensor, shape: Shape | None = None) -> Frames:
    """All frames of `decode` together: (frames, height, width, 3), uint8."""
    return np.concatenate(list(decode(pipeline, latents, shape)))


def _to_host(pipeline: Any, part: torch.Tensor) -> Callable[[], Frames]:
    """Start to bring frames (1, 3, f, height, width) to the host as 8 bits; the result waits for them."""
    values = pipeline.video_processor.postprocess_video(part, output_type="pt")[0]
    pixels = (values.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    finite = torch.isfinite(part).all()
    if part.device.type == "cuda":
        on_host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in (pixels, finite)]
        for target, source in zip(on_host, (pixels, finite), strict=True):
            target.copy_(source, non_blocking=True)
        pixels, finite = on_host
        arrived = torch.cuda.Event()
        arrived.record()
    else:
        arrived = None

    def frames() -> Frames:
        if arrived is not None:
            arrived.synchronize()
        if not finite:
            raise NonFiniteError("decoded frames are not finite, after the last step, and no clip was written")
        found: Frames = pixels.numpy()
        return found

    return frames


@torch.no_grad()
def decode_sound(pipeline: Any, latents: torch.Tensor) -> Sound:
    """Sound of latents of `call_with_sound`; the end of the pipeline's own call.

    Raises NonFiniteError when the decoder makes a value that is not finite.
    """
    family, vae = family_of(pipeline), pipeline.audio_vae
    if family.decode_sound is None:
        raise ValueError(f"{with_article(type(pipeline).__name__)} makes no sound")
    device = pipeline._execution_device if _is_offloaded(vae) else vae.device
    samples, rate = family.decode_sound(pipeline, latents.to(device))
    if not torch.isfinite(samples).all():
        raise NonFiniteError("decoded sound is not finite, after the last step, and no clip was written")
    _free_models(pipeline, vae)
    return Sound.of(samples[0].float().cpu().numpy().T, rate)


def _free_models(pipeline: Any, last: torch.nn.Module) -> None:
    """What an offloaded pipeline's own call ends with, if its `last` module is offloaded. Otherwise there is nothing to
    free, and the step caches, which diffusers forgets as well, may be those of a clip that is being denoised.
    """
    if is_modular(pipeline):
        free_models(pipeline)
    elif _is_offloaded(last):
        pipeline.maybe_free_model_hooks()


def _is_offloaded(module: Any) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return hasattr(module, "_hf_hook") or _is_group_offload_enabled(module)
