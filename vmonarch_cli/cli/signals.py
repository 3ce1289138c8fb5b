"""Ctrl-C from the first import on: remembered, so that whatever a library makes of it is known for what it is."""

from __future__ import annotations

import signal
from contextlib import suppress
from types import FrameType

MESSAGE = "interrupted: no clip was left half-written"
EXIT_CODE = 128 + signal.SIGINT
_seen = False


def watch() -> None:
    """Take over SIGINT (in the main thread; elsewhere Python has no say in it)."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, _on_interrupt)


def seen() -> bool:
    """Whether Ctrl-C came; libraries turn it into errors of their own when it meets them in an import."""
    return _seen


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
