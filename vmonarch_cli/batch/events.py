"""What a batch tells besides the events of its clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmonarch_cli.clip.events import Event


@dataclass(frozen=True)
class ClipFailed:
    """A clip was given up; the batch goes on."""

    clip: int
    """0-based number within the batch."""
    line: int
    path: Path
    sentence: str
    trace: str
    """The traceback, for --debug."""


@dataclass(frozen=True)
class ClipTakenOver:
    """A clip was dropped here: this process was stopped for so long that another one took it over."""

    clip: int
    """0-based number within the batch."""
    line: int
    path: Path
    owner: str
    """Who makes it now, in words; empty when it is done already."""


@dataclass(frozen=True)
class WaitingForOthers:
    """The clips that are left are being made by other processes."""

    count: int
    owners: tuple[str, ...]


@dataclass(frozen=True)
class OverlapDone:
    """The end of a run that decoded clips while it denoised others."""

    seconds: float
    """Wall clock of the whole run, the loading of the model included."""
    hidden_s: float
    """Seconds of decoding and writing that nobody waited for."""


BatchEvent = Event | ClipFailed | ClipTakenOver | WaitingForOthers | OverlapDone
