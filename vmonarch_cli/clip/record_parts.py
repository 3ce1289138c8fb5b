"""The parts of a clip's record, each with the values that it may have, and the hashes of the files that a clip is made
from. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vmonarch_cli.models.lora_facts import LoraFacts
from vmonarch_cli.models.lora_files import SETTINGS_FILE
from vmonarch_cli.plan.plan import GivenFile
from vmonarch_cli.timing import ClipTiming, StepAttention
from vmonarch_cli.untrusted.shapes import short_value

_MAX_SIDE, _MAX_FRAMES, _MAX_FPS, _MAX_RATE = 1 << 16, 1 << 20, 1000, 1 << 20


def _simple(value: Any) -> Any:
    for item in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(item, str | int | float | bool | None):
            raise ValueError(
                f"takes a text, a number, true, false, nothing or a list of these, got {short_value(item)}"
            )
    return value


Simple = Annotated[Any, AfterValidator(_simple)]
"""A value of a setting: no table, and no list in a list."""


class Part(BaseModel):
    """A table of a record: no conversions, nothing infinite; fields of other versions are left out."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class FramesFacts(Part):
    """The frames as they were decoded: count, pixels, frames per second, hash of every pixel."""

    count: int = Field(ge=1, le=_MAX_FRAMES)
    height: int = Field(ge=1, le=_MAX_SIDE)
    width: int = Field(ge=1, le=_MAX_SIDE)
    fps: int = Field(ge=1, le=_MAX_FPS)
    sha256: str | None = None


class FileFacts(Part):
    """The clip's file as it was written: bytes, and their hash."""

    bytes: int = Field(ge=0)
    sha256: str


class AudioFacts(Part):
    """The clip's sound: the file that holds it, samples a second, samples of each channel, hash of all of them."""

    file: str
    rate: int = Field(ge=1, le=_MAX_RATE)
    samples: int = Field(ge=0)
    channels: int = Field(ge=1, le=64)
    sha256: str

    @property
    def words(self) -> str:
        """'16,000 Hz, 2 channels, 1.25 s'."""
        channels = "1 channel" if self.channels == 1 else f"{self.channels} channels"
        return f"{self.rate:,} Hz, {channels}, {self.samples / self.rate:.2f} s"


class ReadFile(Part):
    """A file that a clip was made from, what it was for, and the hash of its content."""

    part: str
    """A component of the model, "image", "last image" or "video"."""
    file: str
    sha256: str


class LoraHashes(Part):
    """A LoRA's file, and the hashes of it and of peft's settings; None in records of earlier versions."""

    name: str
    sha256: str | None = None
    settings_sha256: str | None = None


class Setting(Part):
    """A resolved setting, and where it came from."""

    value: Simple
    origin: str


class PresetFacts(Part):
    """What pages and tables show of a preset; `record.plan_again` reads the whole of it."""

    model_config = ConfigDict(extra="allow")

    name: str
    attention: str = "monarch"


class ModelFacts(Part):
    """Which model it was."""

    source: str
    """The folder or the hub id that the weights came from."""
    alias: str
    title: str
    hub_id: str | None = None
    vae_float32: bool = False


class DeviceFacts(Part):
    """What it ran on."""

    type: str
    name: str


class FlopsFacts(Part):
    """Self-attention operations of the clip."""

    planned: int | None = Field(default=None, ge=0)
    dense: int | None = Field(default=None, ge=0)


class StepFacts(Part):
    """One denoising step, in seconds; see `timing.StepAttention`."""

    index: int | None = None
    total: int | None = None
    sigma: float | None = None
    step_s: float | None = None
    attention_s: float | None = None
    calls: int | None = None
    structured_calls: int | None = None
    dense_call_s: float | None = None
    dense_call_by: str | None = None
    dense_s: float | None = None
    sampled_attention_s: float | None = None
    error: float | None = None
    first_call_s: float | None = None


class TimingFacts(Part):
    """Where the clip's time went, in seconds; see `timing.ClipTiming`."""

    text_encode_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    write_s: float | None = None
    total_s: float | None = None
    attention_s: float | None = None
    error: float | None = None
    steps: list[StepFacts] = []

    @property
    def end_to_end_s(self) -> float | None:
        """Text, denoising, decoding and writing."""
        parts = [self.text_encode_s, self.denoise_s, self.decode_s, self.write_s]
        return None if None in parts else sum(part for part in parts if part is not None)

    @property
    def whole(self) -> ClipTiming | None:
        """The timing with everything that follows from its steps; None where the record leaves some of it out.

        Ratios are computed here and not read: earlier versions wrote medians over the steps.
        """
        fields = self.model_dump(exclude={"attention_s", "error", "steps"})
        steps = [step.model_dump() for step in self.steps]
        needed = ("index", "step_s", "attention_s", "calls", "structured_calls")
        if not steps or None in fields.values() or any(step[name] is None for step in steps for name in needed):
            return None
        return ClipTiming(steps=[StepAttention(**step) for step in steps], **fields)


class CoverageFacts(Part):
    """How the self-attention calls ran."""

    calls: int = 0
    structured: int = 0
    dense: dict[str, int] = {}


class TunedFacts(Part):
    """The tuned adapter that it ran with: its file, the hash of it, and the preset that it was made for."""

    path: str
    sha256: str
    preset: str


def hashes_of(loras: Iterable[LoraHashes | LoraFacts], given: Iterable[ReadFile | GivenFile]) -> dict[str, str]:
    """SHA-256 of LoRAs and of given files, of those that are known, by words that name the file."""
    found: dict[str, str] = {}
    for lora in loras:
        if lora.sha256 is not None:
            found[f"LoRA {lora.name}"] = lora.sha256
            found[f"{SETTINGS_FILE} of LoRA {lora.name}"] = lora.settings_sha256 or "none"
    return found | {f"{file.part} {file.file}": file.sha256 for file in given}
