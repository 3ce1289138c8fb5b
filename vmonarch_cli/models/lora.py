"""LoRA files, read by their tensors' names without torch: what each tensor is, and what vmonarch does not support."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.hub import hub_file
from vmonarch_cli.models.weights import read_header
from vmonarch_cli.text import printable

Part = Literal["A", "B", "bias", "alpha", "difference"]

_PARTS: tuple[tuple[str, Part], ...] = (
    (r"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down)(\.default)?\.weight", "A"),
    (r"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up)(\.default)?\.weight", "B"),
    (r"\.(lora_B(\.default)?\.bias|diff_b)", "bias"),
    (r"\.alpha", "alpha"),
    (r"\.(diff|diff_m)", "difference"),
)
_DORA = re.compile(r"\.(dora_scale|lora_magnitude_vector)\b")
_TEXT_ENCODER = re.compile(r"(text_encoder(_\d)?\.|lora_te\d?_)")
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
)
_SECOND = "transformer_2."


@dataclass(frozen=True)
class LoraTensor:
    """What one tensor of a LoRA is: W + scale alpha / rank B A, with A (rank, in) and B (out, rank)."""

    name: str
    """As the file has it."""
    layer: str
    """The layer that it changes, as the file names it, without what stands before the transformer's own names."""
    part: Part
    """"difference": something that is added to a parameter outright, and not a product of A and B."""
    second: bool = False
    """Whether it is for the second transformer of a model that has two."""


def lora_tensors(names: Iterable[str], source: str) -> list[LoraTensor]:
    """What the tensors of a LoRA are; ModelError for DoRA, text encoders, halves of pairs, and files that are none."""
    found = [_read(name, source) for name in sorted(names)]
    tensors = [tensor for tensor in found if tensor is not None]
    layers: dict[tuple[bool, str], set[str]] = {}
    for tensor in tensors:
        layers.setdefault((tensor.second, tensor.layer), set()).add(tensor.part)
    if len(tensors) < len(found) or not any("A" in parts for parts in layers.values()):
        raise ModelError(f"{Path(source).name} is no LoRA of a video transformer: no tensor in it belongs to one")
    for (_, layer), parts in sorted(layers.items()):
        if len(parts & {"A", "B"}) == 1:
            lacks = "lora_A" if "B" in parts else "lora_B"
            raise ModelError(f"LoRA {source} is incomplete: {printable(layer)} has no {lacks}")
    return tensors


def _read(name: str, source: str) -> LoraTensor | None:
    """None for a name that is no part of a LoRA."""
    if _TEXT_ENCODER.match(name):
        raise ModelError(
            f"LoRA {source} also changes a text encoder ({printable(name)}), which vmonarch does not support: "
            "use one for the transformer alone"
        )
    if _DORA.search(name):
        raise ModelError(
            f"LoRA {source} is a DoRA ({printable(name)}), which diffusers does not support for video: use a plain LoRA"
        )
    for pattern, part in _PARTS:
        found = re.fullmatch(rf"(.+){pattern}", name)
        if found is not None:
            layer, second = found[1], found[1].startswith(_SECOND)
            layer = layer.removeprefix(_SECOND)
            for prefix in _PREFIXES:
                layer = layer.removeprefix(prefix)
            return LoraTensor(name, layer, part, second)
    return None


def lora_file(source: str) -> Path:
    """The .safetensors file of a LoRA: itself, the only one of its kind in a folder, or of a hub repository.

    Raises ModelError when there is none or it cannot be told which one.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        names = [found.name for found in path.iterdir()]
        return path / _choose(names, source)
    return hub_file(source, lambda names: _choose(names, source))


def check_lora_file(path: Path) -> None:
    """ModelError when a file is damaged or holds what is not supported; reads the header alone."""
    lora_tensors(read_header(path), str(path))


def _choose(names: Iterable[str], source: str) -> str:
    """Of a folder's files the LoRA, as diffusers would choose."""
    files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    usual = [name for name in files if name.endswith("pytorch_lora_weights.safetensors")]
    files = usual or files
    if not files:
        raise ModelError(f"LoRA {source} has no .safetensors file")
    if len(files) > 1:
        some = ", ".join(printable(name) for name in files[:3]) + (", ..." if len(files) > 3 else "")
        raise ModelError(f"LoRA {source} has {len(files)} .safetensors files ({some}): name one of them by its path")
    return files[0]
