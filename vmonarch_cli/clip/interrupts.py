"""Ctrl-C and SIGTERM: at once while a clip is being denoised, after the file while one is being written."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

FIRST = "stopping as soon as this clip is written; a second signal stops at once"
"""What a first signal is answered with while a clip is being finished."""
_SHELL = 128
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal to stop; `exit_code` is the shell's convention for it (130 for SIGINT, 143 for SIGTERM)."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = _SHELL + number


class Interrupts:
    """Raises Interrupted where a signal may stop the work, and holds it back where something is being finished."""

    def __init__(self, on_first: Callable[[str], None] = lambda sentence: None) -> None:
        """`on_first` gets a sentence when a signal is held back."""
        self._on_first = on_first
        self._finishing = False
        self._waiting: int | None = None

    @contextmanager
    def finishing(self, stopped_by: BaseException | None = None) -> Iterator[None]:
        """A first signal within the block is raised at its end, a second one at once.

        stopped_by: what has stopped the work before; where that was a signal, it is the first one.
        """
        self._finishing = True
        if isinstance(stopped_by, Interrupted):
            self._hold_back(stopped_by.exit_code - _SHELL)
        try:
            yield
        except Exception:
            # Ctrl-C reaches ffmpeg too, which then fails: the signal is the reason.
            self._finishing = False
            self._raise_waiting()
            raise
        finally:
            self._finishing = False
        self._raise_waiting()

    def _raise_waiting(self) -> None:
        if self._waiting is not None:
            raise Interrupted(self._waiting) from None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._finishing and self._waiting is None:
            self._hold_back(number)
        else:
            raise Interrupted(number)

    def _hold_back(self, number: int) -> None:
        self._waiting = number
        with suppress(RuntimeError, OSError):  # the signal came while the main program was printing
            self._on_first(FIRST)


@contextmanager
def stoppable(on_first: Callable[[str], None] = lambda sentence: None) -> Iterator[Interrupts]:
    """Take over both signals inside the block (in the main thread; elsewhere Python has no say in them).

    `on_first`: see `Interrupts`.
    """
    interrupts = Interrupts(on_first)
    before = {}
    with suppress(ValueError):
        before = {number: signal.signal(number, interrupts._on_signal) for number in _SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
