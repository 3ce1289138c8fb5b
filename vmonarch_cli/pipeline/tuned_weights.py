"""Tuned adapters that are whole weights: written, loaded beside the model's own, and exchanged with them.

The file holds the weights as training left them, not their difference from the model's. So turning them on is an
exchange of two tensors, in which nothing is rounded, and turning them off gives the model's own back to the bit. A
difference would have to be added and taken away again, and in 16 bits the sum does not come back.

A LoRA of a small model on a CPU is kept the same way, as sums: its own products would take a fifth of the forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vmonarch_cli.errors import ModelError
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.models.tuned import METADATA_KEY, TunedAdapter
from vmonarch_cli.models.weights import read_header, read_metadata
from vmonarch_cli.text import with_article

_PARTS = ("transformer", "transformer_2")
_UP, _DOWN = ".lora_B.weight", ".lora_A.weight"
SUMMED_BYTES = 256 * 2**20
"""Most bytes of weights that are kept twice for a LoRA."""
_HELD = "vmonarch_weights"
"""Attribute of a transformer: name of an adapter -> {name of a weight: name of the buffer that holds the other one}."""


def write_weights(
    path: Path, state: Mapping[str, torch.Tensor], adapter: TunedAdapter, *, overwrite: bool = False
) -> None:
    """Write whole weights atomically; OutputError when that cannot be done.

    state: tensors under the names of the model's files, with `transformer.` or `transformer_2.` in front.
    overwrite: replace what is there; otherwise NameTaken, an OutputError.

    Raises ValueError for a tensor that is not finite or under another name.
    """
    for name, tensor in state.items():
        if name.partition(".")[0] not in _PARTS:
            raise ValueError(f"{name} is not the name of a transformer's weight")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic(path, overwrite=overwrite) as temporary:
        save_file(tensors, temporary, {"format": "pt", METADATA_KEY: adapter.to_json()})


def load_weights(pipeline: Any, path: Path, name: str) -> None:
    """Put the weights of a file beside those of a pipeline's transformers, in their dtypes and switched off.

    They are buffers, so that they go wherever the transformer goes. ModelError for a weight that is not in the model.
    """
    found = _found(pipeline)
    with safe_open(path, framework="pt") as file:
        for number, key in enumerate(file.keys()):
            part, _, weight = key.partition(".")
            parameter = found.get(part, {}).get(weight)
            if parameter is None:
                raise ModelError(
                    f"adapter {path} holds {key}, which is no weight of {with_article(type(pipeline).__name__)}"
                )
            _hold(getattr(pipeline, part), name, number, weight, file.get_tensor(key).to(parameter))


def can_sum(pipeline: Any, path: Path) -> bool:
    """Whether a LoRA's file is better kept as weights with the LoRA in them: few, in float32, on a CPU, without another
    LoRA beside them, and with an alpha that is the rank.
    """
    found = _found(pipeline)
    weights = [found.get(part, {}).get(weight) for part, weight in set(map(_changed_by, read_header(path)))]
    plain = all(one is not None and one.dtype == torch.float32 and one.device.type == "cpu" for one in weights)
    few = sum(one.nbytes for one in weights if one is not None) <= SUMMED_BYTES
    layers = any(".base_layer." in name for part in found for name, _ in getattr(pipeline, part).named_parameters())
    return few and plain and not layers and "lora_adapter_metadata" not in read_metadata(path)


def load_sums(pipeline: Any, path: Path, name: str) -> None:
    """As `load_weights`, of a LoRA's file for which `can_sum`: W + B A, in float32."""
    found = _found(pipeline)
    with safe_open(path, framework="pt") as file:
        ups = [key for key in read_header(path) if key.endswith(_UP)]
        for number, key in enumerate(ups):
            part, weight = _changed_by(key)
            down = file.get_tensor(key.removesuffix(_UP) + _DOWN)
            change = file.get_tensor(key).float() @ down.float()
            _hold(getattr(pipeline, part), name, number, weight, found[part][weight].detach() + change)


def _changed_by(key: str) -> tuple[str, str]:
    """(part, weight) that a tensor of a LoRA changes."""
    part, _, layer = key.partition(".")
    return part, layer.removesuffix(_UP).removesuffix(_DOWN) + ".weight"


def _hold(transformer: Any, name: str, number: int, weight: str, value: torch.Tensor) -> None:
    buffer = f"{name}_{number}"
    transformer.register_buffer(buffer, value, persistent=False)
    transformer.__dict__.setdefault(_HELD, {}).setdefault(name, {})[weight] = buffer


def drop_weights(transformer: Any, name: str) -> None:
    """Forget the weights of an adapter that is off."""
    for buffer in transformer.__dict__.get(_HELD, {}).pop(name, {}).values():
        delattr(transformer, buffer)


def has_weights(transformer: Any, name: str) -> bool:
    """Whether a transformer has an adapter of whole weights under a name."""
    return name in transformer.__dict__.get(_HELD, {})


def _found(pipeline: Any) -> dict[str, dict[str, Any]]:
    """Parameters of each transformer."""
    return {part: _parameters(one) for part in _PARTS if (one := getattr(pipeline, part, None)) is not None}


def _parameters(transformer: Any) -> dict[str, Any]:
    """Parameters by the names that files have: peft puts a layer with a LoRA in another one."""
    return {
        name.replace(".base_layer.", ".").replace("_orig_mod.", ""): parameter
        for name, parameter in transformer.named_parameters()
    }


class WeightSwitch:
    """Exchanges a transformer's weights with those of an adapter, and back: two addresses change their places.

    What is off at any time lies in the buffers. A compiled block takes weights as inputs and is not compiled again.
    """

    def __init__(self, transformers: Sequence[Any], name: str, dense_blocks: Sequence[Sequence[str]]) -> None:
        """dense_blocks: of each transformer, the paths of the blocks whose attention always runs dense."""
        self._on = [False] * len(transformers)
        self._pairs: list[list[tuple[Any, Any]]] = []
        """Of each transformer: (parameter, buffer)."""
        for transformer, blocks in zip(transformers, dense_blocks, strict=True):
            held = transformer.__dict__.get(_HELD, {}).get(name, {})
            prefixes = tuple(f"{block.replace('_orig_mod.', '')}." for block in blocks)
            parameters = _parameters(transformer)
            self._pairs.append(
                [
                    (parameters[weight], transformer.get_buffer(buffer))
                    for weight, buffer in held.items()
                    if not weight.startswith(prefixes)
                ]
            )

    def set(self, transformer: int, on: bool) -> None:
        """Have the adapter's weights in place, except in blocks that always run dense, or the model's everywhere."""
        if self._on[transformer] == on:
            return
        for parameter, buffer in self._pairs[transformer]:
            parameter.data, buffer.data = buffer.data, parameter.data
        self._on[transformer] = on

    def off(self) -> None:
        """Have the model's own weights in place in all transformers."""
        for transformer in range(len(self._pairs)):
            self.set(transformer, False)
