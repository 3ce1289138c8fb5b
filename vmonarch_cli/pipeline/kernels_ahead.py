"""Whether a run compiles its kernels while the model loads, and the start of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vmonarch_cli.attention import ahead
from vmonarch_cli.attention.ahead import KernelsAhead
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.device import DTYPES
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan


def start_kernels(plan: Plan, machine: Machine) -> KernelsAhead | None:
    """Begin to compile the kernels of a plan's clips; None where nothing compiles, or where the shapes of the calls do
    not follow from the plan.
    """
    family = FAMILIES[PIPELINES[plan.model.pipeline].transformer]
    structured = plan.preset.dense_steps < plan.steps and plan.preset.dense_layers < plan.model.layers
    if not machine.on_gpu or machine.impl_of(plan.preset) != "triton" or not (family.plain_calls and structured):
        return None
    return ahead.start(plan, torch.device(machine.device), DTYPES[machine.dtype])


@contextmanager
def stopped_by_errors(kernels: KernelsAhead | None) -> Iterator[None]:
    """Whatever the block raises, no further kernel is begun."""
    try:
        yield
    except BaseException:
        if kernels is not None:
            kernels.stop()
        raise
