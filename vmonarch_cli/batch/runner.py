"""Make the clips of a batch, one after the other, together with any other process that works in the same folder.

A clip goes claimed, started, denoised (latents saved), done (clip and record written, latents removed); each of these
is in the manifest before the next begins. Whatever ends the process between two of them, the next one goes on from the
last. A clip that cannot be made is failed and the batch goes on; what no clip can do without (the disk, the manifest,
the GPU) ends the run.

With overlap a clip whose latents are saved is decoded and written beside the next one's denoising; see `beside.py`.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

from vmonarch_cli.batch.account import Account, OnEvent
from vmonarch_cli.batch.beside import Overlapping
from vmonarch_cli.batch.claims import Claim, Claims
from vmonarch_cli.batch.clips import PlannedClip, loaded_as
from vmonarch_cli.batch.events import OverlapDone, WaitingForOthers
from vmonarch_cli.batch.folder import Batch
from vmonarch_cli.batch.manifest import DONE, FAILED, ManifestEntry
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
from vmonarch_cli.errors import EXIT_CLIP_FAILED, InputError, OutputError
from vmonarch_cli.media.paths import latents_path, record_path
from vmonarch_cli.pipeline.overlap import needs_vae
from vmonarch_cli.pipeline.preflight import Machine

_POLL_S = 0.5


@dataclass(frozen=True)
class Limits:
    """max_failures: end the run after that many failed clips, None for never.

    overlap: decode and write a clip while the next one is denoised; of `max_failures` clips the last one's failure is
    then known when the next is being made already, which is finished.
    """

    retry_dense: bool = True
    max_failures: int | None = None
    overlap: bool = False


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
        return Account(batch, claims, on_event).outcome()


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
        self._account = Account(batch, claims, on_event)
        self._overlapping = Overlapping(
            limits.overlap, machine.device, self._account, interrupts, self._finish, on_event
        )

    def all(self) -> None:
        began = time.perf_counter()
        self._sweep()
        try:
            self._all_due()
            self._overlapping.end()
        except BaseException as error:
            self._overlapping.end(error)
            raise
        if self._limits.overlap and self._maker is not None:
            self._on_event(OverlapDone(time.perf_counter() - began, self._overlapping.hidden_s))

    def _all_due(self) -> None:
        waiting = False
        while due := self._due():
            made = 0
            for clip in due:
                if self._too_many_failures():
                    return
                made += self._make_if_free(clip)
            self._overlapping.end()
            if made:
                waiting = False
                continue
            if not waiting:
                waiting = True
                owners = {self._claims.owner(clip.key) for clip in due} - {""}
                self._on_event(WaitingForOthers(len(due), tuple(sorted(owners))))
            time.sleep(_POLL_S)

    def _due(self) -> list[PlannedClip]:
        entries = self._account.entries()
        return [clip for clip in self._batch.in_running_order() if _is_due(entries.get(clip.key))]

    def _sweep(self) -> None:
        """Remove what processes that died left of clips that are done."""
        entries = self._account.entries()
        for clip in self._batch.clips:
            self._claims.sweep(clip.key)
            if entries[clip.key].status == DONE and clip.path.exists():
                remove_latents(latents_path(clip.path))

    def _too_many_failures(self) -> bool:
        if self._limits.max_failures is None:
            return False
        before = self._batch.before
        failed = [key for key, entry in self._account.entries().items() if entry.status == FAILED]
        return sum(before[key].status != FAILED for key in failed) >= self._limits.max_failures

    def _make_if_free(self, clip: PlannedClip) -> bool:
        claim = self._claims.take(clip.key)
        if claim is None:
            return False
        with ExitStack() as held:
            held.enter_context(claim)
            # Only now nobody else changes its state: the one before may just have finished it.
            entry = self._account.entries()[clip.key]
            if _is_due(entry):
                with self._account.answering(clip, claim):
                    self._make(clip, entry, claim, held)
        return True

    def _make(self, clip: PlannedClip, entry: ManifestEntry, claim: Claim, held: ExitStack) -> None:
        """Make a clip, or hand it over with what is `held` for it."""
        self._clip = clip
        if not entry.is_asked_again and is_clip_of(clip.path, clip.plan):
            # The end of the manifest was torn off with what this clip's maker wrote of it.
            self._account.note("done", clip, claim)
            remove_latents(latents_path(clip.path))
            return
        obstacle = _obstacle(clip, entry)
        if obstacle is not None:
            self._account.failed(clip, claim, InputError(f"{obstacle}: move it away, then --retry-failed"))
            return
        maker = self._loaded(clip)
        denoised = self._saved(clip, claim) or self._denoise(clip, maker, claim)
        self._overlapping.end()
        with self._interrupts.finishing():
            if self._overlapping.on:
                self._overlapping.hand_over(clip, claim, held, maker, denoised)
            else:
                self._finish(clip, claim, maker, denoised)

    def _finish(self, clip: PlannedClip, claim: Claim, maker: ClipMaker, denoised: Denoised) -> None:
        current, self._clip = self._clip, clip
        maker.finish(
            clip.plan,
            0,
            denoised,
            overwrite=True,
            work=claim.work,
            on_written=lambda result: self._account.done(result, clip, claim),
        )
        self._clip = current

    def _saved(self, clip: PlannedClip, claim: Claim) -> Denoised | None:
        """Latents that a run before this one left, if they are whole and this clip's."""
        path = latents_path(clip.path)
        if not path.exists():
            return None
        try:
            saved = load_latents(path)
        except InputError as error:
            self._on_event(Retrying(self._account.position(clip), f"{error.message}: denoising again"))
            return None
        if saved.key != clip.key:
            raise InputError(f"{path} holds another run's latents: decode them or move them away, then --retry-failed")
        self._account.note("decoding", clip, claim)
        return saved.denoised

    def _denoise(self, clip: PlannedClip, maker: ClipMaker, claim: Claim) -> Denoised:
        if needs_vae(clip.plan):
            self._overlapping.end()
        self._account.note("started", clip, claim)
        denoised = self._overlapping.denoise(clip, maker)
        with self._interrupts.finishing():
            path = latents_path(clip.path)
            denoised = maker.save(path, clip.plan, 0, denoised, key=clip.key, work=claim.work)
            self._account.note("denoised", clip, claim, retries=list(denoised.retries))
        return denoised

    def _loaded(self, clip: PlannedClip) -> ClipMaker:
        kind = loaded_as(clip.plan)
        if self._maker is None or self._loaded_as != kind:
            self._overlapping.end()
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

    def _relay(self, event: Event) -> None:
        """Pass an event of the current clip's plan on, as of that clip of the batch."""
        position = self._account.position(self._clip)
        match event:
            case ClipStarted():
                event = replace(event, index=position, count=len(self._batch.clips))
            case StepDone() | Decoding() | FramesDecoded() | ClipWarning() | Retrying():
                event = replace(event, clip=position)
            case ClipDone(result=result):
                event = ClipDone(replace(result, index=position))
        self._on_event(event)
        if isinstance(event, StepDone):
            self._overlapping.after_step(event)


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
