"""The clip of a batch that is decoded and written while the next one is denoised: what becomes of it, and when."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from vmonarch_cli.batch.account import Account, OnEvent
from vmonarch_cli.batch.claims import Claim
from vmonarch_cli.batch.clips import PlannedClip
from vmonarch_cli.clip.beside import Beside
from vmonarch_cli.clip.events import ClipDone, Decoding, Event, FramesDecoded, Retrying, StepDone
from vmonarch_cli.clip.interrupts import Interrupts
from vmonarch_cli.clip.latents import Denoised
from vmonarch_cli.clip.make import ClipMaker
from vmonarch_cli.errors import TooLargeError

Finish = Callable[[PlannedClip, Claim, ClipMaker, Denoised], None]


@dataclass(frozen=True)
class _Handed:
    """A clip whose latents are saved. `held` keeps its claim, `denoised` the latents in the machine's own memory."""

    clip: PlannedClip
    claim: Claim
    held: ExitStack
    maker: ClipMaker
    denoised: Denoised
    thread: Beside


class Overlapping:
    """One clip at most is finished in a thread, which only makes its files. The manifest, the claim and the events of
    that clip stay with the thread that denoises: it looks after each step whether the clip is over, and waits for it
    before the next is handed over, so that clips end in the order in which they began.
    """

    def __init__(
        self,
        on: bool,
        device: str,
        account: Account,
        interrupts: Interrupts,
        finish: Finish,
        on_event: OnEvent,
    ) -> None:
        """`finish` decodes and writes a clip in the calling thread."""
        self.on = on
        self.hidden_s = 0.0
        """Seconds of decoding and writing so far that nobody waited for."""
        self._device = torch.device(device)
        self._account = account
        self._interrupts = interrupts
        self._finish = finish
        self._on_event = on_event
        self._handed: _Handed | None = None
        self._was_busy = False
        self._steps: list[int] = []

    def hand_over(self, clip: PlannedClip, claim: Claim, held: ExitStack, maker: ClipMaker, denoised: Denoised) -> None:
        """Begin to decode and write a clip. What is `held`, its claim, goes over with it. `end` was called before."""
        # From there they come to the thread's own stream: on the GPU the denoiser might be given their memory.
        sound = None if denoised.sound is None else denoised.sound.cpu()
        denoised = replace(denoised, latents=denoised.latents.cpu(), sound=sound)
        thread = Beside(
            lambda beside: maker.finish(clip.plan, 0, denoised, overwrite=True, work=claim.work, beside=beside),
            self._device,
        )
        self._handed = _Handed(clip, claim, held.pop_all(), maker, denoised, thread)

    def denoise(self, clip: PlannedClip, maker: ClipMaker) -> Denoised:
        """Latents of a clip. Where memory runs out while another clip is decoded, they are made again without that."""
        handed, self._steps = self._handed, []
        self._was_busy = handed is not None
        if handed is None:
            return maker.denoise(clip.plan, 0)
        handed.thread.shared = True
        try:
            denoised = maker.denoise(clip.plan, 0)
            return replace(denoised, steps_beside_decoding=tuple(self._steps))
        except TooLargeError:
            if not self._was_busy:
                raise
            # What the attempt holds is freed at the end of this block.
        self._was_busy = False
        self.end()
        retry = self._alone_from_here(clip, "denoise", "denoising")
        denoised = maker.denoise(clip.plan, 0)
        return replace(denoised, retries=(retry, *denoised.retries))

    def after_step(self, event: StepDone) -> None:
        """A step of the clip that is being denoised is over: pass on what the one beside has told, and its end. Where
        its memory ran out, its end waits until the machine is free.
        """
        if event.step.index == 0:
            self._steps.clear()
        if self._was_busy:
            self._steps.append(event.step.index)
        if self._handed is None:
            return
        thread = self._handed.thread
        for told in thread.events(wait=False):
            if not isinstance(told, FramesDecoded):  # the clip that is being denoised is what the user sees
                self._tell(told, self._handed.clip)
        if thread.is_over and not thread.ran_out_of_memory:
            self.end()
        self._was_busy = not thread.is_over

    def end(self, stopped_by: BaseException | None = None) -> None:
        """Wait for the clip beside, if there is one, and say what became of it.

        stopped_by: what ends the run; a clip that is not done then stays as it is, with its latents saved.
        """
        handed, self._handed = self._handed, None
        if handed is None:
            return
        thread = handed.thread
        with handed.held, self._account.answering(handed.clip, handed.claim):
            try:
                with self._interrupts.finishing(stopped_by):
                    self._follow(handed)
                    if thread.ran_out_of_memory and stopped_by is None:
                        self._finish_alone(handed)
                        return
                    result = thread.result()
                    self._account.done(result, handed.clip, handed.claim)
                    self._on_event(ClipDone(replace(result, index=self._account.position(handed.clip))))
            except KeyboardInterrupt:
                thread.cancel()
                raise
            except Exception:
                if stopped_by is None:
                    raise

    def _follow(self, handed: _Handed) -> None:
        """Pass on what the clip beside tells until it is over."""
        began = time.perf_counter()
        if not handed.thread.is_over:
            self._tell(Decoding(0), handed.clip)
        for event in handed.thread.events(wait=True):
            self._tell(event, handed.clip)
        self.hidden_s += max(0.0, handed.thread.seconds - (time.perf_counter() - began))

    def _finish_alone(self, handed: _Handed) -> None:
        """Decode once more with the machine for itself, and with less memory where that does not help."""
        denoised = handed.denoised
        if handed.thread.shared:
            retry = self._alone_from_here(handed.clip, "decode", "decoding")
            denoised = replace(denoised, retries=(*denoised.retries, retry))
        self._finish(handed.clip, handed.claim, handed.maker, denoised)

    def _alone_from_here(self, clip: PlannedClip, stage: str, words: str) -> dict[str, str]:
        """Memory ran out where two clips shared it: no two do any more. What a record says of the retry."""
        self.on = False
        self._tell(Retrying(0, f"{words} ran out of memory beside another clip: clips are made one by one now"), clip)
        return {"stage": stage, "reason": "out of memory", "with": "nothing beside it"}

    def _tell(self, event: Event, clip: PlannedClip) -> None:
        """Pass an event of a clip's plan on, as of that clip of the batch."""
        match event:
            case Decoding() | FramesDecoded() | Retrying():
                event = replace(event, clip=self._account.position(clip))
        self._on_event(event)
