"""One run from plan to files: load, swap, and for every clip encode, denoise, decode, write. The only orchestration."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vmonarch_cli import video
from vmonarch_cli.attention import AttentionSession, swapped
from vmonarch_cli.errors import DeviceError, ModelError, NonFiniteError
from vmonarch_cli.loading import device_name, load_pipeline, pick_device, pick_dtype
from vmonarch_cli.plan import Plan
from vmonarch_cli.targets import record_path
from vmonarch_cli.timing import (
    ClipDone,
    ClipResult,
    ClipStarted,
    ClipTiming,
    CompilingKernels,
    Decoding,
    Event,
    ModelLoaded,
    ModelLoading,
    StepAttention,
    StepDone,
)
from vmonarch_cli.versions import installed_versions

RECORD_SCHEMA = 1
"""Version of the JSON record's layout; raised when a reader of an older one would misread it."""

OnEvent = Callable[[Event], None]
Frames = npt.NDArray[np.uint8]
Embeddings = tuple[torch.Tensor, torch.Tensor | None]


def generate(plan: Plan, *, on_event: OnEvent = lambda event: None) -> list[ClipResult]:
    """Make every clip of a plan and its record; clip i has seed ``plan.seed + i`` and does not depend on the others.

    Raises DeviceError and ModelError before anything is written, NonFiniteError when a clip goes wrong (it is not
    written, the clips before it are), OutputError when a file cannot be written.
    """
    device = pick_device(plan.device)
    dtype = pick_dtype(plan.dtype, device)
    on_event(ModelLoading(plan.model_source))
    began = time.perf_counter()
    pipeline = load_pipeline(plan.model_source, device=device, dtype=dtype, flow_shift=plan.flow_shift)
    with swapped(
        pipeline,
        plan.preset,
        sample_dense_every=plan.dense_every,
        on_first_call=lambda: on_event(CompilingKernels()),
    ) as session:
        try:
            impl = session.resolve_impl(device, dtype, plan.model.head_dim)
        except ValueError as error:  # ImplUnavailable, whose message is one sentence
            raise DeviceError(str(error)) from None
        loaded_s = time.perf_counter() - began
        on_event(ModelLoaded(plan.model_source, loaded_s, device_name(device), _name(dtype), impl))
        try:
            return [_clip(pipeline, session, plan, device, index, on_event) for index in range(plan.num_videos)]
        except torch.cuda.OutOfMemoryError:
            raise ModelError(
                f"{plan.width}x{plan.height} with {plan.num_frames} frames does not fit the memory of "
                f"{device_name(device)}: choose a smaller size or fewer frames"
            ) from None


def encode(pipeline: Any, prompt: str, negative_prompt: str, guidance_scale: float, max_tokens: int) -> Embeddings:
    """Text embeddings (1, max_tokens, channels) of the prompt and, where guidance is used, of the negative prompt."""
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=guidance_scale > 1.0,
            max_sequence_length=max_tokens,
        )
    return positive, negative


def denoise(
    pipeline: Any,
    session: AttentionSession,
    embeddings: Embeddings,
    *,
    height: int,
    width: int,
    num_frames: int,
    steps: int,
    guidance_scale: float,
    guidance_scale_2: float | None = None,
    seed: int,
    on_step: Callable[[StepAttention], None] = lambda step: None,
) -> torch.Tensor:
    """Latents (1, C, F, h, w), float32, of one clip, as the pipeline's own loop makes them inside ``swapped``.

    The noise comes from a CPU generator of this clip, so that a seed means the same on every device.
    Raises NonFiniteError, with the step's number, as soon as a latent is not finite.
    """

    def after_step(_: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if not torch.isfinite(tensors["latents"]).all():
            raise NonFiniteError(
                f"latents stopped being finite in step {index + 1} of {steps}, and no clip was written: "
                "a wider --dtype or --preset dense may help"
            )
        on_step(session.steps[-1])
        return tensors

    positive, negative = embeddings
    result = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        guidance_scale_2=guidance_scale_2,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
        callback_on_step_end=after_step,
    )
    latents: torch.Tensor = result.frames
    return latents


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> Frames:
    """Latents (1, C, F, h, w) -> frames (frames, height, width, 3), uint8; the end of WanPipeline.__call__.

    Raises NonFiniteError when the decoder makes a value that is not finite.
    """
    vae = pipeline.vae
    latents = latents.to(vae.device, vae.dtype)
    mean = latents.new_tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = latents.new_tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    # The pipeline divides by the reciprocal; so that frames are the same to the bit, so does this.
    clip = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    if not torch.isfinite(clip).all():
        raise NonFiniteError("decoded frames are not finite, after the last step, and no clip was written")
    values = pipeline.video_processor.postprocess_video(clip, output_type="np")[0]
    frames: Frames = (values * 255).round().astype(np.uint8)
    return frames


def _clip(
    pipeline: Any, session: AttentionSession, plan: Plan, device: torch.device, index: int, on_event: OnEvent
) -> ClipResult:
    seed = plan.seed + index
    path = plan.outputs[index]
    on_event(ClipStarted(index, plan.num_videos, seed, plan.steps))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watch = _Stopwatch(device)

    embeddings = encode(
        pipeline, plan.prompt, plan.negative_prompt, plan.guidance_scale, plan.model.max_sequence_length
    )
    text_encode_s = watch.lap()
    latents = denoise(
        pipeline,
        session,
        embeddings,
        height=plan.height,
        width=plan.width,
        num_frames=plan.num_frames,
        steps=plan.steps,
        guidance_scale=plan.guidance_scale,
        guidance_scale_2=plan.guidance_scale_2,
        seed=seed,
        on_step=lambda step: on_event(StepDone(index, step)),
    )
    denoise_s = watch.lap() - session.excluded_s
    on_event(Decoding(index))
    frames = decode(pipeline, latents)
    decode_s = watch.lap()
    video.write_clip(frames, path, plan.fps, plan.overwrite)
    write_s = watch.lap()

    first_calls = [step.first_call_s for step in session.steps if step.first_call_s is not None]
    peak_bytes, peak_kind = _peak_memory(device)
    timing = ClipTiming(
        steps=session.steps,
        text_encode_s=text_encode_s,
        denoise_s=denoise_s,
        decode_s=decode_s,
        write_s=write_s,
        total_s=watch.total(),
        excluded_s=session.excluded_s,
        first_call_s=sum(first_calls) if first_calls else None,
        peak_memory_bytes=peak_bytes,
        peak_memory_kind=peak_kind,
        warm_state_bytes=session.warm_state_bytes,
    )
    record = _record(plan, session, timing, device, seed, path, frames.shape)
    video.write_record(record_path(path), record, plan.overwrite)
    result = ClipResult(
        index=index,
        path=path,
        record_path=record_path(path),
        seed=seed,
        impl=session.impl or "",
        grid=session.grid or plan.grid,
        coverage=session.coverage(),
        timing=timing,
        record=record,
    )
    on_event(ClipDone(result))
    return result


def _record(
    plan: Plan,
    session: AttentionSession,
    timing: ClipTiming,
    device: torch.device,
    seed: int,
    path: Path,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """What the JSON file beside a clip says: enough to repeat the clip and to trust its figures."""
    return {
        "schema": RECORD_SCHEMA,
        "prompt": plan.prompt,
        "seed": seed,
        "clip": path.name,
        "frames": {"count": shape[0], "height": shape[1], "width": shape[2], "fps": plan.fps},
        "settings": plan.settings(),
        "preset": plan.preset.model_dump(),
        "model": {"source": plan.model_source, **plan.model.model_dump(mode="json")},
        "grid": list(session.grid or plan.grid),
        "tokens": plan.tokens,
        "flops": plan.flops.model_dump(),
        "device": {"type": str(device), "name": device_name(device), "threads": torch.get_num_threads()},
        "dtype": _name(pick_dtype(plan.dtype, device)),
        "impl": session.impl,
        "coverage": session.coverage().to_json(),
        "timing": timing.to_json(),
        "versions": installed_versions(),
        "warnings": list(plan.warnings),
    }


def _peak_memory(device: torch.device) -> tuple[int, str]:
    """(bytes, what they count) at the peak so far: of this clip on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "device"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Stopwatch:
    """Wall clock between phases; waits for the GPU, so that a phase owns the work it started."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        last, self._last = self._last, self._now()
        return self._last - last

    def total(self) -> float:
        return self._now() - self._began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
