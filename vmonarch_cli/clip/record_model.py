"""The record of a clip as it is read back: one model, by which every value is checked before anybody uses it. No torch.

`record.make_record` writes these fields and more. A value that was not finite is null, and what later versions added is
optional, so that the records of earlier ones can be read.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from vmonarch_cli.clip.record_parts import (
    AudioFacts,
    CoverageFacts,
    DeviceFacts,
    FileFacts,
    FlopsFacts,
    FramesFacts,
    LoraHashes,
    ModelFacts,
    Part,
    PresetFacts,
    ReadFile,
    Setting,
    Simple,
    TimingFacts,
    TunedFacts,
    hashes_of,
)
from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import ENDINGS, record_path
from vmonarch_cli.media.tags import TAGGED, read_tag
from vmonarch_cli.plan.setup import AUTO, DECIDED_LATER, EARLIER_NAMES
from vmonarch_cli.untrusted.files import read_json
from vmonarch_cli.untrusted.shapes import fault_of
from vmonarch_cli.untrusted.values import Malformed, parse_json

RECORD_SCHEMA = 1
"""Version of the record's layout; raised when a reader of an older one would misread it."""


DenseName = Literal["sdpa", "cudnn", "flash", "efficient", "math", "fa4", "fa3", "fa2", "sage"]


class Record(Part):
    """A record that can be trusted to have these fields, of these types."""

    layout: Literal[1] = Field(alias="schema")
    prompt: str
    seed: int
    clip: str
    """The clip's name when it was made; it lies beside the record, see `clip_of`."""
    frames: FramesFacts
    settings: dict[str, Setting]
    preset: PresetFacts
    model: ModelFacts
    file: FileFacts | None = None
    weights: list[ReadFile] = Field(default=[])
    """Single files in place of the model's transformers."""
    loras: list[LoraHashes] = Field(default=[])
    given: list[ReadFile] = Field(default=[])
    """Pictures and videos; empty in records of earlier versions, too."""
    audio: AudioFacts | None = None
    """None for a silent clip."""
    grid: tuple[int, int, int] | None = None
    tokens: int | None = None
    flops: FlopsFacts = FlopsFacts()
    device: DeviceFacts | None = None
    dtype: str | None = None
    vae_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the frames were decoded in; None in records of earlier versions."""
    decoded_in_tiles: bool = False
    """Tiles were chosen, because full frames did not fit the memory."""
    impl: str | None = None
    fused: str | None = None
    """What the fused blocks ran with; None for stock blocks, and in records of earlier versions."""
    linear_dtype: Literal["float8_e4m3fn", "int8"] | None = None
    """What the blocks' projections computed in; None for `dtype`, as in records of earlier versions."""
    replayed_calls: int = 0
    """Structured calls that were replayed from CUDA graphs."""
    dense_below: int = 0
    """Structured calls of fewer tokens ran dense; 0 in records of earlier versions, too."""
    dense_attention: DenseName | None = None
    """What computed the calls that ran dense; None in records of earlier versions."""
    coverage: CoverageFacts = CoverageFacts()
    timing: TimingFacts = TimingFacts()
    versions: dict[str, str | None] = Field(default={})
    warnings: list[str] = Field(default=[])
    retries: list[dict[str, str]] = Field(default=[])
    setup: dict[str, Simple] = Field(default={})
    tuned: TunedFacts | None = None
    skipped_calls: int = 0
    stopped_after: int | None = None
    """Steps that were made of a clip that was stopped early; None for one that is whole."""

    @property
    def file_hashes(self) -> dict[str, str]:
        """Hashes of the files that it was made from beside the model's folder and a tuned adapter, see `hashes_of`."""
        return {file.part: file.sha256 for file in self.weights} | hashes_of(self.loras, self.given)

    @field_validator("grid", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _under_todays_name(self) -> Record:
        """A record whose weights were only stored in 8 bits, by a version in which nothing computed in them, or whose
        blocks were stock ones by default.
        """
        found = self.settings.get("quantize")
        if found is not None and self.linear_dtype is None and str(found.value) in EARLIER_NAMES:
            self.settings["quantize"] = Setting(value=EARLIER_NAMES[found.value], origin=found.origin)
        fuse = self.settings.get("fuse")
        if fuse is not None and fuse.origin == "default" and fuse.value is False:  # when that was nobody's choice
            self.settings["fuse"] = Setting(value=AUTO, origin=fuse.origin)
        return self

    @field_validator("clip")
    @classmethod
    def _is_clip(cls, value: str) -> str:
        if PurePosixPath(value).suffix.lower() not in ENDINGS:
            raise ValueError(f"takes the name of a clip ({', '.join(ENDINGS)}), got {value[:60]!r}")
        return value

    def setting(self, name: str) -> Any:
        """The value of a setting; None where the record has none of the name."""
        found = self.settings.get(name)
        return None if found is None else found.value

    def settings_values(self) -> dict[str, Any]:
        """Every resolved setting by name, and what it ran on: what two records can be compared by."""
        values = {name: entry.value for name, entry in self.settings.items() if name != "output"}
        values["seed"] = self.seed  # of this clip, where a run made several
        values["num_videos"] = 1
        values["model.source"] = self.model.source
        values["device"] = None if self.device is None else self.device.name
        if self.tuned is not None:
            values["tuned.sha256"] = self.tuned.sha256
        values["dtype"], values["vae_dtype"], values["impl"] = self.dtype, self.vae_dtype, self.impl
        for name in DECIDED_LATER:  # what they came to is below
            values.pop(name, None)
        if self.dense_below:
            values["dense_below"] = self.dense_below
        if self.fused is not None:
            values["fused"] = self.fused
        if self.linear_dtype is not None:
            values["linear_dtype"] = self.linear_dtype
        values["dense_attention"] = self.dense_attention
        return values


def parse_record(table: Any, name: str) -> Record:
    """A record from plain data; InputError with one sentence, that opens with `name`, when it is none."""
    if isinstance(table, dict) and type(table.get("schema")) is int and table["schema"] > RECORD_SCHEMA:
        raise InputError(
            f"{name} was written by a later version of vmonarch (record schema {table['schema']}, this version reads "
            f"{RECORD_SCHEMA}): update vmonarch"
        )
    try:
        return Record.model_validate(table)
    except ValidationError as error:
        raise InputError(f"{name} is not the record of a clip: {fault_of(error)}") from None


def read_record(path: Path) -> Record:
    """The record in a file, or beside a clip, or in the clip's own file; InputError when it is none."""
    file = record_file(path)
    if file.suffix.lower() in TAGGED:
        inside = read_tag(file)
        if inside is None:
            raise InputError(f"there is no record {record_path(file)}, and {file} does not say how it was made")
        return parse_record(_json_inside(inside, file), f"the record in {file}")
    missing = f"there is no record {file}: vmonarch writes one beside each clip, as in clip.json"
    return parse_record(read_json(file, f"record {file}", missing=missing), str(file))


def record_file(path: Path) -> Path:
    """Where the record is that a path stands for: the file beside a clip, or the clip's own where that is not there."""
    if path.suffix.lower() not in ENDINGS:
        return path
    beside = record_path(path)
    return path if path.suffix.lower() in TAGGED and path.is_file() and not beside.exists() else beside


def _json_inside(text: str, path: Path) -> Any:
    try:
        return parse_json(text)
    except Malformed:
        raise InputError(f"{path} has no record beside it, and what it says of itself is no record") from None


def clip_of(record: Record, file: Path) -> Path:
    """Where the clip of a record is: beside it, under the record's own name, also when both were renamed."""
    return file.with_suffix(PurePosixPath(record.clip).suffix)
