"""Whether a run compiles its kernels while the model loads, and the start of that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vmonarch_cli.attention import ahead
from vmonarch_cli.attention.ahead import KernelsAhead
from vmonarch_cli.families.fusing import StreamShape
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.device import DTYPES
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan


def start_kernels(plan: Plan, machine: Machine) -> KernelsAhead | None:
    """Begin to compile the kernels of a plan's clips, of fused blocks and of attention; None where nothing compiles, or
    where the shapes of the calls do not follow from the plan.
    """
    family = FAMILIES[PIPELINES[plan.model.pipeline].transformer]
    structured = plan.preset.dense_steps < plan.steps and plan.preset.dense_layers < plan.model.layers
    structured = structured and not machine.runs_dense(plan)
    device, dtype = torch.device(machine.device), DTYPES[machine.dtype]
    rehearsals: list[Callable[[], object]] = []
    if machine.on_gpu and machine.fused_of(plan) == "triton" and family.rehearse_fused is not None:
        e4m3 = plan.setup.quantize == "fp8" and not plan.setup.compile
        stream = StreamShape(plan.tokens, plan.model.heads, plan.model.head_dim, dtype, device, e4m3)
        rehearsals.append(functools.partial(family.rehearse_fused, stream))
    if machine.on_gpu and machine.impl_of(plan.preset) == "triton" and family.plain_calls and structured:
        rehearsals.append(functools.partial(ahead.rehearse, plan, device, dtype))
    return ahead.start(*rehearsals) if rehearsals else None


@contextmanager
def stopped_by_errors(kernels: KernelsAhead | None) -> Iterator[None]:
    """Whatever the block raises, no further kernel is begun."""
    try:
        yield
    except BaseException:
        if kernels is not None:
            kernels.stop()
        raise
