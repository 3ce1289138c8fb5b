"""Tuned adapters in files and in transformers: written whole or not at all, loaded by diffusers, active where they may.

In a step, or a layer, whose attention runs dense the adapter's layers are off: they have learned to undo the error of
structured attention, and dense attention has none.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.models.lora_files import Expert, LoraFile
from vmonarch_cli.models.tuned import METADATA_KEY, TunedAdapter
from vmonarch_cli.models.weights import read_header
from vmonarch_cli.pipeline.lora import ReadLora, load_lora, read_weights
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.pipeline.tuned_weights import (
    WeightSwitch,
    can_sum,
    drop_weights,
    has_weights,
    load_sums,
    load_weights,
)
from vmonarch_cli.plan.setup import ADAPTER_NAME, AdapterFile
from vmonarch_cli.text import with_article


def write_adapter(
    path: Path,
    state: Mapping[str, torch.Tensor],
    adapter: TunedAdapter,
    *,
    alpha: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter's file atomically, synced to the disk; OutputError when that cannot be done.

    state: tensors under diffusers' names, as in `transformer.blocks.0.attn1.to_q.lora_A.weight`, (rank, in) for A and
        (out, rank) for B; those of a second transformer begin with `transformer_2.`.
    alpha: where it is not the rank; it goes into the metadata as diffusers writes it.
    overwrite: replace what is there; otherwise NameTaken, an OutputError.

    Raises ValueError for a tensor that is not finite or under another name.
    """
    tensors = {}
    for name, tensor in state.items():
        if not name.startswith(("transformer.", "transformer_2.")) or not name.endswith(
            (".lora_A.weight", ".lora_B.weight")
        ):
            raise ValueError(f"{name} is not the name of a LoRA's tensor as diffusers writes it")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
        tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {"format": "pt", METADATA_KEY: adapter.to_json()}
    if alpha is not None:
        metadata["lora_adapter_metadata"] = json.dumps(_peft_settings(tensors, alpha))
    content = save(tensors, metadata)
    with atomic(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(content)


def _peft_settings(tensors: Mapping[str, torch.Tensor], alpha: float) -> dict[str, Any]:
    """peft's settings of each transformer, as `save_lora_weights` has them."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            part, _, layer = name.removesuffix(".lora_A.weight").partition(".")
            found[f"{part}.r"] = tensor.shape[0]
            found[f"{part}.lora_alpha"] = alpha
            found.setdefault(f"{part}.target_modules", []).append(layer)
    return found


def load_tuned(pipeline: Any, path: Path, *, name: str = ADAPTER_NAME) -> None:
    """Put an adapter's layers into a pipeline's transformers under a name, frozen, active and at scale 1.

    Adapters that are there already keep their scales. InputError where diffusers or this installation loads none,
    ModelError when a layer of the file is not in the model.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"--tuned: diffusers loads no LoRA into {with_article(type(pipeline).__name__)}")
    if importlib.util.find_spec("peft") is None:
        raise InputError("--tuned needs peft: pip install peft")
    before = active_adapters(pipeline)
    file = LoraFile(path, str(path), _expert(pipeline, path))
    load_lora(pipeline, ReadLora(file, 1.0, read_weights(file)), name)
    for layer in tuner_layers(transformers_of(pipeline)):
        layer.set_adapter([*before, name], inference_mode=True)


def _expert(pipeline: Any, path: Path) -> Expert | None:
    """An adapter goes to the transformers that its tensors name, where a LoRA without a mark would go to both."""
    if getattr(pipeline, "transformer_2", None) is None:
        return None
    return None if any(name.startswith("transformer_2.") for name in read_header(path)) else "high"


def load_adapters(pipeline: Any, adapters: Sequence[AdapterFile], *, sums: bool = False) -> None:
    """Load adapters, each under its own name, and leave them off: what `switch_of` gives turns one on.

    sums: the weights stay where and as they are, so that a LoRA may be kept as weights that have it in them.
    """
    for adapter in adapters:
        if adapter.adapter.kind == "weights":
            load_weights(pipeline, Path(adapter.path), adapter.layer_name)
        elif sums and can_sum(pipeline, Path(adapter.path)):
            load_sums(pipeline, Path(adapter.path), adapter.layer_name)
        else:
            load_tuned(pipeline, Path(adapter.path), name=adapter.layer_name)
    if tuner_layers(transformers_of(pipeline)):
        others = [name for name in active_adapters(pipeline) if not name.startswith(ADAPTER_NAME)]
        for layer in tuner_layers(transformers_of(pipeline)):
            layer.set_adapter(others, inference_mode=True)


def is_loaded(pipeline: Any, adapter: AdapterFile) -> bool:
    """Whether a pipeline's transformers have an adapter, on or off."""
    name, transformers = adapter.layer_name, transformers_of(pipeline)
    held = any(has_weights(transformer, name) for transformer in transformers)
    return held or any(name in layer.lora_A for layer in tuner_layers(transformers))


def unload(pipeline: Any, adapter: AdapterFile) -> None:
    """Take an adapter that is off out of a pipeline; its layers are stock ones again where no LoRA is left in them."""
    transformers = transformers_of(pipeline)
    for transformer in transformers:
        drop_weights(transformer, adapter.layer_name)
    if not any(adapter.layer_name in layer.lora_A for layer in tuner_layers(transformers)):
        return
    pipeline.delete_adapters(adapter.layer_name)
    if not any(len(layer.lora_A) for layer in tuner_layers(transformers)):
        pipeline.unload_lora_weights()


def switch_of(
    transformers: Sequence[Any], name: str, dense_blocks: Sequence[Sequence[str]]
) -> AdapterSwitch | WeightSwitch:
    """What turns an adapter on and off in transformers that have it; the arguments are those of `AdapterSwitch`."""
    kind = WeightSwitch if any(has_weights(transformer, name) for transformer in transformers) else AdapterSwitch
    return kind(transformers, name, dense_blocks)


class AdapterSwitch:
    """Turns the layers of one adapter on and off in transformers that have it, for inference; others stay as they are.

    Switching is a name in a list of each layer, a few milliseconds for all of a large model, and happens only when
    something changes. A compiled block has one graph with the adapter and one without.
    """

    def __init__(self, transformers: Sequence[Any], name: str, dense_blocks: Sequence[Sequence[str]]) -> None:
        """dense_blocks: of each transformer, the paths of the blocks whose attention always runs dense.

        Raises ValueError when no layer has an adapter of this name.
        """
        from peft.tuners.lora import LoraLayer

        self._name = name
        self._on: list[bool | None] = [None] * len(transformers)
        self._layers: list[list[tuple[Any, bool]]] = []
        """Of each transformer the layers that have the adapter, and whether their block always runs dense."""
        for transformer, blocks in zip(transformers, dense_blocks, strict=True):
            prefixes = tuple(f"{block}." for block in blocks)
            self._layers.append(
                [
                    (module, path.startswith(prefixes))
                    for path, module in transformer.named_modules()
                    if isinstance(module, LoraLayer) and name in module.lora_A
                ]
            )
        if not any(self._layers):
            raise ValueError(f"no layer of these transformers has an adapter named {name}")

    def set(self, transformer: int, on: bool) -> None:
        """Turn the adapter on, except in blocks that always run dense, or off everywhere."""
        if self._on[transformer] == on:
            return
        for layer, is_dense in self._layers[transformer]:
            others = [name for name in layer.active_adapters if not name.startswith(ADAPTER_NAME)]
            layer.set_adapter([*others, self._name] if on and not is_dense else others, inference_mode=True)
        self._on[transformer] = on

    def off(self) -> None:
        """Turn the adapter off in all transformers."""
        for transformer in range(len(self._layers)):
            self.set(transformer, False)


def active_adapters(pipeline: Any) -> list[str]:
    """Names of the adapters that a pipeline runs with."""
    layers = tuner_layers(transformers_of(pipeline))
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters if name in layer.lora_A))


def tuner_layers(transformers: Sequence[Any]) -> list[Any]:
    """peft's LoRA layers in transformers."""
    if importlib.util.find_spec("peft") is None:
        return []
    from peft.tuners.lora import LoraLayer

    return [module for transformer in transformers for module in transformer.modules() if isinstance(module, LoraLayer)]
