"""What is trained, a LoRA or all weights, behind one face: parameters for the optimiser, modules to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.machine.group import Group
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.tune.lora import PARTS, add_lora
from vmonarch_cli.tune.request import TunePlan

NoSync = Callable[[], Any]


class Trained(Protocol):
    """The weights that a training changes."""

    parameters: Mapping[str, nn.Parameter]
    """Of the optimiser, in float32, under the names of files."""
    runs: Sequence[Any]
    """What to call instead of the transformers."""
    no_sync: Sequence[NoSync]
    """For each of them a context without exchange of gradients between processes; none for one process."""
    dtype: torch.dtype
    """What latents go into the transformers in."""

    def gather(self) -> None:
        """Bring the gradients to the parameters."""

    def spread(self) -> None:
        """Bring the parameters' values to the model."""


class TrainedLora:
    """A LoRA in the transformers, whose float32 numbers the model itself computes with."""

    def __init__(self, pipeline: Any, plan: TunePlan, group: Group) -> None:
        self.parameters: Mapping[str, nn.Parameter] = add_lora(
            pipeline, plan.rank, plan.clip.preset.dense_layers, plan.seed
        )
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.runs: Sequence[Any]
        self.no_sync: Sequence[NoSync]
        self.runs, self.no_sync = group.wrap(transformers_of(pipeline))

    def gather(self) -> None:
        """The model's parameters are the optimiser's."""

    def spread(self) -> None:
        """The model's parameters are the optimiser's."""


class TrainedWeights:
    """All weights of the transformers, but for blocks whose attention always runs dense: these have nothing to learn.

    One process computes with weights in the model's dtype and keeps float32 copies for the optimiser. Several processes
    have a part of each weight in float32 (torch's FSDP2), and compute with what they gather in the model's dtype.
    """

    def __init__(self, pipeline: Any, plan: TunePlan, group: Group) -> None:
        transformers = transformers_of(pipeline)
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.no_sync: Sequence[NoSync] = []
        self.runs: Sequence[Any] = transformers
        self.dtypes: dict[str, torch.dtype] = {}
        """What the model has each weight in, under the names of files."""
        for part, transformer in zip(PARTS, transformers, strict=False):
            dense = dense_blocks(transformer, plan.clip.preset.dense_layers)
            for name, parameter in transformer.named_parameters():
                parameter.requires_grad_(not name.startswith(dense))
                if parameter.requires_grad:
                    self.dtypes[f"{part}.{name}"] = parameter.dtype
        if group.world > 1:
            for transformer in transformers:
                group.shard(transformer, [module for _, module in blocks_of(transformer)], self.dtype)
            self.no_sync = [_without_exchange(transformer) for transformer in transformers]
        self._own = {
            f"{part}.{name}": parameter
            for part, transformer in zip(PARTS, transformers, strict=False)
            for name, parameter in transformer.named_parameters()
            if parameter.requires_grad
        }
        self.parameters: Mapping[str, nn.Parameter] = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self._own.items()
        }

    def gather(self) -> None:
        """Gradients in float32."""
        for name, parameter in self.parameters.items():
            own = self._own[name]
            if own is not parameter:
                parameter.grad = None if own.grad is None else own.grad.float()
                own.grad = None

    @torch.no_grad()
    def spread(self) -> None:
        """Values, rounded to what the model has."""
        for name, parameter in self.parameters.items():
            if self._own[name] is not parameter:
                self._own[name].copy_(parameter)


def blocks_of(transformer: Any) -> list[tuple[str, nn.Module]]:
    """(path, module) of the blocks that self-attention layers are in, by the layers' numbers."""
    family = FAMILIES[type(transformer).__name__]
    paths = {id(module): path for path, module in transformer.named_modules()}
    found = [paths[id(module)].rpartition(".")[0] for _, module in sorted(family.self_attentions(transformer).items())]
    return [(path, transformer.get_submodule(path)) for path in dict.fromkeys(found)]


def dense_blocks(transformer: Any, dense_layers: int) -> tuple[str, ...]:
    """How the names of weights begin in the blocks of the first `dense_layers` layers."""
    return tuple(f"{path}." for path, _ in blocks_of(transformer)[:dense_layers])


def _without_exchange(transformer: Any) -> NoSync:
    @contextmanager
    def block() -> Iterator[None]:
        transformer.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            transformer.set_requires_gradient_sync(True)

    return block


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process may have a part, whole; all processes must ask."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def parted(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor with the device, and the parts, of another one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
