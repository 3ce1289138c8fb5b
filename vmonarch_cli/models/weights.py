"""Weight files of a model's component: which ones the libraries read, and their headers, checked without torch."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmonarch_cli.errors import ModelError
from vmonarch_cli.text import printable
from vmonarch_cli.untrusted.files import read_json, require_regular
from vmonarch_cli.untrusted.values import Malformed, parse_json, parse_text

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_BITS = {"BOOL": 8, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of one tensor."""

    dtype: str
    """As the format names it: "BF16", "F8_E4M3"."""
    shape: tuple[int, ...]
    begin: int = 0
    """Where its bytes begin in the file."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """What the header of a safetensors file says."""

    tensors: dict[str, TensorHeader]
    spans: dict[str, tuple[int, int]]
    """Tensor -> where its bytes begin and end in the file."""
    metadata: dict[str, str]


def weight_files(names: Iterable[str]) -> list[str]:
    """Of the files of a component's folder, the *.safetensors that are read when no variant is asked for, sorted.

    A variant has its name between dots ("model.fp16.safetensors"). Weights that lie there twice, in one file and in
    shards, are read once: diffusers takes the shards where there is an index of them, transformers the one file. Files
    of other names beside the libraries' own are not read.
    """
    names = set(names)
    plain = sorted(name for name in names if name.endswith(".safetensors") and name.count(".") == 1)
    for base in ("diffusion_pytorch_model", "model"):
        single = f"{base}.safetensors"
        shards = [name for name in plain if re.fullmatch(rf"{base}-\d{{5}}-of-\d{{5}}\.safetensors", name)]
        if single in plain and not (shards and base != "model" and f"{single}.index.json" in names):
            return [single]
        if shards:
            return shards
    return plain


def has_weights(folder: Path) -> bool:
    """Whether all weight files of a component are there, shards included."""
    try:
        return bool(component_files(folder))
    except ModelError:
        return False


def count_parameters(folder: Path) -> int:
    """Parameters in the safetensors files of one component, from their headers; ModelError when one is damaged."""
    return sum(tensor.count for tensors in read_headers(folder).values() for tensor in tensors.values())


def read_headers(folder: Path) -> dict[Path, dict[str, TensorHeader]]:
    """File -> tensors by name, of one component; ModelError when a file is missing, damaged or cannot be read.

    Weights that are scaled integers or scaled floats of 8 bits are refused: the libraries would read them as they are.
    """
    files = {path: read_header(path) for path in component_files(folder)}
    tensors = {name: tensor for found in files.values() for name, tensor in found.items()}
    refuse_scaled(str(folder), tensors)
    whole = sorted(name for name, tensor in tensors.items() if tensor.dtype in ("I8", "U8", "F4"))
    if whole and "quantization_config" not in _config(folder):
        raise ModelError(
            f"{folder} holds quantised weights ({whole[0]} is {tensors[whole[0]].dtype}) and its config does not say "
            "how to read them: use the weights in 16 bits, and --quantize int8 to run them in 8"
        )
    return files


def refuse_scaled(source: str, names: Iterable[str]) -> None:
    """ModelError for weights of 8 bits that come with scales, by the names of their tensors."""
    scaled = sorted(name for name in names if re.search(r"\.?scale_(weight|input)$|\.weight_scale$|scaled_fp8$", name))
    if scaled:
        raise ModelError(
            f"{source} holds 8-bit weights with scales ({scaled[0]}), which diffusers does not read: use the weights "
            "in 16 bits, and --quantize fp8 to run them in 8"
        )


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file; its header must parse and the file must be as long as the header says."""
    return read_layout(path).tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file says of itself; ModelError as `read_header`."""
    return read_layout(path).metadata


def read_scalar(path: Path, tensor: TensorHeader) -> float | None:
    """The value of a tensor of one element, or None for a dtype that is no float of 16 to 64 bits."""
    with path.open("rb") as file:
        file.seek(tensor.begin)
        raw = file.read(8)
    if tensor.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw[:2])[0])
    form = {"F16": "<e", "F32": "<f", "F64": "<d"}.get(tensor.dtype)
    return None if form is None else float(struct.unpack(form, raw[: struct.calcsize(form)])[0])


def read_layout(path: Path, name: str = "weights file") -> Layout:
    """Tensors, their places and the metadata of a safetensors file; each ModelError opens with `name` and the path."""
    require_regular(path, f"{name} {path}", ModelError)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelError(f"{name} {path} is damaged: it is not a safetensors file; download it again")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{name} {path} cannot be read: {error.strerror or error}") from None
    begin = 8 + length
    try:
        table = parse_json(parse_text(raw.rstrip(b" \0")))
        texts = (table.pop("__metadata__", None) or {}).items()
        tensors = {name: _tensor(entry, begin) for name, entry in table.items()}
        spans = {name: _span(table[name], tensor) for name, tensor in tensors.items()}
    except (Malformed, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"{name} {path} is damaged: its header does not parse; download it again") from None
    end = max((end for _, end in spans.values()), default=0)
    if size != 8 + length + end:
        raise ModelError(
            f"{name} {path} is damaged: it has {size:,} bytes and its header describes {8 + length + end:,}; "
            "download it again"
        )
    return Layout(
        tensors,
        {name: (begin + first, begin + last) for name, (first, last) in spans.items()},
        {str(key): text for key, text in texts if isinstance(text, str)},
    )


def _tensor(entry: Mapping[str, object], data: int) -> TensorHeader:
    """`data`: where the tensors' bytes begin in the file."""
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError(entry)
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(shape)
    offsets = entry["data_offsets"]
    begin = offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else 0
    return TensorHeader(dtype, tuple(shape), data + begin)


def _span(entry: Mapping[str, object], tensor: TensorHeader) -> tuple[int, int]:
    """Where a tensor's bytes begin and end; ValueError when they are fewer or more than its shape needs."""
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise TypeError(offsets)
    begin, end = offsets
    bits = _BITS.get(tensor.dtype)
    if not 0 <= begin <= end or (bits is not None and 8 * (end - begin) != bits * tensor.count):
        raise ValueError(offsets)
    return int(begin), int(end)


def component_files(folder: Path) -> list[Path]:
    """The weight files of a component that are read; ModelError when there is none, or a shard is missing."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    present = sorted(name for name in names if name.endswith(".safetensors"))
    if not present:
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickles:
            raise ModelError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened: "
                "convert them to safetensors"
            )
        raise ModelError(f"{folder} has no weights: a *.safetensors file belongs there")
    read = weight_files(names)
    if not read:
        raise ModelError(
            f"{folder} holds no weights but those of a variant ({present[0]}): a file whose name has no variant in it "
            "belongs there"
        )
    for index in sorted(names):
        base = index.removesuffix(".safetensors.index.json")
        # The shards of a variant are not read.
        if base != index and "." not in base and read != ["model.safetensors"]:
            _check_shards(folder, index, set(present))
    return [folder / name for name in read]


def _check_shards(folder: Path, index: str, present: set[str]) -> None:
    table = read_json(folder / index, str(folder / index), ModelError)
    named = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
        raise ModelError(f"{folder / index} is damaged: its weight_map does not name the file of each weight")
    shards = set(named.values())
    missing = sorted(shards - present)
    if missing:
        raise ModelError(f"{folder} is incomplete: {printable(missing[0])} is missing (of {len(shards)} weight files)")


def _config(folder: Path) -> Mapping[str, object]:
    path = folder / "config.json"
    found = read_json(path, str(path), ModelError) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
