"""A clip that is decoded and written in a thread of its own, while the thread that owns everything else denoises on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, SimpleQueue

import torch

from vmonarch_cli.clip.events import ClipDone, Decoding, Event
from vmonarch_cli.pipeline.decode_retry import is_out_of_memory
from vmonarch_cli.timing import ClipResult

_POLL_S = 0.5
_CANCEL_S = 5.0
"""Seconds that a cancelled clip has to clean up after itself."""


class _Cancelled(BaseException):
    """Nobody waits for the clip any more."""


class Beside:
    """The one background thread of a run. On a GPU it works in a stream of its own.

    It draws no random numbers and says nothing to anybody: its events wait until the thread that owns it asks, and what
    it raises is raised there.
    """

    def __init__(self, finish: Callable[[Beside], ClipResult], device: torch.device) -> None:
        """`finish` decodes and writes the clip; it gives its events to `tell`."""
        self.shared = False
        """Whether another clip was denoised while it worked."""
        self.seconds = 0.0
        """What it took, once it is over."""
        self._finish = finish
        self._device = device
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._result: ClipResult | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        # A daemon: no interpreter waits at its end for a clip that nobody wants any more; its latents are saved.
        self._thread = threading.Thread(target=self._work, name="clip-beside", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Keep an event for the owner, except that the clip is being decoded and that it is done: the owner says so."""
        if self._cancelled:
            raise _Cancelled
        if not isinstance(event, Decoding | ClipDone):
            self._events.put(event)

    @property
    def is_over(self) -> bool:
        """Whether it has a result, or has failed."""
        return not self._thread.is_alive()

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether it failed where it may succeed with the machine for itself."""
        return self.is_over and self._error is not None and is_out_of_memory(self._error)

    def events(self, *, wait: bool) -> Iterator[Event]:
        """What it has told so far, each event once; with `wait` all that it tells until it is over."""
        while True:
            try:
                event = self._events.get(block=wait, timeout=_POLL_S if wait else None)
            except Empty:
                if wait and not self.is_over:
                    continue
                return
            if event is None:
                self._thread.join()
                return
            yield event

    def result(self) -> ClipResult:
        """The clip, once it is over; raises what it raised."""
        self._thread.join()
        if self._result is None:
            raise self._error or RuntimeError("the clip's thread ended without a word")
        return self._result

    def cancel(self) -> None:
        """End it at its next part of frames, if it comes soon; nothing half-written is left then."""
        self._cancelled = True
        self._thread.join(_CANCEL_S)

    def _work(self) -> None:
        began = time.perf_counter()
        try:
            with _own_stream(self._device):
                self._result = self._finish(self)
        except BaseException as error:
            # The traceback of a failed attempt keeps its tensors alive, and the next one needs their room.
            self._error = error.with_traceback(None) if is_out_of_memory(error) else error
        finally:
            self.seconds = time.perf_counter() - began
            self._events.put(None)


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Work of this thread in a stream that no other one uses; nothing to do on a CPU."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream(device))
