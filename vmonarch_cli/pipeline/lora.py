"""LoRA into a pipeline's transformers: every tensor of the file is applied, with its alpha and rank, or none is.

Files name layers as diffusers does, as the model's own code does ("blocks.0.self_attn.q"), or with underscores for dots
(kohya); `lora_names` has the tables, and for families without one diffusers' own converters are asked. Pairs of
matrices are peft's; what changes a parameter outright (norms, biases, modulations, DoRA) is added to it at loading.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.lora import check_shapes, lora_tensors
from vmonarch_cli.models.lora_facts import LoraSettings, targets
from vmonarch_cli.models.lora_files import LoraFile, lora_files, parse_lora
from vmonarch_cli.models.weights import read_header
from vmonarch_cli.pipeline.lora_changes import Changes, LoraWeights, apply_outright, changes_of
from vmonarch_cli.pipeline.lora_names import LayerNames
from vmonarch_cli.text import innermost_line, printable, with_article


class ReadLora(NamedTuple):
    """A LoRA file whose tensors were read and found to be whole."""

    file: LoraFile
    scale: float
    weights: LoraWeights


def read_loras(texts: tuple[str, ...], transformers: int) -> list[ReadLora]:
    """Every LoRA ('[high:|low:]path[:scale]') for a model of so many transformers; InputError or ModelError.

    What is wrong with a file is found here, before the model is read.
    """
    if texts and importlib.util.find_spec("peft") is None:
        raise InputError("--lora needs peft: pip install peft")
    files = [(file, lora.scale) for lora in map(parse_lora, texts) for file in lora_files(lora, transformers)]
    return [ReadLora(file, scale, read_weights(file)) for file, scale in files]


def load_loras(pipeline: Any, loras: Sequence[ReadLora]) -> None:
    """Load every LoRA with its scale; InputError or ModelError in one sentence.

    A LoRA of scale 0 is checked as any other and changes nothing, to the bit.
    """
    if loras and not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"--lora: diffusers loads no LoRA into {with_article(type(pipeline).__name__)}")
    scales: dict[str, dict[str, float]] = {}
    for index, lora in enumerate(loras):
        for component in load_lora(pipeline, lora, f"lora_{index}"):
            scales.setdefault(component, {})[f"lora_{index}"] = lora.scale
    for component, of_adapter in scales.items():
        getattr(pipeline, component).set_adapters(list(of_adapter), list(of_adapter.values()))


def load_lora(pipeline: Any, lora: ReadLora, adapter: str) -> list[str]:
    """Load one file; the components of the pipeline that have an adapter of its name now."""
    file, scale, weights = lora
    second = getattr(pipeline, "transformer_2", None) is not None
    goes = targets(file, weights.parts, 2 if second else 1)
    names = LayerNames(pipeline)
    weights = _converted(pipeline, weights, names)
    loaded: dict[str, Changes] = {}
    # First all of it is checked, then it is applied: a file that does not fit leaves the model as it was.
    for mark, transformers in goes.items():
        for second in transformers:
            name = "transformer_2" if second else "transformer"
            components = {"": getattr(pipeline, name), "connectors": getattr(pipeline, "connectors", None)}
            for component, changes in changes_of(weights, mark, names, components).items():
                loaded[component or name] = changes
    if scale == 0:
        return []
    for component, changes in loaded.items():
        module = getattr(pipeline, component)
        apply_outright(module, changes.outright, scale)
        _add_pairs(module, changes, adapter, file.name)
    return [component for component, changes in loaded.items() if changes.pairs]


def read_weights(file: LoraFile) -> LoraWeights:
    """The tensors of a file; ModelError for what is not supported, contradicts itself or is not finite."""
    headers = read_header(file.path)
    parts = lora_tensors(headers, file.name)
    check_shapes(parts, headers, file.name)
    with safe_open(file.path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    for part in parts:
        values = tensors[part.name]
        if part.part != "alpha" and not torch.isfinite(values.float()).all():
            raise ModelError(f"LoRA {file.name} holds values that are not finite, in {printable(part.name)}")
    settings = LoraSettings.of(file)
    if settings.dora and not any(part.part == "magnitude" for part in parts):
        raise ModelError(f"LoRA {file.name} is a DoRA by its settings, and it has no norms (lora_magnitude_vector)")
    return LoraWeights(file.name, tensors, parts, settings)


def _converted(pipeline: Any, weights: LoraWeights, names: LayerNames) -> LoraWeights:
    """The weights under diffusers' names, where only its converter knows the file's; else as they are."""
    layers = weights.by_layer(False).keys() | weights.by_layer(True).keys()
    if any(layer in names.of(layers) for layer in layers):
        return weights
    try:
        state: Mapping[str, torch.Tensor] = type(pipeline).lora_state_dict(dict(weights.tensors))
    except Exception:  # its converters fail in ways of their own on what they do not know
        return weights
    if state.keys() == weights.tensors.keys():
        return weights
    return LoraWeights(weights.source, state, lora_tensors(state, weights.source), LoraSettings())


def _add_pairs(module: Any, changes: Changes, adapter: str, source: str) -> None:
    """The pairs as a peft adapter of a component; ModelError when a layer did not get its part."""
    if not changes.pairs:
        return
    state: dict[str, torch.Tensor] = {}
    for name, (down, up) in changes.pairs.items():
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up.contiguous()}
    try:
        module.load_lora_adapter(state, prefix=None, adapter_name=adapter)
    except Exception as error:
        # diffusers and peft raise what they like: ValueError, KeyError, RuntimeError for another shape, OSError.
        raise ModelError(
            f"LoRA {source} does not fit this model ({innermost_line(error).rstrip('.')[:200]}): "
            "it must have been trained on the same model"
        ) from error
    modules = dict(module.named_modules())
    for name in changes.pairs:
        if adapter not in getattr(modules.get(name), "lora_A", {}):
            raise ModelError(f"LoRA {source} was loaded in part only: diffusers left out layer {name}")
