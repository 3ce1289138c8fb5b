"""One run from plan to files: load, swap, and for every clip encode, denoise, decode, write. The only orchestration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.clip.beside import Beside
from vmonarch_cli.clip.denoise import denoise, fits_memory
from vmonarch_cli.clip.events import (
    ClipDone,
    ClipStarted,
    ClipWarning,
    CompilingKernels,
    Decoding,
    Event,
    FramesDecoded,
    LatentsSaved,
    ModelLoaded,
    ModelLoading,
    Retrying,
    StepDone,
)
from vmonarch_cli.clip.latents import Denoised, remove_latents, save_latents
from vmonarch_cli.clip.preview import Preview, Previews
from vmonarch_cli.clip.record import decoding_facts, make_record, make_timing, overlap_facts, tags_of
from vmonarch_cli.clip.saving import save_as_free
from vmonarch_cli.clip.stopwatch import Stopwatch, peak_memory
from vmonarch_cli.clip.stream import Target, write_decoded
from vmonarch_cli.clip.whole import file_facts
from vmonarch_cli.errors import NonFiniteError
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.media.paths import latents_path, record_path
from vmonarch_cli.media.write import Frames, write_record
from vmonarch_cli.models.single_file import weights_facts
from vmonarch_cli.pipeline import context_parallel, text_limits
from vmonarch_cli.pipeline.call import decode, encode
from vmonarch_cli.pipeline.dense import dense_ready
from vmonarch_cli.pipeline.device import DTYPES, dtype_name
from vmonarch_cli.pipeline.fuse import switch
from vmonarch_cli.pipeline.kernels_ahead import start_kernels, stopped_by_errors
from vmonarch_cli.pipeline.load import load_decoder, load_pipeline
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.pipeline.samplers import set_schedule
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.resolve import with_hub_loras
from vmonarch_cli.plan.setup import AdapterFile
from vmonarch_cli.plan.small_calls import DENSE_BELOW, SmallCalls
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.timing import ClipResult

OnEvent = Callable[[Event], None]


def generate(
    plan: Plan,
    machine: Machine,
    *,
    retry_dense: bool = True,
    finishing: Callable[[], AbstractContextManager[None]] = nullcontext,
    on_event: OnEvent = lambda event: None,
    preview: Preview | None = None,
) -> list[ClipResult]:
    """Make every clip of a plan and its record; clip i has seed ``plan.seed + i`` and does not depend on the others.

    `machine`: what preflight decided for the plan. Latents are saved beside the clip before they are decoded, and
    removed when the clip is written. `finishing` is around what no interrupt cuts short, `preview` may end a run early.
    Raises ModelError before anything is written, NonFiniteError when a clip goes wrong (it is not written, the clips
    before it are), OutputError when a file cannot be written.
    """
    context_parallel.check_tokens(plan.tokens)
    maker = ClipMaker(plan, machine, retry_dense=retry_dense, on_event=on_event, share_clip=True, preview=preview)
    results = []
    for index in range(plan.num_videos):
        denoised = maker.denoise(plan, index)
        if not read_rank().is_main:
            continue
        with finishing():
            plan, denoised = maker.save_as_free(plan, index, denoised)
            on_event(LatentsSaved(index, latents_path(plan.outputs[index])))
        with finishing():
            # The latents hold the name until the clip has it.
            results.append(
                maker.finish(plan, index, denoised, on_written=lambda result: remove_latents(latents_path(result.path)))
            )
        if len(denoised.steps) < plan.steps:
            break
    return results


class ClipMaker:
    """A loaded model, which makes clips one at a time; they share nothing but its weights and compiled kernels.

    A plan given to `denoise` must name the model that was loaded. Attention sessions are kept per preset, so that
    presets take turns without loading or compiling anything again.
    """

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        *,
        retry_dense: bool = True,
        on_event: OnEvent = lambda event: None,
        share_clip: bool = False,
        to_decode: bool = False,
        adapters: Sequence[AdapterFile] = (),
        preview: Preview | None = None,
    ) -> None:
        """Load the plan's model where the machine has it.

        retry_dense: make a clip whose latents are not finite once more, all dense. share_clip: the processes of a
        torchrun make each clip together. to_decode: load no more than `finish` needs. adapters: those of all plans to
        come, the first one's by default. preview: see `Preview`.
        """
        self._on_event, self._retry_dense, self._preview = on_event, retry_dense, preview
        self._machine = machine
        self._device = torch.device(machine.device)
        on_event(ModelLoading(plan.model_source))
        began = time.perf_counter()
        chosen = tuple({adapter.sha256: adapter for adapter in adapters or plan.setup.tuned}.values())
        alone = not to_decode and not (share_clip and read_rank().world > 1)
        self._kernels = start_kernels(plan, machine) if alone else None
        with stopped_by_errors(self._kernels), dense_ready(plan, machine):
            self._pipeline = self._load(plan, None if to_decode else chosen, share_clip)
        self._loras = plan.loras if to_decode else with_hub_loras(plan).loras
        self._scheduler = self._pipeline.scheduler
        self._waited_s, self._asked = 0.0, False
        self._weights = () if to_decode else weights_facts(plan.setup.single_files)
        self._sessions: dict[tuple[Preset, int, SmallCalls], AttentionSession] = {}
        impl = None if to_decode else machine.impl_of(plan.preset)
        self._load_s: float | None = time.perf_counter() - began
        on_event(ModelLoaded(plan.model_source, self._load_s, machine.device_name, machine.dtype, impl))

    def _load(self, plan: Plan, adapters: tuple[AdapterFile, ...] | None, share_clip: bool) -> Any:
        """The plan's pipeline with what this machine decided; without adapters (None) what decodes alone."""
        setup = self._machine.decided(plan)
        where: dict[str, Any] = {
            "device": self._device,
            "dtype": DTYPES[self._machine.dtype],
            "revision": plan.revision,
            "given_pipeline": plan.pipeline,
        }
        if adapters is None:
            return load_decoder(plan.model_source, setup=setup, **where)
        setup = setup.model_copy(update={"tuned": adapters})
        return load_pipeline(plan.model_source, setup=setup, share_clip=share_clip, **where)

    def denoise(self, plan: Plan, index: int) -> Denoised:
        """Latents of clip `index` of the plan.

        Raises NonFiniteError when they are not finite (in a retry as well), TooLargeError when memory runs out.
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
        watch = Stopwatch(self._device)
        save_latents(path, plan, index, denoised, key=key, work=work)
        return replace(denoised, save_s=watch.total())

    def save_as_free(self, plan: Plan, index: int, denoised: Denoised) -> tuple[Plan, Denoised]:
        """Save latents under the plan's name of the clip, or under the next one that is free by now; (the plan with
        that name, the latents with the time that this took).

        See `saving.save_as_free`.
        """
        watch = Stopwatch(self._device)
        plan = save_as_free(plan, index, denoised, lambda sentence: self._on_event(Retrying(index, sentence)))
        return plan, replace(denoised, save_s=watch.total())

    def finish(
        self,
        plan: Plan,
        index: int,
        denoised: Denoised,
        *,
        overwrite: bool | None = None,
        work: Path | None = None,
        on_frames: Callable[[Frames], None] | None = None,
        on_written: Callable[[ClipResult], None] = lambda result: None,
        beside: Beside | None = None,
    ) -> ClipResult:
        """Decode (with less memory where it runs out) while what is decoded is written, and write the record.

        `overwrite`: the plan's own by default; `work`: see `clip_writer`; `on_frames` gets all frames as decoded,
        `on_written` the result before anybody else hears of it. `beside`: the thread that this runs in, while this
        maker may denoise in another one; it gets the events, and memory that runs out is then an error at once.
        """
        path, tell = plan.outputs[index], self._on_event if beside is None else beside.tell
        replaces = plan.overwrite if overwrite is None else overwrite
        tell(Decoding(index))
        parts: list[Frames] = []

        def decoded() -> Iterator[Frames]:
            parts.clear()
            return decode(self._pipeline, denoised.latents, (plan.height, plan.width, plan.num_frames))

        loaded = plan.model_copy(update={"loras": self._loras or plan.loras})
        vae_dtype, shape = dtype_name(self._pipeline.vae.dtype), (plan.num_frames, plan.height, plan.width)
        tags = tags_of(loaded, self._machine, denoised, path, vae_dtype)
        written, retries = write_decoded(
            decoded,
            Target(path, shape, plan.fps, replaces, work, denoised.sound, plan.quality, tags),
            self._pipeline,
            self._device,
            on_part=None if on_frames is None else parts.append,
            on_retry=lambda sentence: tell(Retrying(index, sentence)),
            on_count=lambda done: tell(FramesDecoded(index, done, plan.num_frames)),
            alone=beside is None,
        )
        denoised = replace(denoised, retries=(*denoised.retries, *retries))
        load_s, self._load_s = self._load_s, None  # the first clip paid for it
        timing = make_timing(
            denoised,
            written.decode_s,
            written.write_s,
            peak_memory(self._device),
            load_s=load_s,
            hidden_write_s=written.hidden_s,
            hidden_compile_s=self._compiled_ahead(),
        )
        about = (path, written.pixels, file_facts(path), dtype_name(self._pipeline.vae.dtype), written.sound)
        record = make_record(loaded, denoised, timing, *about)
        record |= decoding_facts(self._machine) | overlap_facts(denoised, beside is not None and beside.shared)
        write_record(record_path(path), record, replaces, work)
        if on_frames is not None:
            on_frames(np.concatenate(parts))
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
        on_written(result)
        tell(ClipDone(result))
        return result

    def _denoise(self, plan: Plan, preset: Preset, index: int) -> Denoised:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        previews = None if self._preview is None else Previews(self._pipeline, self._preview, index)
        watch = Stopwatch(self._device)
        seed = plan.seed + index
        texts = text_limits.watched(
            self._pipeline,
            plan.prompt,
            plan.negative_prompt,
            on_found=lambda part: self._on_event(ClipWarning(index, part.sentence(short=True))),
        )
        with self._swapped(plan, preset, seed) as session, texts as left_out:
            with fits_memory(plan, self._machine):
                texts_of = (plan.prompt, plan.negative_prompt, plan.guidance_scale, plan.model.max_sequence_length)
                embeddings = encode(self._pipeline, *texts_of)
                text_encode_s = watch.lap()
                heard: Any = {"on_step": lambda step: self._on_event(StepDone(index, step)), "previews": previews}
                latents = denoise(self._pipeline, session, embeddings, plan, seed=seed, **heard)
            for sentence in session.warnings:
                self._on_event(ClipWarning(index, sentence))
            return Denoised(
                latents=latents.frames,
                sound=latents.sound if plan.audio else None,
                weights=self._weights,
                seed=seed,
                impl=session.impl or "dense",
                fused=self._machine.fused_of(plan),
                linear_dtype=plan.setup.linear_dtype,
                replayed_calls=session.replayed_calls,
                dense_below=session.small.dense_below if DENSE_BELOW in session.coverage().dense else 0,
                dense_attention=session.dense[0],
                grid=session.grid or plan.grid,
                coverage=session.coverage(),
                steps=session.steps,
                text_encode_s=text_encode_s,
                denoise_s=watch.lap() - session.excluded_s - (0.0 if previews is None else previews.drawn_s),
                preview_s=0.0 if previews is None else previews.seconds,
                excluded_s=session.excluded_s,
                total_s=watch.total(),
                peak_memory_bytes=peak_memory(self._device)[0],
                warm_state_bytes=session.kept_bytes,
                skipped_calls=session.skipped_calls,
                device=self._machine.facts(torch.get_num_threads()),
                dtype=self._machine.dtype,
                warnings=(*(part.sentence() for part in left_out), *session.warnings),
            )

    def _first_call(self) -> None:
        """A kernel variant runs for the first time: what is being compiled in the background is waited for."""
        self._on_event(CompilingKernels())
        if self._kernels is not None:
            began = time.perf_counter()
            self._kernels.wait()
            self._waited_s += time.perf_counter() - began

    def _compiled_ahead(self) -> float:
        """Seconds of compilation that nobody waited for, asked once."""
        asked, self._asked = self._asked, True  # the kernels stay: another thread may be about to wait for them
        return 0.0 if asked or self._kernels is None else max(0.0, self._kernels.seconds - self._waited_s)

    @contextmanager
    def _swapped(self, plan: Plan, preset: Preset, seed: int) -> Iterator[AttentionSession]:
        """The model with the plan's blocks and noise schedule and the preset's attention; `seed`: of the clip."""
        switch(self._pipeline, self._machine.fused_of(plan))
        self._pipeline.scheduler = self._scheduler
        set_schedule(self._pipeline, plan, seed)
        key = (preset, plan.dense_every, small := self._machine.small_of(plan))
        with swapped(
            self._pipeline,
            preset,
            sample_dense_every=plan.dense_every,
            on_first_call=self._first_call,
            session=self._sessions.get(key),
            adapter=None if plan.tuned is None else plan.tuned.layer_name,
            dense=self._machine.dense,
            small=small,
        ) as session:
            self._sessions[key] = session
            try:
                with stopped_by_errors(self._kernels):
                    yield session
            finally:
                session.begin_clip()  # frees the warm state, which decoding may need the room of
