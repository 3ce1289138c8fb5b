"""One run from plan to files: load, swap, and for every clip encode, denoise, decode, write. The only orchestration."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.clip.latents import Denoised, save_latents
from vmonarch_cli.errors import DeviceError, ModelError, NonFiniteError
from vmonarch_cli.events import (
    ClipDone,
    ClipStarted,
    CompilingKernels,
    Decoding,
    Event,
    ModelLoaded,
    ModelLoading,
    Retrying,
    StepDone,
)
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.machine.versions import installed_versions
from vmonarch_cli.media import write as video
from vmonarch_cli.media.paths import latents_path, record_path
from vmonarch_cli.pipeline import context_parallel as distributed
from vmonarch_cli.pipeline.call import Embeddings, Frames, call, decode, encode, takes_callback
from vmonarch_cli.pipeline.decode_retry import decode_with_retries
from vmonarch_cli.pipeline.device import DTYPES, device_name, dtype_name
from vmonarch_cli.pipeline.load import load_decoder, load_pipeline, set_flow_shift
from vmonarch_cli.pipeline.preflight import check_machine, machine_to_decode
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.timing import ClipResult, ClipTiming, StepAttention

RECORD_SCHEMA = 1
"""Version of the JSON record's layout; raised when a reader of an older one would misread it."""

OnEvent = Callable[[Event], None]


def generate(
    plan: Plan,
    *,
    retry_dense: bool = True,
    finishing: Callable[[], AbstractContextManager[None]] = nullcontext,
    on_event: OnEvent = lambda event: None,
) -> list[ClipResult]:
    """Make every clip of a plan and its record; clip i has seed ``plan.seed + i`` and does not depend on the others.

    Latents are saved beside the clip before they are decoded and removed when the clip is written. `finishing` is
    around what an interrupt should not cut short.
    Raises DeviceError and ModelError before anything is written, NonFiniteError when a clip goes wrong (it is not
    written, the clips before it are), OutputError when a file cannot be written.
    """
    distributed.check_tokens(plan.tokens)
    maker = ClipMaker(plan, retry_dense=retry_dense, on_event=on_event, share_clip=True)
    results = []
    for index in range(plan.num_videos):
        path = latents_path(plan.outputs[index])
        denoised = maker.denoise(plan, index)
        if not read_rank().is_main:
            continue
        with finishing():
            denoised = maker.save(path, plan, index, denoised)
        with finishing():
            results.append(maker.finish(plan, index, denoised))
            path.unlink(missing_ok=True)
    return results


class ClipMaker:
    """A loaded model, which makes clips one at a time; they share nothing but its weights and compiled kernels.

    A plan given to `denoise` must name the model that was loaded. Attention sessions are kept per preset, so that
    presets take turns without loading or compiling anything again.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        retry_dense: bool = True,
        on_event: OnEvent = lambda event: None,
        share_clip: bool = False,
        to_decode: bool = False,
    ) -> None:
        """Load the plan's model.

        retry_dense: make a clip whose latents are not finite once more, all dense. share_clip: the processes of a
        torchrun make each clip together; otherwise they have nothing to do with each other. to_decode: load no more
        than `finish` needs.
        """
        self._on_event = on_event
        self._retry_dense = retry_dense
        machine = machine_to_decode(plan) if to_decode else check_machine(plan)
        self._device, self._dtype = torch.device(machine.device), DTYPES[machine.dtype]
        on_event(ModelLoading(plan.model_source))
        began = time.perf_counter()
        image_pipeline = plan.model.image_pipeline if plan.image else None
        if to_decode:
            self._pipeline = load_decoder(
                plan.model_source,
                device=self._device,
                dtype=self._dtype,
                revision=plan.revision,
                vae_tiling=plan.setup.vae_tiling,
                image_pipeline=image_pipeline,
            )
        else:
            self._pipeline = load_pipeline(
                plan.model_source,
                device=self._device,
                dtype=self._dtype,
                revision=plan.revision,
                setup=plan.setup.model_copy(update={"offload": machine.offload}),
                image_pipeline=image_pipeline,
                share_clip=share_clip,
            )
        self._scheduler = self._pipeline.scheduler
        self._sessions: dict[tuple[Preset, int], AttentionSession] = {}
        impl = None if to_decode else self._resolve_impl(plan)
        loaded_s = time.perf_counter() - began
        on_event(ModelLoaded(plan.model_source, loaded_s, device_name(self._device), dtype_name(self._dtype), impl))

    def _resolve_impl(self, plan: Plan) -> str:
        with self._swapped(plan, plan.preset) as session:
            try:
                return session.resolve_impl(self._device, self._dtype, plan.model.head_dim)
            except ValueError as error:  # ImplUnavailable, whose message is one sentence
                raise DeviceError(str(error)) from None

    def denoise(self, plan: Plan, index: int) -> Denoised:
        """Latents of clip `index` of the plan.

        Raises NonFiniteError when they are not finite (in a retry as well), ModelError when memory runs out.
        """
        self._on_event(ClipStarted(index, plan.num_videos, plan.seed + index, plan.steps))
        try:
            return self._denoise(plan, plan.preset, index)
        except NonFiniteError as error:
            if not self._retry_dense or plan.preset.attention == "dense":
                raise
            retry = {"stage": "denoise", "reason": error.message, "with": "dense attention"}
        self._on_event(Retrying(index, f"{retry['reason'].split(':')[0]}: trying once more with dense attention"))
        try:
            return replace(self._denoise(plan, load_preset("dense"), index), retries=(retry,))
        except NonFiniteError as error:
            raise NonFiniteError(f"{error.message} (dense attention was tried as well)") from None

    def save(
        self, path: Path, plan: Plan, index: int, denoised: Denoised, *, key: str = "", work: Path | None = None
    ) -> Denoised:
        """Save latents before they are decoded; the same, with the time that this took."""
        watch = _Stopwatch(self._device)
        save_latents(path, plan, index, denoised, key=key, work=work)
        return replace(denoised, save_s=watch.total())

    def finish(
        self,
        plan: Plan,
        index: int,
        denoised: Denoised,
        *,
        overwrite: bool | None = None,
        work: Path | None = None,
        on_frames: Callable[[Frames], None] = lambda frames: None,
    ) -> ClipResult:
        """Decode (with less memory where it runs out), and write the clip and its record.

        `overwrite`: the plan's own by default; `work`: see `video.write_clip`; `on_frames` gets the frames as decoded.
        """
        path = plan.outputs[index]
        replaces = plan.overwrite if overwrite is None else overwrite
        self._on_event(Decoding(index))
        watch = _Stopwatch(self._device)
        frames, retries = decode_with_retries(
            lambda: decode(self._pipeline, denoised.latents, (plan.height, plan.width, plan.num_frames)),
            self._pipeline,
            self._device,
            lambda sentence: self._on_event(Retrying(index, sentence)),
        )
        denoised = replace(denoised, retries=(*denoised.retries, *retries))
        decode_s = watch.lap()
        video.write_clip(frames, path, plan.fps, replaces, work)
        write_s = watch.lap()
        peak, kind = _peak_memory(self._device)
        timing = _timing(denoised, decode_s, write_s, max(peak, denoised.peak_memory_bytes), kind)
        record = _record(plan, denoised, timing, path, frames)
        video.write_record(record_path(path), record, replaces, work)
        on_frames(frames)
        result = ClipResult(
            index=index,
            path=path,
            record_path=record_path(path),
            seed=denoised.seed,
            impl=denoised.impl,
            grid=denoised.grid,
            coverage=denoised.coverage,
            timing=timing,
            record=record,
        )
        self._on_event(ClipDone(result))
        return result

    def _denoise(self, plan: Plan, preset: Preset, index: int) -> Denoised:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        watch = _Stopwatch(self._device)
        seed = plan.seed + index
        with self._swapped(plan, preset) as session:
            try:
                embeddings = encode(
                    self._pipeline,
                    plan.prompt,
                    plan.negative_prompt,
                    plan.guidance_scale,
                    plan.model.max_sequence_length,
                )
                text_encode_s = watch.lap()
                latents = denoise(
                    self._pipeline,
                    session,
                    embeddings,
                    height=plan.height,
                    width=plan.width,
                    num_frames=plan.num_frames,
                    steps=plan.steps,
                    guidance_scale=plan.guidance_scale,
                    guidance_scale_2=plan.guidance_scale_2,
                    seed=seed,
                    fps=plan.fps,
                    image=plan.image,
                    on_step=lambda step: self._on_event(StepDone(index, step)),
                )
            except torch.OutOfMemoryError:
                raise ModelError(
                    f"{plan.width}x{plan.height} with {plan.num_frames} frames does not fit the memory of "
                    f"{device_name(self._device)}: choose a smaller size or fewer frames"
                ) from None
            return Denoised(
                latents=latents,
                seed=seed,
                impl=session.impl or "",
                grid=session.grid or plan.grid,
                coverage=session.coverage(),
                steps=session.steps,
                text_encode_s=text_encode_s,
                denoise_s=watch.lap() - session.excluded_s,
                excluded_s=session.excluded_s,
                total_s=watch.total(),
                peak_memory_bytes=_peak_memory(self._device)[0],
                warm_state_bytes=session.kept_bytes,
                skipped_calls=session.skipped_calls,
                device={
                    "type": str(self._device),
                    "name": device_name(self._device),
                    "threads": torch.get_num_threads(),
                },
                dtype=dtype_name(self._dtype),
            )

    @contextmanager
    def _swapped(self, plan: Plan, preset: Preset) -> Iterator[AttentionSession]:
        """The model with the preset's attention and the plan's flow shift."""
        self._pipeline.scheduler = self._scheduler
        set_flow_shift(self._pipeline, plan.flow_shift)
        key = (preset, plan.dense_every)
        with swapped(
            self._pipeline,
            preset,
            sample_dense_every=plan.dense_every,
            on_first_call=lambda: self._on_event(CompilingKernels()),
            session=self._sessions.get(key),
        ) as session:
            self._sessions[key] = session
            try:
                yield session
            finally:
                session.begin_clip()  # frees the warm state, which decoding may need the room of


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
    fps: int | None = None,
    image: str | None = None,
    on_step: Callable[[StepAttention], None] = lambda step: None,
) -> torch.Tensor:
    """Latents (1, C, F, h, w), float32, of one clip, as the pipeline's own loop makes them inside ``swapped``.

    The noise comes from a CPU generator of this clip, so that a seed means the same on every device.
    Raises NonFiniteError, with the step's number, as soon as a latent is not finite.
    """

    def check(index: int, latents: torch.Tensor) -> None:
        if not torch.isfinite(latents).all():
            raise NonFiniteError(
                f"latents stopped being finite in step {index + 1} of {steps}, and no clip was written: "
                "a wider --dtype or --preset dense may help"
            )
        on_step(session.steps[-1])

    def after_step(_: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        check(index, tensors["latents"])
        return tensors

    # A pipeline without callbacks is followed through its scheduler.
    by_callback = takes_callback(pipeline)
    session.on_sample = None if by_callback else lambda sample: check(len(session.steps) - 1, sample)
    try:
        return call(
            pipeline,
            embeddings,
            (height, width, num_frames),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            generator=torch.Generator("cpu").manual_seed(seed),
            fps=fps,
            image=None if image is None else first_frame(image, height, width),
            callback_on_step_end=after_step if by_callback else None,
        )
    finally:
        session.on_sample = None


def first_frame(path: str, height: int, width: int) -> Any:
    """The image as the clip's first frame: its middle, cut to the clip's proportions."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height))


def _timing(denoised: Denoised, decode_s: float, write_s: float, peak: int, peak_kind: str) -> ClipTiming:
    first_calls = [step.first_call_s for step in denoised.steps if step.first_call_s is not None]
    return ClipTiming(
        steps=denoised.steps,
        text_encode_s=denoised.text_encode_s,
        denoise_s=denoised.denoise_s,
        decode_s=decode_s,
        write_s=denoised.save_s + write_s,
        total_s=denoised.total_s + denoised.save_s + decode_s + write_s,
        excluded_s=denoised.excluded_s,
        first_call_s=sum(first_calls) if first_calls else None,
        peak_memory_bytes=peak,
        peak_memory_kind=peak_kind,
        warm_state_bytes=denoised.warm_state_bytes,
    )


def _record(plan: Plan, denoised: Denoised, timing: ClipTiming, path: Path, frames: Frames) -> dict[str, Any]:
    """What the JSON file beside a clip says: enough to repeat the clip and to trust its figures."""
    return {
        "schema": RECORD_SCHEMA,
        "prompt": plan.prompt,
        "seed": denoised.seed,
        "clip": path.name,
        "frames": {
            "count": len(frames),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "fps": plan.fps,
            "sha256": video.frames_hash(frames),
        },
        "settings": plan.settings(),
        "preset": plan.preset.model_dump(),
        "model": {"source": plan.model_source, **plan.model.model_dump(mode="json")},
        "grid": list(denoised.grid),
        "tokens": plan.tokens,
        "flops": plan.flops.model_dump(),
        "device": denoised.device,
        "dtype": denoised.dtype,
        "impl": denoised.impl,
        "coverage": denoised.coverage.to_json(),
        "timing": timing.to_json(),
        "versions": installed_versions(),
        "warnings": list(plan.warnings),
        "retries": list(denoised.retries),
        "setup": plan.setup.model_dump(),
        "skipped_calls": denoised.skipped_calls,
    }


def _peak_memory(device: torch.device) -> tuple[int, str]:
    """(bytes, what they count) at the peak so far: of this clip on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "device"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


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
