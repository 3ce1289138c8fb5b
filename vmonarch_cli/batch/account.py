"""What is said of the clips of a batch, in its manifest and as events; one thread of a process says all of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from vmonarch_cli.batch.claims import Claim, ClaimLost, Claims
from vmonarch_cli.batch.clips import PlannedClip
from vmonarch_cli.batch.events import BatchEvent, ClipFailed, ClipTakenOver
from vmonarch_cli.batch.folder import Batch
from vmonarch_cli.batch.manifest import DENOISING, DONE, FAILED, ManifestEntry, happened
from vmonarch_cli.clip.latents import remove_latents
from vmonarch_cli.errors import EXIT_CLIP_FAILED, DeviceError, ModelError, OutputError, VmonarchError
from vmonarch_cli.media.paths import latents_path, record_path
from vmonarch_cli.pipeline.decode_retry import is_out_of_memory
from vmonarch_cli.text import first_line
from vmonarch_cli.timing import ClipResult

OnEvent = Callable[[BatchEvent], None]


class _GpuLost(DeviceError):
    """It ends the run, whichever clip met it."""


class Account:
    """Reads and writes the manifest for a run that has `claims` in the batch's folder."""

    def __init__(self, batch: Batch, claims: Claims, on_event: OnEvent) -> None:
        self._batch = batch
        self._claims = claims
        self._on_event = on_event
        self._position = {clip.key: index for index, clip in enumerate(batch.clips)}

    def position(self, clip: PlannedClip | None) -> int:
        """0-based number of a clip within the batch."""
        return self._position[clip.key] if clip else 0

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

    def note(self, event: str, clip: PlannedClip, claim: Claim, **facts: object) -> None:
        """Say something of a clip in the manifest; ClaimLost when it is another process's by now."""
        manifest = self._batch.manifest
        with manifest.locked():  # so that nobody stops between the question and the line
            if not claim.is_held:
                raise ClaimLost
            manifest.append_locked(happened(event, clip.key, **facts))

    def done(self, result: ClipResult, clip: PlannedClip, claim: Claim) -> None:
        """A clip and its record are in their places."""
        self.note("done", clip, claim, retries=result.record["retries"], seconds=result.timing.total_s)
        remove_latents(latents_path(clip.path))

    def failed(self, clip: PlannedClip, claim: Claim, error: Exception) -> None:
        """A clip is given up; DeviceError where the GPU is lost with it."""
        sentence = error.message if isinstance(error, VmonarchError) else _sentence(error)
        self.note("failed", clip, claim, error=sentence)
        trace = "".join(traceback.format_exception(error))
        self._on_event(ClipFailed(self.position(clip), clip.line, clip.path, sentence, trace))
        if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
            raise _GpuLost(
                f"{sentence}; after that the GPU serves no other clip of this process: the same command goes on",
                EXIT_CLIP_FAILED,
            ) from error

    @contextmanager
    def answering(self, clip: PlannedClip, claim: Claim) -> Iterator[None]:
        """What a clip dies of within the block is said of it, and the others are still to be made; what no clip can do
        without is raised.
        """
        try:
            try:
                yield
            except (OutputError, ModelError, _GpuLost):
                if not claim.is_held:
                    raise ClaimLost from None
                raise
            except KeyboardInterrupt:
                with suppress(ClaimLost):
                    if self.entries()[clip.key].status == DENOISING:
                        self.note("dropped", clip, claim)
                raise
            except ClaimLost:
                raise
            except Exception as error:
                self.failed(clip, claim, error)
        except ClaimLost:
            owner = self._claims.owner(clip.key)
            self._on_event(ClipTakenOver(self.position(clip), clip.line, clip.path, owner))


def _sentence(error: Exception) -> str:
    if is_out_of_memory(error):
        return "decoding ran out of memory, in every way that it was tried: choose a smaller size or fewer frames"
    return f"unexpected {type(error).__name__}: {first_line(error, 'no message')}"
