"""Dense attention of a run: checked while the model loads, and ordered by measured time where clips are compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch

from vmonarch_cli.attention.clock import Clock
from vmonarch_cli.errors import DeviceError
from vmonarch_cli.pipeline.device import DTYPES
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_kernels import DenseUnavailable, dense_attention
from vmonarch_kernels.dense_facts import PACKAGES
from vmonarch_kernels.dense_packages import check


@contextmanager
def dense_ready(plan: Plan, machine: Machine) -> Iterator[None]:
    """While the block runs, the packages that compute dense attention are imported, compiled and checked on small
    tensors; DeviceError at its end for one that does not work. Nothing happens without such a package.
    """
    names = [name for name in machine.dense if name in PACKAGES]
    if not names:
        yield
        return
    with ThreadPoolExecutor(1, "dense") as pool:
        checked = pool.submit(_check, names, machine, plan.model.head_dim)
        yield
        try:
            checked.result()
        except DenseUnavailable as error:
            raise DeviceError(f"{error}, as in --dense-attention sdpa") from None


def _check(names: Sequence[str], machine: Machine, head_dim: int) -> None:
    for name in names:
        check(name, torch.device(machine.device), DTYPES[machine.dtype], head_dim)


def dense_words(machine: Machine) -> str:
    """What runs dense calls, and what it was compared with: 'fa4, the fastest here of fa4, sdpa'."""
    first, *others = machine.dense
    return f"{first}, the fastest here of {', '.join(machine.dense)}" if others else first


def fastest_first(plan: Plan, machine: Machine) -> Machine:
    """The machine with the dense attention first that is the fastest on tensors of the plan's shape, measured here.

    Only what "auto" stands for is ordered; DeviceError for a package that does not work.
    """
    if plan.setup.dense_attention != "auto" or len(machine.dense) < 2:
        return machine
    with dense_ready(plan, machine):
        pass
    device = torch.device(machine.device)
    model, clock = plan.model, Clock(device)
    shape = (1, plan.tokens, model.heads, model.head_dim)
    q, k, v = (torch.randn(shape, dtype=DTYPES[machine.dtype], device=device) for _ in range(3))
    times: dict[str, float] = {}
    for name in machine.dense:
        run = functools.partial(dense_attention, q, k, v, backend=name)
        try:
            run()  # plans and kernels are made
            start = clock.mark()
            run()
            stop = clock.mark()
            clock.settle()
            times[name] = clock.seconds(start, stop)
        except RuntimeError:  # a backend of torch that does not take such tensors
            continue
    return replace(machine, dense=tuple(sorted(times, key=lambda name: times[name])) or machine.dense)
