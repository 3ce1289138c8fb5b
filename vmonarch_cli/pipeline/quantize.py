"""8-bit arithmetic: the projections of a transformer's blocks compute in fp8 or int8, through torchao.

Weights have a scale for each output channel, made once; activations one for each token, made in every call. What is
converted are the linear layers within the blocks: attention's and feed-forward's, where nearly all of the time goes.
Everything else stays as it is: embeddings and the head, whose errors no later layer corrects; norms; and the layers
that make modulations from the timestep, which run once for a whole sample and would gain nothing.
"""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import Any

import torch

from vmonarch_cli.errors import DeviceError, InputError
from vmonarch_cli.families.fusing import TAKES_ROWS
from vmonarch_cli.plan.setup import COMPUTED, NEEDS_TORCHAO, STORED, QuantizeFacts
from vmonarch_kernels import Rows, linear_e4m3

_MODULATION = ("norm", "modulation", "adaln")
"""In the names of layers that make scales, shifts and gates."""
_MULTIPLE = 16
"""Of both sides of a weight, as products in 8 bits take them."""


def check_quantize(kind: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Whether this machine can run `--quantize kind`; DeviceError or InputError in one sentence where it cannot.

    Reads the device's compute capability, and imports nothing of torchao.
    """
    if kind in NEEDS_TORCHAO and importlib.util.find_spec("torchao") is None:
        raise InputError(f'--quantize {kind} needs torchao: pip install "vmonarch[quantize]", or use fp8-storage')
    facts = COMPUTED.get(kind or "")
    if facts is None:
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or torch.version.cuda is None or capability < facts.capability:
        raise DeviceError(_unable(kind, facts, capability))
    if kind == "fp8" and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"--quantize fp8 computes beside bfloat16, and --dtype is {name}: valid beside {name} are int8, "
            f"{' and '.join(STORED)}"
        )


def _unable(kind: str | None, facts: QuantizeFacts, capability: tuple[int, int] | None) -> str:
    if capability is None:
        here = "this run is on the CPU"
    elif torch.version.cuda is None:
        here = "this GPU is none of NVIDIA's"
    else:
        here = f"this GPU has {capability[0]}.{capability[1]}"
    nvidia = capability is not None and torch.version.cuda is not None
    able = [name for name, other in COMPUTED.items() if nvidia and capability and capability >= other.capability]
    return (
        f"--quantize {kind} computes in {kind}, which needs an NVIDIA GPU of compute capability "
        f"{facts.capability[0]}.{facts.capability[1]} or later, and {here}: valid here are "
        f"{', '.join([*able, STORED[0]])} and {STORED[1]}"
    )


def projections(transformer: Any) -> dict[str, torch.nn.Linear]:
    """Name -> each linear layer of a transformer that 8-bit arithmetic takes: those within its lists of blocks, without
    modulations, an adapter's own matrices, and layers whose sides are no multiples of 16.
    """
    blocks = {name for name, child in transformer.named_children() if isinstance(child, torch.nn.ModuleList)}
    found = {}
    for name, module in transformer.named_modules():
        parts = name.split(".")
        if not isinstance(module, torch.nn.Linear) or parts[0] not in blocks:
            continue
        if any(part.startswith("lora_") or any(word in part for word in _MODULATION) for part in parts):
            continue
        if module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0:
            found[name] = module
    return found


def compute_in(transformer: Any, kind: str, device: torch.device, *, back: bool = False) -> int:
    """Convert a transformer's projections to `kind` ("fp8" or "int8") on `device`, one at a time; how many there were.

    Goes behind everything that reads or changes weights: LoRA, adapters. Beside the converted layers the device holds
    one in its own dtype. back: move each converted layer to where it was. InputError for a transformer without such
    layers, or a device or dtype that cannot (see `check_quantize`).
    """
    from torchao.quantization import quantize_

    found = projections(transformer)
    if not found:
        raise InputError(f"--quantize {kind}: this {type(transformer).__name__} has no projections to convert")
    for layer in found.values():
        before = layer.weight.device
        layer.to(device)
        quantize_(layer, _config(kind))
        if kind == "fp8":
            layer.forward = MethodType(_forward_fp8, layer)  # type: ignore[method-assign]
        if back:
            layer.to(before)
    return len(found)


def _forward_fp8(self: torch.nn.Linear, x: torch.Tensor | Rows) -> torch.Tensor:
    """The layer's product: eager torch quantises x in one kernel of ours, where torchao's would take six passes, or not
    at all where the pass that wrote x has done so; a compiler makes one pass of those, or none beside what wrote x.
    """
    if torch.compiler.is_compiling() and not isinstance(x, Rows):
        return torch.nn.functional.linear(x, self.weight, self.bias)
    weight: Any = self.weight
    return linear_e4m3(x, weight.qdata, weight.scale, self.bias)


setattr(_forward_fp8, TAKES_ROWS, True)


def _config(kind: str) -> Any:
    # Inductor's settings belong to the whole process, and torchao would change them.
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )

    if kind == "fp8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
