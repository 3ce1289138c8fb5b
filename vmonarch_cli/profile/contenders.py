"""The ways to run a transformer's self-attention that take turns on one model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.attention.structured import AttentionCall
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.pipeline.fuse import fused
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.setup import AdapterFile
from vmonarch_cli.plan.tuned import adapter_names
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.profile.results import QUANTISED, StepRow
from vmonarch_kernels import dense_backends, dense_choices
from vmonarch_kernels.cost import refresh_period
from vmonarch_kernels.dense import is_quantised
from vmonarch_kernels.dense_facts import PACKAGES

DENSE_ON_CPU = "sdpa"
_DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    DENSE_ON_CPU: None,
}


def skip_attention(call: AttentionCall) -> Tensor:
    """A copy of the call's values, as large a write as an attention's output: what is left of a step is the floor of
    everything else.
    """
    return call.v.clone(memory_format=torch.contiguous_format)


@dataclass
class Contender:
    """A way to run the transformer's self-attention; `enter` puts it in place for a step."""

    row: StepRow
    enter: Callable[[], Any]
    session: AttentionSession | None = None
    period: int = 1
    """After so many steps their work repeats."""
    seconds: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def contenders(
    transformer: Any,
    presets: Sequence[Preset],
    device: torch.device,
    dtype: torch.dtype,
    backends: Sequence[str] = (),
    masked: bool = False,
    adapters: Sequence[AdapterFile] = (),
    head_dim: int = 128,
) -> list[Contender]:
    """Every dense backend of the device and every package that fits (or those named), every structured preset, those
    with an adapter that the transformer has, and skipped attention.

    ``masked``: the stock model masks padding of its text, which keeps SDPA from its fastest path (and FlashAttention
    takes no mask), so preset `dense`, which leaves the padding out, takes part as well.
    """
    layers = FAMILIES[type(transformer).__name__].self_attentions(transformer)
    dense = load_preset("dense")
    found = []
    for name in backends or _dense_names(device, dtype, masked, head_dim):
        row = StepRow(name, "dense", note=QUANTISED if is_quantised(name) else "")
        if name in PACKAGES:
            found.append(structured(transformer, row, AttentionSession(dense, [len(layers)], dense=(name,))))
        else:
            found.append(Contender(row, functools.partial(_dense, layers, _DENSE[name])))
    if masked:
        found.append(structured(transformer, StepRow(dense.name, "dense"), AttentionSession(dense, [len(layers)])))
    tuned = [(name, t.adapter.made_for, t.layer_name) for name, t in adapter_names(adapters).items()]
    for name, preset, adapter in [*((preset.name, preset, None) for preset in presets), *tuned]:
        if preset.attention != "dense":
            found.append(_of_preset(transformer, name, preset, adapter))
    return [*found, skipped(transformer, len(layers))]


def _of_preset(transformer: Any, name: str, preset: Preset, adapter: str | None = None) -> Contender:
    """A structured preset, from its first structured step on."""
    # Dense first steps would be measured as if they were structured; the clip's time counts them.
    measured = preset.model_copy(update={"dense_steps": 0})
    layers = len(FAMILIES[type(transformer).__name__].self_attentions(transformer))
    row = StepRow(name, "structured", note="warm" if preset.warm_start else "")
    contender = structured(transformer, row, AttentionSession(measured, [layers]), adapter)
    return replace(contender, period=refresh_period(preset.refresh))


def fused_blocks(transformer: Any, stock: Contender, how: str, impl: str) -> Contender:
    """What a contender does with its attention, among fused blocks of `impl`, "triton" or "torch"; the stock blocks are
    back after every step. `how` ends the row's name.
    """
    layers = [len(FAMILIES[type(transformer).__name__].self_attentions(transformer))]
    row = replace(stock.row, name=f"{stock.row.name}, {how}", stock=stock.row.name)
    if row.kind == "skipped":
        within = skipped(transformer, layers[0])
    elif stock.session is None:  # fused blocks have their dense attention from a session, too
        session = AttentionSession(load_preset("dense"), layers, dense=(stock.row.name,))
        within = structured(transformer, row, session)
    else:
        session = AttentionSession(stock.session.preset, layers, dense=stock.session.dense)
        within = structured(transformer, row, session)

    @contextmanager
    def enter() -> Iterator[None]:
        with fused(transformer, impl), within.enter():
            yield

    return replace(within, row=row, period=stock.period, enter=enter)


def skipped(transformer: Any, layers: int) -> Contender:
    """The transformer without its self-attention."""
    session = AttentionSession(Preset(name="skipped"), [layers], attention=skip_attention)
    return structured(transformer, StepRow("skipped", "skipped"), session)


def structured(transformer: Any, row: StepRow, session: AttentionSession, adapter: str | None = None) -> Contender:
    """The transformer with its attention swapped; the session keeps its warm state from step to step."""
    enter = functools.partial(swapped, [transformer], session.preset, session=session, adapter=adapter)
    return Contender(row, enter, session)


def _dense_names(device: torch.device, dtype: torch.dtype, masked: bool, head_dim: int) -> list[str]:
    if device.type != "cuda":
        return [DENSE_ON_CPU]
    known = [name for name in dense_backends(device, dtype) if not (masked and name == "flash")]
    packages = [name for name in dense_choices("auto", device, dtype, head_dim) if name in PACKAGES]
    return [*packages, *([name for name in known if name in ("cudnn", "flash")] or known[:1])]


@contextmanager
def _dense(layers: dict[int, Any], backend: SDPBackend | None) -> Iterator[None]:
    """The stock model under one SDPA backend (None: torch's choice).

    Each backend gets a subclass of the stock processor that adds nothing: compiled graphs, in which the choice is
    frozen, are told apart by the class.
    """
    with ExitStack() as undo:
        for module in layers.values():
            stock = module.processor
            undo.callback(setattr, module, "processor", stock)
            module.processor = copy.copy(stock)
            module.processor.__class__ = _subclass(type(stock), "" if backend is None else backend.name)
        if backend is not None:
            undo.enter_context(sdpa_kernel(backend))
        yield


_SUBCLASSES: dict[tuple[type, str], type] = {}


def _subclass(stock: type, name: str) -> type:
    """One class per backend, however often it takes its turn."""
    if (stock, name) not in _SUBCLASSES:
        _SUBCLASSES[stock, name] = type(f"{stock.__name__}{name}", (stock,), {})
    return _SUBCLASSES[stock, name]
