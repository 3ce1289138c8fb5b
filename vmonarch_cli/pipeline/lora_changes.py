"""What the tensors of a LoRA do to a transformer, layer by layer: pairs for peft, and what is added outright."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.lora import LoraTensor
from vmonarch_cli.models.lora_facts import LoraSettings
from vmonarch_cli.pipeline.lora_names import LayerNames, Place, base_of, parameter_of, rows_of
from vmonarch_cli.text import printable

Key = tuple[str, str]
"""A module (or parameter) of diffusers, and which of its parameters: "weight", "bias", or "" for itself."""


@dataclass
class Changes:
    """What is done to one component of a pipeline."""

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Module -> A (rank, in, ...) and B (out, rank, ...), alpha applied."""
    outright: dict[Key, torch.Tensor] = field(default_factory=dict)
    """What is added to a parameter, of its shape."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA file that was read: its tensors and what they are."""

    source: str
    tensors: Mapping[str, torch.Tensor]
    parts: Sequence[LoraTensor]
    settings: LoraSettings

    def by_layer(self, second: bool) -> dict[str, dict[str, torch.Tensor]]:
        """Layer -> part -> tensor, of one transformer; differences that change nothing are left out.

        Files often hold differences of norms that training left at zero.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for part in self.parts:
            tensor = self.tensors[part.name]
            outright = part.part in ("difference", "modulation", "bias")
            if part.second != second or (outright and not torch.count_nonzero(tensor)):
                continue
            layer = f"{part.layer}.modulation" if part.part == "modulation" else part.layer
            found.setdefault(layer, {})["difference" if part.part == "modulation" else part.part] = tensor
        return {layer: parts for layer, parts in found.items() if parts.keys() != {"alpha"}}


def changes_of(
    weights: LoraWeights, second: bool, names: LayerNames, components: Mapping[str, Any]
) -> dict[str, Changes]:
    """Component ("" is the transformer) -> what a LoRA does to it; ModelError where a part of it fits nowhere."""
    layers = weights.by_layer(second)
    places = names.of(layers)
    missing = sorted(layer for layer in layers if layer not in places)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(
            f"LoRA {weights.source} belongs to another model: this one has no layer {printable(missing[0])}{others}; "
            f"{len(layers) - len(missing)} of its {len(layers)} layers fit"
        )
    made: dict[str, Changes] = {}
    for layer, parts in layers.items():
        place = places[layer]
        changes = made.setdefault(place.component, Changes())
        _add_layer(weights, layer, parts, (place, components[place.component]), changes)
    return made


def _add_layer(
    weights: LoraWeights,
    layer: str,
    parts: Mapping[str, torch.Tensor],
    where: tuple[Place, Any],
    changes: Changes,
) -> None:
    place, module = where
    if "A" in parts:
        down, up = parts["A"], parts["B"]
        own = float(parts["alpha"]) if "alpha" in parts else None
        scale = weights.settings.scale(layer, own, down.shape[0], weights.source)
        # Halves and wider: a product in float16 may round differently than alpha does in the network.
        up = up if scale == 1 else (up.float() * scale).to(up.dtype)
        for name, rows in _split(weights.source, layer, up, where):
            _check_pair(weights.source, name, down, rows, module)
            if "magnitude" not in parts:
                changes.pairs[name] = (down, rows)
        if "magnitude" in parts:
            magnitudes = _magnitudes(weights.source, layer, parts["magnitude"], up.shape[0])
            norms = dict(_split(weights.source, layer, magnitudes, where))
            for name, rows in _split(weights.source, layer, up, where):
                changes.outright[name, "weight"] = _of_dora(module, name, down, rows, norms[name])
    for part, kind in (("difference", "weight"), ("bias", "bias")):
        if part not in parts:
            continue
        if kind == "weight" and isinstance(base_of(module, place.modules[0]), torch.Tensor):
            changes.outright[place.modules[0], ""] = parts[part]
            continue
        for name, rows in _split(weights.source, layer, parts[part], where):
            key = (name, kind)
            changes.outright[key] = rows + changes.outright[key] if key in changes.outright else rows
    for key, tensor in changes.outright.items():
        if key[0] in place.modules:
            _check_outright(weights.source, key, tensor, module)


def _split(source: str, layer: str, tensor: torch.Tensor, where: tuple[Place, Any]) -> list[tuple[str, torch.Tensor]]:
    """(module, its rows) of a tensor whose rows are the outputs of a layer."""
    place, module = where
    if place.swapped and tensor.shape[0] % 2 == 0:
        first, last = tensor.chunk(2)
        tensor = torch.cat([last, first])
    if len(place.modules) == 1:
        return [(place.modules[0], tensor)]
    counts = rows_of(module, place)
    if tensor.shape[0] != sum(counts):
        raise ModelError(_misfit(source, layer, f"has {sum(counts)} outputs, and the file {tensor.shape[0]}"))
    return list(zip(place.modules, tensor.split(counts), strict=True))


def _misfit(source: str, layer: str, what: str) -> str:
    return f"LoRA {source} does not fit this model ({printable(layer)} {what}): it must have been trained on the same"


def _check_pair(source: str, name: str, down: torch.Tensor, up: torch.Tensor, module: Any) -> None:
    weight = parameter_of(module, name, "weight")
    if weight is None or weight.ndim < 2:
        raise ModelError(_misfit(source, name, "is no layer that a pair of matrices can change"))
    if tuple(down.shape[1:]) != tuple(weight.shape[1:]):
        raise ModelError(
            _misfit(source, name, f"takes {list(weight.shape[1:])} inputs, and the file {list(down.shape[1:])}")
        )
    if up.shape[0] != weight.shape[0]:
        raise ModelError(_misfit(source, name, f"has {weight.shape[0]} outputs, and the file {up.shape[0]}"))


def _magnitudes(source: str, layer: str, tensor: torch.Tensor, outputs: int) -> torch.Tensor:
    """Of a DoRA the norm of each output's weights, (outputs,)."""
    if tensor.numel() != outputs or tensor.shape[0] != outputs:
        raise ModelError(
            f"LoRA {source} is a DoRA with norms of its inputs ({printable(layer)} has shape {list(tensor.shape)}), "
            "which peft does not support: norms of the outputs are valid"
        )
    return tensor.reshape(outputs)


def _of_dora(module: Any, name: str, down: torch.Tensor, up: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """What a DoRA adds to a weight: m (W + B A) / |W + B A| - W, with the norm over an output's inputs, as in peft."""
    weight: torch.Tensor = parameter_of(module, name, "weight").detach().to("cpu", torch.float32)
    moved = weight.flatten(1) + up.float().flatten(1) @ down.float().flatten(1)
    norms = moved.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    made: torch.Tensor = (magnitudes.float()[:, None] * moved / norms).reshape(weight.shape) - weight
    return made


def _check_outright(source: str, key: Key, tensor: torch.Tensor, module: Any) -> None:
    """ModelError where there is no such parameter, of another shape, or in 8 bits."""
    name, kind = key
    parameter = parameter_of(module, name, kind) if kind else base_of(module, name)
    weight = parameter_of(module, name, "weight")
    can_have_bias = isinstance(base_of(module, name), torch.nn.Linear | torch.nn.Conv3d) and weight is not None
    if parameter is None and not (kind == "bias" and can_have_bias):
        raise ModelError(_misfit(source, name, f"has no {kind}"))
    shape = (weight.shape[0],) if parameter is None else tuple(parameter.shape)
    if _without_ones(shape) != _without_ones(tuple(tensor.shape)):
        what = f"has a {kind or 'parameter'} of shape {list(shape)}, and the file {list(tensor.shape)}"
        raise ModelError(_misfit(source, name, what))
    if parameter is not None and (type(parameter.data) is not torch.Tensor or not parameter.is_floating_point()):
        raise ModelError(
            f"LoRA {source} changes {printable(name)} outright, which --quantize int8-storage holds in 8 bits: "
            "leave out one of the two"
        )


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    """A modulation of (1, 6, width) is that of (6, width) in other files."""
    return [side for side in shape if side != 1]


def apply_outright(module: Any, outright: Mapping[Key, torch.Tensor], scale: float) -> None:
    """Add scale times each difference to its parameter; a bias that a layer does not have begins at zero."""
    for (name, kind), difference in outright.items():
        owner = base_of(module, name) if kind else base_of(module, name.rpartition(".")[0]) if "." in name else module
        attribute = kind or name.rpartition(".")[2]
        parameter = getattr(owner, attribute)
        if parameter is None:
            weight = owner.weight
            setattr(owner, attribute, torch.nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype)))
            parameter = getattr(owner, attribute)
        moved = parameter.detach().float() + scale * difference.float().reshape(parameter.shape)
        parameter.data = moved.to(parameter.dtype)
