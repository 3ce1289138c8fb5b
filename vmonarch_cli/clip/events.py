"""What the making of clips tells its caller while it works: plain dataclasses, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmonarch_cli.timing import ClipResult, StepAttention


@dataclass(frozen=True)
class ModelLoading:
    source: str


@dataclass(frozen=True)
class ModelLoaded:
    source: str
    seconds: float
    device: str
    """Name of the device, as in "NVIDIA H100 80GB HBM3" or "CPU (2 threads)"."""
    dtype: str
    impl: str | None
    """What computes attention; None for a model that was loaded to decode alone."""


@dataclass(frozen=True)
class ClipStarted:
    index: int
    count: int
    seed: int
    steps: int


@dataclass(frozen=True)
class CompilingKernels:
    """The first call of a kernel variant begins and may compile for some seconds."""


@dataclass(frozen=True)
class StepDone:
    clip: int
    step: StepAttention


@dataclass(frozen=True)
class LatentsSaved:
    """From here on no failure costs the denoising of a clip."""

    clip: int
    path: Path
    """The latents' file."""


@dataclass(frozen=True)
class Decoding:
    clip: int


@dataclass(frozen=True)
class FramesDecoded:
    """Some more frames of a clip are decoded; it begins anew where decoding does, with less memory."""

    clip: int
    done: int
    """Frames decoded so far."""
    total: int
    """Frames of the clip."""


@dataclass(frozen=True)
class ClipWarning:
    """A clip will not be all that was asked for."""

    clip: int
    sentence: str


@dataclass(frozen=True)
class Retrying:
    """A part of a clip went wrong and is tried in another way."""

    clip: int
    sentence: str


@dataclass(frozen=True)
class ClipDone:
    result: ClipResult


Event = (
    ModelLoading
    | ModelLoaded
    | ClipStarted
    | CompilingKernels
    | StepDone
    | LatentsSaved
    | Decoding
    | FramesDecoded
    | ClipWarning
    | Retrying
    | ClipDone
)
