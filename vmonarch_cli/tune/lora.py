"""The LoRA that is trained: its layers in the transformers, its numbers as a file has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmonarch_cli.errors import ModelError
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.plan.setup import ADAPTER_NAME

PARTS = ("transformer", "transformer_2")


def add_lora(pipeline: Any, rank: int, dense_layers: int, seed: int) -> dict[str, nn.Parameter]:
    """Freeze the transformers and give them a LoRA: q, k, v and output of self-attention, and the feed-forward layers.

    Blocks whose attention always runs dense, the first `dense_layers`, get none: there is nothing to learn. Alpha is
    the rank, the numbers are float32, and the LoRA changes nothing before it is trained.

    Returns the trainable parameters under diffusers' names ("transformer.blocks.0.attn1.to_q.lora_A.weight").
    """
    from peft import LoraConfig

    for part, transformer in zip(PARTS, transformers_of(pipeline), strict=False):
        transformer.requires_grad_(False)
        targets = _targets(transformer, dense_layers)
        if not targets:
            raise ModelError(f"the {part} has no linear layers in its attention blocks that a LoRA could change")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
            transformer.add_adapter(config, adapter_name=ADAPTER_NAME)
    parameters = trainable(pipeline)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def _targets(transformer: Any, dense_layers: int) -> list[str]:
    """Paths of the linear layers of attention and feed-forward in the blocks that run structured."""
    family = FAMILIES[type(transformer).__name__]
    paths = {id(module): path for path, module in transformer.named_modules()}
    found: list[str] = []
    for number, attention in family.self_attentions(transformer).items():
        if number < dense_layers:
            continue
        path = paths[id(attention)]
        block = path.rpartition(".")[0]
        for name, module in transformer.get_submodule(block).named_modules():
            full = f"{block}.{name}"
            inside = full.startswith(f"{path}.") or name.startswith("ff")
            if inside and isinstance(module, nn.Linear):
                found.append(full)
    return list(dict.fromkeys(found))


def trainable(pipeline: Any) -> dict[str, nn.Parameter]:
    """The LoRA's parameters under the names that files have, in the order of names."""
    found = {
        f"{part}.{name.replace(f'.{ADAPTER_NAME}.', '.')}": parameter
        for part, transformer in zip(PARTS, transformers_of(pipeline), strict=False)
        for name, parameter in transformer.named_parameters()
        if f".{ADAPTER_NAME}." in name
    }
    return dict(sorted(found.items()))


def put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
