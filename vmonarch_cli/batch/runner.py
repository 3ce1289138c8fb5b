"""Make the clips of a batch, one after the other, together with any other process that works in the same folder.

A clip goes claimed, started, denoised (latents saved), done (clip and record written, latents removed); each of these
is in the manifest before the next begins. Whatever ends the process between two of them, the next one goes on from the
last. A clip that cannot be made is failed and the batch goes on; what no clip can do without (the disk, the manifest,
the GPU) ends the run.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from vmonarch_cli.batch.claims import Claim, ClaimLost, Claims
from vmonarch_cli.batch.clips import PlannedClip, loaded_as
from vmonarch_cli.batch.events import BatchEvent, ClipFailed, ClipTakenOver, WaitingForOthers
from vmonarch_cli.batch.folder import Batch
from vmonarch_cli.batch.manifest import DENOISING, DONE, FAILED, ManifestEntry, happened
from vmonarch_cli.clip.events import (
    ClipDone,
    ClipStarted,
    ClipWarning,
    Decoding,
    Event,
    FramesDecoded,
    Retrying,
    StepDone,
)
from vmonarch_cli.clip.interrupts import Interrupts
from vmonarch_cli.clip.latents import Denoised, load_latents, remove_latents
from vmonarch_cli.clip.make import ClipMaker
from vmonarch_cli.clip.whole import is_clip_of
from vmonarch_cli.errors import EXIT_CLIP_FAILED, DeviceError, InputError, ModelError, OutputError, VmonarchError
from vmonarch_cli.media.paths import latents_path, record_path
from vmonarch_cli.pipeline.decode_retry import is_out_of_memory
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.text import first_line
from vmonarch_cli.timing import ClipResult

OnEvent = Callable[[BatchEvent], None]
_POLL_S = 0.5


@dataclass(frozen=True)
class Limits:
    """max_failures: end the run after that many failed clips, None for never."""

    retry_dense: bool = True
    max_failures: int | None = None


def run_batch(
    batch: Batch,
    machine: Machine,
    limits: Limits,
    interrupts: Interrupts,
    *,
    on_event: OnEvent = lambda event: None,
) -> dict[str, ManifestEntry]:
    """Make every clip that is due; the manifest's entries of the batch when none is left to make.

    `machine`: what preflight decided for all its clips. The model is loaded when the first clip needs it. A clip that
    another process is making is waited for, and made here should that process die. Raises OutputError when something
    cannot be written (with exit code 1), DeviceError when the GPU fails, ModelError when the model does not load,
    Interrupted; nothing is half-written then.
    """
    with Claims(batch.folder) as claims:
        run = _BatchRun(batch, machine, limits, interrupts, claims, on_event)
        try:
            run.all()
        except OutputError as error:
            raise OutputError(
                f"{error.message}; the batch stopped, nothing is half-written, and the same command goes on from here",
                EXIT_CLIP_FAILED,
            ) from error
        return run.outcome()


class _BatchRun:
    def __init__(
        self,
        batch: Batch,
        machine: Machine,
        limits: Limits,
        interrupts: Interrupts,
        claims: Claims,
        on_event: OnEvent,
    ) -> None:
        self._batch = batch
        self._machine = machine
        self._limits = limits
        self._interrupts = interrupts
        self._claims = claims
        self._on_event = on_event
        self._maker: ClipMaker | None = None
        self._loaded_as: tuple[str, ...] = ()
        self._clip: PlannedClip | None = None
        self._position = {clip.key: index for index, clip in enumerate(batch.clips)}

    def entries(self) -> dict[str, ManifestEntry]:
        """What the manifest says now of the clips of this batch, by line; OutputError when it lost some of them."""
        entries = self._batch.manifest.read()
        lost = sum(clip.key not in entries for clip in self._batch.clips)
        if lost:
            raise OutputError(
                f"manifest {self._batch.manifest.path} was cut or replaced while the batch ran: {lost} of the "
                f"{len(self._batch.clips)} clips are no longer in it"
            )
        return {clip.key: entries[clip.key] for clip in self._batch.clips}

    def outcome(self) -> dict[str, ManifestEntry]:
        """The entries at the end; a clip that is done and not there has failed."""
        entries = self.entries()
        for clip in self._batch.clips:
            entry = entries[clip.key]
            if entry.status == DONE and not (clip.path.exists() and record_path(clip.path).exists()):
                entry.status, entry.error = FAILED, "it was made, and its file was removed while the batch ran"
        return entries

    def all(self) -> None:
        self._sweep()
        waiting = False
        while due := self._due():
            made = 0
            for clip in due:
                if self._too_many_failures():
                    return
                made += self._make_if_free(clip)
            if made:
                waiting = False
                continue
            if not waiting:
                waiting = True
                owners = {self._claims.owner(clip.key) for clip in due} - {""}
                self._on_event(WaitingForOthers(len(due), tuple(sorted(owners))))
            time.sleep(_POLL_S)

    def _due(self) -> list[PlannedClip]:
        entries = self.entries()
        return [clip for clip in self._batch.in_running_order() if _is_due(entries.get(clip.key))]

    def _sweep(self) -> None:
        """Remove what processes that died left of clips that are done."""
        entries = self.entries()
        for clip in self._batch.clips:
            self._claims.sweep(clip.key)
            if entries[clip.key].status == DONE and clip.path.exists():
                remove_latents(latents_path(clip.path))

    def _too_many_failures(self) -> bool:
        if self._limits.max_failures is None:
            return False
        before = self._batch.before
        failed = [key for key, entry in self.entries().items() if entry.status == FAILED]
        return sum(before[key].status != FAILED for key in failed) >= self._limits.max_failures

    def _make_if_free(self, clip: PlannedClip) -> bool:
        claim = self._claims.take(clip.key)
        if claim is None:
            return False
        with claim:
            # Only now nobody else changes its state: the one before may just have finished it.
            entry = self.entries()[clip.key]
            if _is_due(entry):
                try:
                    self._make(clip, entry, claim)
                except ClaimLost:
                    owner = self._claims.owner(clip.key)
                    self._on_event(ClipTakenOver(self._position[clip.key], clip.line, clip.path, owner))
        return True

    def _make(self, clip: PlannedClip, entry: ManifestEntry, claim: Claim) -> None:
        self._clip = clip
        if not entry.is_asked_again and is_clip_of(clip.path, clip.plan):
            # The end of the manifest was torn off with what this clip's maker wrote of it.
            self._note("done", clip, claim)
            remove_latents(latents_path(clip.path))
            return
        obstacle = _obstacle(clip, entry)
        if obstacle is not None:
            self._fail(clip, claim, InputError(f"{obstacle}: move it away, then --retry-failed"))
            return
        try:
            maker = self._loaded(clip)
            denoised = self._saved(clip, claim) or self._denoise(clip, maker, claim)
            with self._interrupts.finishing():
                maker.finish(
                    clip.plan,
                    0,
                    denoised,
                    overwrite=True,
                    work=claim.work,
                    on_written=lambda result: self._note_done(result, clip, claim),
                )
        except (OutputError, ModelError):
            if not claim.is_held:
                raise ClaimLost from None
            raise
        except KeyboardInterrupt:
            with suppress(ClaimLost):
                if self.entries()[clip.key].status == DENOISING:
                    self._note("dropped", clip, claim)
            raise
        except ClaimLost:
            raise
        except Exception as error:
            # Whatever one clip dies of, the others are still to be made.
            self._fail(clip, claim, error)

    def _note_done(self, result: ClipResult, clip: PlannedClip, claim: Claim) -> None:
        self._note("done", clip, claim, retries=result.record["retries"], seconds=result.timing.total_s)
        remove_latents(latents_path(clip.path))

    def _saved(self, clip: PlannedClip, claim: Claim) -> Denoised | None:
        """Latents that a run before this one left, if they are whole and this clip's."""
        path = latents_path(clip.path)
        if not path.exists():
            return None
        try:
            saved = load_latents(path)
        except InputError as error:
            self._on_event(Retrying(self._position[clip.key], f"{error.message}: denoising again"))
            return None
        if saved.key != clip.key:
            raise InputError(f"{path} holds another run's latents: decode them or move them away, then --retry-failed")
        self._note("decoding", clip, claim)
        return saved.denoised

    def _denoise(self, clip: PlannedClip, maker: ClipMaker, claim: Claim) -> Denoised:
        self._note("started", clip, claim)
        denoised = maker.denoise(clip.plan, 0)
        with self._interrupts.finishing():
            path = latents_path(clip.path)
            denoised = maker.save(path, clip.plan, 0, denoised, key=clip.key, work=claim.work)
            self._note("denoised", clip, claim, retries=list(denoised.retries))
        return denoised

    def _loaded(self, clip: PlannedClip) -> ClipMaker:
        kind = loaded_as(clip.plan)
        if self._maker is None or self._loaded_as != kind:
            self._maker = None  # the pipeline before goes first: both may not fit
            self._loaded_as = kind
            self._maker = ClipMaker(
                clip.plan,
                self._machine,
                retry_dense=self._limits.retry_dense,
                on_event=self._relay,
                adapters=[adapter for other in self._batch.clips for adapter in other.plan.setup.tuned],
            )
        return self._maker

    def _note(self, event: str, clip: PlannedClip, claim: Claim, **facts: object) -> None:
        """Say something of a clip in the manifest; ClaimLost when it is another process's by now."""
        manifest = self._batch.manifest
        with manifest.locked():  # so that nobody stops between the question and the line
            if not claim.is_held:
                raise ClaimLost
            manifest.append_locked(happened(event, clip.key, **facts))

    def _fail(self, clip: PlannedClip, claim: Claim, error: Exception) -> None:
        sentence = error.message if isinstance(error, VmonarchError) else _sentence(error)
        self._note("failed", clip, claim, error=sentence)
        trace = "".join(traceback.format_exception(error))
        self._on_event(ClipFailed(self._position[clip.key], clip.line, clip.path, sentence, trace))
        if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
            raise DeviceError(
                f"{sentence}; after that the GPU serves no other clip of this process: the same command goes on",
                EXIT_CLIP_FAILED,
            ) from error

    def _relay(self, event: Event) -> None:
        """Pass an event of the current clip's plan on, as of that clip of the batch."""
        position = self._position[self._clip.key] if self._clip else 0
        match event:
            case ClipStarted():
                event = replace(event, index=position, count=len(self._batch.clips))
            case StepDone() | Decoding() | FramesDecoded() | ClipWarning() | Retrying():
                event = replace(event, clip=position)
            case ClipDone(result=result):
                event = ClipDone(replace(result, index=position))
        self._on_event(event)


def _is_due(entry: ManifestEntry | None) -> bool:
    return entry is not None and entry.status not in (DONE, FAILED)


def _obstacle(clip: PlannedClip, entry: ManifestEntry) -> str | None:
    """What stands in the way of a clip's file or record; None where a file of the batch's own may be replaced."""
    record = record_path(clip.path)
    if clip.path.exists() and not entry.owns_name:
        return f"{clip.path} was made by something else"
    if clip.path.exists() and clip.path.is_dir() != (clip.path.suffix.lower() == ".png"):
        return f"{clip.path} is {'a folder' if clip.path.is_dir() else 'no folder'}, which its clip cannot replace"
    if record.is_dir():
        return f"{record} is a folder, which the record of {clip.path.name} cannot replace"
    return None


def _sentence(error: Exception) -> str:
    if is_out_of_memory(error):
        return "decoding ran out of memory, in every way that it was tried: choose a smaller size or fewer frames"
    return f"unexpected {type(error).__name__}: {first_line(error, 'no message')}"
