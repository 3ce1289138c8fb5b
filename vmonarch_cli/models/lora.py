"""LoRA files, read by their tensors' names without torch: what each tensor is, and what vmonarch does not support."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.weights import TensorHeader
from vmonarch_cli.text import printable

Part = Literal["A", "B", "bias", "alpha", "magnitude", "difference", "modulation"]

_ADAPTER = r"(\.[\w-]+)?"
"""peft puts the adapter's name between a matrix and its weight, as in lora_A.default.weight."""
_PARTS: tuple[tuple[str, Part], ...] = (
    (rf"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down){_ADAPTER}\.weight", "A"),
    (rf"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up){_ADAPTER}\.weight", "B"),
    (rf"\.(lora_B{_ADAPTER}\.bias|diff_b)", "bias"),
    (r"\.alpha", "alpha"),
    (rf"\.(dora_scale|lora_magnitude_vector{_ADAPTER}(\.weight)?)", "magnitude"),
    (r"\.diff", "difference"),
    (r"\.diff_m", "modulation"),
)
_TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoders?(_\d)?\.|lora_te\d?_|cond_stage_model\.)")
_OTHER_KINDS = (("hada_", "a LoHa"), ("lokr_", "a LoKr"), ("oft_", "an OFT"), ("glora_", "a GLoRA"), ("ia3", "an IA3"))
_PREFIXES = (
    "base_model.model.",
    "module.",
    "pipe.dit.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
)
_SECOND = ("transformer_2.", "pipe.dit2.")
_FORMATS = (
    (r"(transformer|transformer_2)\.", "diffusers"),
    (r"base_model\.model\.", "PEFT"),
    (r"(model\.)?diffusion_model\.", "ComfyUI"),
    (r"lora_(unet|transformer)_", "kohya"),
    (r".*\.default\.weight$|pipe\.dit", "DiffSynth"),
)


@dataclass(frozen=True)
class LoraTensor:
    """What one tensor of a LoRA is: W + scale alpha / rank B A, with A (rank, in) and B (out, rank)."""

    name: str
    """As the file has it."""
    layer: str
    """The layer that it changes, as the file names it, without what stands before the transformer's own names."""
    part: Part
    """"difference" and "modulation": what is added to a parameter outright; "magnitude": the norms of a DoRA."""
    second: bool = False
    """Whether it is for the second transformer of a model that has two."""


def lora_tensors(names: Iterable[str], source: str) -> list[LoraTensor]:
    """What the tensors of a LoRA are; ModelError for text encoders, halves of pairs, and files that are none."""
    found = [(name, _read(name)) for name in sorted(names)]
    _refuse_text_encoders([name for name, _ in found], source)
    tensors = [tensor for _, tensor in found if tensor is not None]
    layers: dict[tuple[bool, str], set[str]] = {}
    for tensor in tensors:
        layers.setdefault((tensor.second, tensor.layer), set()).add(tensor.part)
    unknown = [name for name, tensor in found if tensor is None]
    for mark, kind in _OTHER_KINDS:
        named = next((name for name in unknown if mark in name.rpartition(".")[2] or f".{mark}" in name), None)
        if named is not None:
            raise ModelError(
                f"LoRA {source} is {kind} ({printable(named)}), which diffusers does not load into video transformers"
            )
    if not any(parts & {"A", "bias", "difference", "modulation"} for parts in layers.values()):
        raise ModelError(f"{Path(source).name} is no LoRA of a video transformer: no tensor in it belongs to one")
    if unknown:
        raise ModelError(
            f"{Path(source).name} is no LoRA of a video transformer: {len(unknown)} of its {len(found)} tensors are "
            f"no part of one ({printable(unknown[0])})"
        )
    for (_, layer), parts in sorted(layers.items()):
        halves = parts & {"A", "B"}
        if len(halves) == 1 or (not halves and "magnitude" in parts):
            lacks = "lora_A" if "A" not in parts else "lora_B"
            raise ModelError(f"LoRA {source} is incomplete: {printable(layer)} has no {lacks}")
    return tensors


def _refuse_text_encoders(names: list[str], source: str) -> None:
    of_text = [name for name in names if _TEXT_ENCODER.match(name)]
    if of_text:
        raise ModelError(
            f"LoRA {source} also changes a text encoder ({len(of_text)} of its {len(names)} tensors, as "
            f"{printable(of_text[0])}), which diffusers does not support for video: use one for the transformer alone"
        )


def _read(name: str) -> LoraTensor | None:
    """None for a name that is no part of a LoRA."""
    for pattern, part in _PARTS:
        found = re.fullmatch(rf"(.+?){pattern}", name)
        if found is not None:
            layer, second = _own_name(found[1])
            return LoraTensor(name, layer, part, second)
    return None


def _own_name(layer: str) -> tuple[str, bool]:
    """A layer's name without prefixes, and whether one of them says the second transformer."""
    second = False
    for prefix in _PREFIXES:
        for mark in _SECOND:
            second = second or layer.startswith(mark)
            layer = layer.removeprefix(mark)
        if layer.startswith(prefix):
            layer = layer.removeprefix(prefix)
            if prefix.startswith("lora_"):
                layer = layer.lstrip("_")  # VideoX-Fun writes two underscores
    return layer, second


def format_of(names: Iterable[str]) -> str:
    """Whose way of naming tensors a file has, in a word."""
    names = sorted(names)
    for pattern, word in _FORMATS:
        if any(re.match(pattern, name) for name in names):
            return word
    return "bare names"


def check_shapes(tensors: Iterable[LoraTensor], headers: Mapping[str, TensorHeader], source: str) -> None:
    """ModelError where A and B of a layer have other ranks, or an alpha is no single number."""
    by_layer: dict[tuple[bool, str], dict[str, TensorHeader]] = {}
    for tensor in tensors:
        by_layer.setdefault((tensor.second, tensor.layer), {})[tensor.part] = headers[tensor.name]
    for (_, layer), parts in by_layer.items():
        where = f"LoRA {source} contradicts itself: {printable(layer)}"
        if "A" in parts:
            down, up = parts["A"].shape, parts["B"].shape
            if len(down) < 2 or len(up) < 2:
                raise ModelError(f"{where} has an A of shape {list(down)} and a B of shape {list(up)}, no matrices")
            if down[0] != up[1]:
                raise ModelError(f"{where} has an A of rank {down[0]} and a B of rank {up[1]}")
        if "alpha" in parts and parts["alpha"].count != 1:
            raise ModelError(f"{where} has an alpha of {parts['alpha'].count} numbers, and one is valid")
