"""Tuned adapters: what a file says of itself, and whether it belongs to a model and a preset. No torch.

An adapter is a LoRA in diffusers' format, or the transformers' own weights as training left them, for one model and one
preset: the weights have learned to undo that preset's error, and make another preset's worse. So its safetensors file
says what it was made for, and is used for that alone.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.finite import FLOATS, first_not_finite
from vmonarch_cli.models.lora import check_shapes, lora_tensors
from vmonarch_cli.models.weights import Layout, component_files, read_headers, read_layout
from vmonarch_cli.presets import LABELS, Preset, at_steps, format_value
from vmonarch_cli.text import counted, one_line, printable, shown
from vmonarch_cli.untrusted.shapes import fault_of
from vmonarch_cli.untrusted.values import Malformed, parse_json, parse_text

METADATA_KEY = "vmonarch"
"""Under which the metadata of the safetensors file has the JSON of a `TunedAdapter`."""
ADAPTER_SCHEMA = 1
FOLDER = "tuned"
"""Where a model's folder brings its adapters, as tuned/PRESET.safetensors or tuned/PRESET-ANYTHING.safetensors."""
_TRANSFORMERS = ("transformer", "transformer_2")
_SAMPLE = 4096
"""Bytes of each tensor that a fingerprint reads."""
_MAX_JSON = 1 << 20
_LABELS = (*LABELS, "impl")
"""Fields of a preset that change no result, or only its rounding."""


class TunedAdapter(BaseModel):
    """What the metadata of an adapter's file says (no conversions; unknown fields are refused)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), populate_by_name=True
    )

    layout: Literal[1] = Field(default=1, alias="schema")
    kind: Literal["lora", "weights"] = "lora"
    """A LoRA, or whole weights that take the place of the model's while attention is structured."""
    model: str = Field(min_length=1, max_length=4096)
    """The name or the folder that was asked for when it was made."""
    fingerprint: str
    """Of the transformers' weights, see `fingerprint`."""
    also_for: dict[str, str] = Field(default={}, max_length=20)
    """Models of the same base that it may be used with, too, as a distilled student: name or folder -> fingerprint."""
    preset_name: str = Field(min_length=1, max_length=60)
    preset: dict[str, Any]
    """All fields of the `Preset`."""
    steps: int = Field(ge=1, le=1000)
    """Denoising steps of the sampler."""
    guidance_scale: float = Field(ge=0, le=100)
    size: str
    """WIDTHxHEIGHT in pixels."""
    num_frames: int = Field(ge=1, le=1 << 20)
    training: dict[str, Any] = {}
    """How it was made: rank, alpha, lr, steps done, seconds, batch, seed, prompts, first and last loss, versions.

    `cut_from_rank`: the rank of training and of the evaluation, where the file has fewer.
    """
    evaluation: dict[str, Any] = {}
    """Prompts, and before and after: error of the latents, PSNR and SSIM against the dense teacher."""

    @field_validator("fingerprint")
    @classmethod
    def _hash(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError(f"takes 64 hexadecimal digits, got {shown(value)}")
        return value

    @field_validator("also_for")
    @classmethod
    def _others(cls, value: dict[str, str]) -> dict[str, str]:
        return {one_line(name): cls._hash(stamp) for name, stamp in value.items()}

    @field_validator("size")
    @classmethod
    def _size(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", value, re.ASCII):
            raise ValueError(f"takes WIDTHxHEIGHT, got {shown(value)}")
        return value

    _label = field_validator("model", "preset_name")(one_line)

    @field_validator("preset")
    @classmethod
    def _preset(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            preset = Preset.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"is no preset of this version: {fault_of(error)}") from None
        if preset.attention == "dense":
            raise ValueError("is dense attention, which no adapter is for")
        return value

    @property
    def made_for(self) -> Preset:
        """The preset that it was tuned with."""
        return Preset.model_validate(self.preset)

    @property
    def gain(self) -> tuple[float, float] | None:
        """Mean latent error before and after, where the file has both."""
        tables = [self.evaluation.get(when) for when in ("before", "after")]
        errors = [table.get("latent_error_mean") for table in tables if isinstance(table, dict)]
        numbers = [float(error) for error in errors if isinstance(error, float)]
        return (numbers[0], numbers[1]) if len(numbers) == 2 else None

    @property
    def words(self) -> str:
        """What it was made for, and its gain: 'made for paper, 20 steps, guidance 4, 96x96, 49 frames, error ...'."""
        error = "" if self.gain is None else ", error {:.3g} before and {:.3g} after tuning".format(*self.gain)
        return (
            f"made for {self.preset_name}, {counted(self.steps, 'step')}, guidance {self.guidance_scale:g}, "
            f"{self.size}, {counted(self.num_frames, 'frame')}{error}"
        )

    def to_json(self) -> str:
        """The text for the metadata."""
        return self.model_dump_json(by_alias=True)

    def misfit(self, preset: Preset, steps: int) -> str | None:
        """The first field in which a preset differs, in so many steps, from the one that it was made for:
        'band is 0 there and 1 here'.
        """
        ours, preset = at_steps(self.made_for, steps), at_steps(preset, steps)
        for name in Preset.model_fields:
            there, here = getattr(ours, name), getattr(preset, name)
            if name not in _LABELS and there != here:
                return f"{name} is {format_value(there)} there and {format_value(here)} here"
        return None


def read_adapter(path: Path) -> TunedAdapter:
    """What an adapter's file says of itself, from its header alone.

    InputError, in one sentence, when it is no regular file, no whole safetensors file, no LoRA, or not made by
    tuning.
    """
    name = f"adapter {path}"
    try:
        layout = read_layout(path, "adapter")
    except ModelError as error:
        raise InputError(error.message) from None
    text = layout.metadata.get(METADATA_KEY)
    if not _says_weights(text):
        _check_lora(layout, path, name)
    odd = next((key for key, tensor in layout.tensors.items() if tensor.dtype not in FLOATS), None)
    if odd is not None:
        raise InputError(f"{name} holds {printable(odd)} as {shown(layout.tensors[odd].dtype)}, and no LoRA is that")
    if text is None:
        raise InputError(
            f"{name} does not say what it was tuned for: its metadata has no {METADATA_KEY}, which `vmonarch tune` "
            "writes; a LoRA of another kind goes with --lora"
        )
    return _parsed(text, name)


def _says_weights(text: str | None) -> bool:
    """Whether metadata, that may be anything, says that a file holds whole weights."""
    try:
        table = parse_json(parse_text((text or "")[:_MAX_JSON].encode("utf-8", "surrogatepass")))
    except Malformed:
        return False
    return isinstance(table, dict) and table.get("kind") == "weights"


def _check_lora(layout: Layout, path: Path, name: str) -> None:
    """InputError unless a file is pairs of matrices, that can be turned off."""
    try:
        parts = lora_tensors(layout.tensors, str(path))
        check_shapes(parts, layout.tensors, str(path))
    except ModelError as error:
        raise InputError(error.message) from None
    other = next((part for part in parts if part.part not in ("A", "B", "alpha")), None)
    if other is not None:
        raise InputError(
            f"{name} changes more than pairs of matrices can ({printable(other.name)}), which could not be turned off"
        )


def _parsed(text: str, name: str) -> TunedAdapter:
    """What the metadata says; InputError for anything else."""
    if len(text) > _MAX_JSON:
        raise InputError(f"{name} has {len(text):,} characters of metadata, and {_MAX_JSON:,} are the most")
    try:
        table = parse_json(parse_text(text.encode("utf-8", "surrogatepass")))
    except Malformed as wrong:
        raise InputError(wrong.about(f"metadata of {name}")) from None
    schema = table.get("schema") if isinstance(table, dict) else None
    if type(schema) is int and schema > ADAPTER_SCHEMA:
        raise InputError(
            f"{name} was made by a later version of vmonarch (schema {schema}, this version reads {ADAPTER_SCHEMA}): "
            "update vmonarch"
        )
    try:
        return TunedAdapter.model_validate(table)
    except ValidationError as error:
        raise InputError(f"metadata of {name} is not as `vmonarch tune` writes it: {fault_of(error)}") from None


def check_finite(path: Path) -> None:
    """InputError when a weight of an adapter, that `read_adapter` has read, is not finite."""
    try:
        odd = first_not_finite(path, "adapter")
    except ModelError as error:
        raise InputError(error.message) from None
    if odd is not None:
        raise InputError(f"adapter {path} has weights that are not finite, the first in {printable(odd)}")


def fingerprint(folder: Path) -> str:
    """SHA-256 that tells the transformers of a model's folder from others, whatever files hold their weights.

    It is of each tensor's name, type, shape and first 4 KiB, in the order of names. ModelError when a file is missing
    or damaged.
    """
    files = [
        (name, file)
        for name in _TRANSFORMERS
        if name == _TRANSFORMERS[0] or (folder / name).is_dir()
        for file in component_files(folder / name)
    ]
    stamps = tuple((name, file, *_stamp(file)) for name, file in files)
    return _fingerprint(stamps)


def _stamp(file: Path) -> tuple[int, int]:
    try:
        facts = file.stat()
    except OSError as error:
        raise ModelError(f"weights file {file} cannot be read: {error.strerror or error}") from None
    return facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _fingerprint(stamps: tuple[tuple[str, Path, int, int], ...]) -> str:
    """Of (component, file, size, time of change): a batch asks for every line."""
    digest = hashlib.sha256()
    for _, piece in sorted(entry for name, file, *_ in stamps for entry in _samples(name, file)):
        digest.update(piece)
    return digest.hexdigest()


def _samples(component: str, file: Path) -> Iterator[tuple[str, bytes]]:
    """(name to sort by, what is hashed) of each tensor of a file."""
    layout = read_layout(file)
    with file.open("rb") as stream:
        for name, (begin, end) in layout.spans.items():
            tensor = layout.tensors[name]
            stream.seek(begin)
            head = f"{component}.{name} {tensor.dtype} {tensor.shape} "
            yield f"{component}.{name}", head.encode("utf-8", "surrogatepass") + stream.read(min(_SAMPLE, end - begin))


def short(fingerprint: str) -> str:
    """A fingerprint for sentences."""
    return fingerprint[:12]


def shipped_adapters(folder: Path, preset: str | None = None) -> list[Path]:
    """Files of the adapters that a model's folder brings, of all or for a preset of this name by the files' names.

    What begins with the preset's name and a dash may be for another preset, of a longer name: its metadata says.
    """
    files = sorted(path for path in (folder / FOLDER).glob("*.safetensors") if path.is_file())
    if preset is None:
        return files
    return [path for path in files if path.stem == preset or path.stem.startswith(f"{preset}-")]


def other_base(adapter: TunedAdapter, folder: Path) -> str | None:
    """The name under which an adapter allows the model in a folder beside its own, or None."""
    here = fingerprint(folder)
    return next((name for name, stamp in adapter.also_for.items() if stamp == here), None)


def check_base(adapter: TunedAdapter, path: str, folder: Path) -> None:
    """InputError unless the model in a folder has weights that an adapter is for: its own, or those of also_for."""
    here = fingerprint(folder)
    if here not in (adapter.fingerprint, *adapter.also_for.values()):
        others = "".join(f", or of {name} ({short(stamp)})" for name, stamp in adapter.also_for.items())
        raise InputError(
            f"adapter {path} was tuned on other weights: those of {adapter.model} (fingerprint "
            f"{short(adapter.fingerprint)}){others}, and {folder} has {short(here)}"
        )
    if adapter.kind == "weights":
        _check_weights(path, folder)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of the transformers in a model's folder, by `transformer.NAME`."""
    return {
        f"{name}.{key}": tensor.shape
        for name in _TRANSFORMERS
        if (folder / name).is_dir()
        for found in read_headers(folder / name).values()
        for key, tensor in found.items()
    }


def _check_weights(path: str, folder: Path) -> None:
    """InputError unless every tensor of a file of whole weights is in the model, in its shape."""
    shapes = shapes_of(folder)
    for key, tensor in read_layout(Path(path), "adapter").tensors.items():
        if shapes.get(key) != tensor.shape:
            has = f"has it as {shapes[key]}" if key in shapes else "has no such weight"
            raise InputError(
                f"adapter {path} is of another architecture: it holds {printable(key)} as {tensor.shape}, and {folder} "
                f"{has}"
            )
