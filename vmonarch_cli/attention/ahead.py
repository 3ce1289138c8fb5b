"""Kernels compiled while the model loads: their shapes follow from the plan, and nothing has to wait for weights."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Protocol

import torch

from vmonarch_cli.attention.structured import AttentionCall, StructuredAttention
from vmonarch_cli.attention.warm import CallKey
from vmonarch_cli.plan.costs import branches_of
from vmonarch_cli.plan.plan import Plan

_WORKERS = min(4, os.cpu_count() or 1)


class Compilable(Protocol):
    """A kernel that is still to be compiled."""

    def compile(self) -> None: ...


Find = Callable[[Callable[[], object]], Sequence[Compilable]]
"""What a function would compile; see `vmonarch_kernels.ahead.pending`."""


class KernelsAhead:
    """Compiles in threads of its own from the moment that it is made. Nothing that goes wrong there is raised: a kernel
    that could not be compiled ahead is compiled, or fails, where it is needed.
    """

    def __init__(self, rehearse: Callable[[], object], find: Find) -> None:
        """`rehearse` makes the calls whose kernels are wanted; `find` says which these are."""
        self.compiled = 0
        """Kernels that are ready."""
        self.seconds = 0.0
        """From the start until the last of them was."""
        self.failure: Exception | None = None
        """The first thing that went wrong."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(rehearse, find), name="kernels-ahead")
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is compiled or has failed; at once after that."""
        self._thread.join()

    def stop(self) -> None:
        """Begin no further kernel; those that are being compiled end."""
        self._stopped.set()

    def _work(self, rehearse: Callable[[], object], find: Find) -> None:
        began = time.perf_counter()
        try:
            with torch.no_grad():
                kernels = find(rehearse)
            with ThreadPoolExecutor(_WORKERS, "kernels") as pool:
                list(pool.map(self._compile, kernels))
        except Exception as error:
            self.failure = self.failure or error
        self.seconds = time.perf_counter() - began

    def _compile(self, kernel: Compilable) -> None:
        if self._stopped.is_set():
            return
        try:
            kernel.compile()
            self.compiled += 1
        except Exception as error:
            self.failure = self.failure or error


def start(*rehearsals: Callable[[], object]) -> KernelsAhead:
    """Compile what the rehearsals would launch on a GPU."""
    from vmonarch_kernels.ahead import pending

    return KernelsAhead(lambda: [one() for one in rehearsals], pending)


def rehearse(plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
    """The kinds of structured calls that a clip of the plan makes: the first step's and a later one's, of each guidance
    branch, on tensors of the true shape with any content, text keys aside.
    """
    model, dense_steps = plan.model, int(plan.preset.dense_steps)
    attention = StructuredAttention(plan.preset, [model.layers] * model.transformers)
    tokens = plan.grid[0] * plan.grid[1] * plan.grid[2]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        q, k, v = (torch.empty(1, tokens, model.heads, model.head_dim, dtype=dtype, device=device) for _ in range(3))
        forwards = branches_of(model, plan.guidance_scale)
        for step in range(dense_steps, min(dense_steps + 2, plan.steps)):
            for forward in range(forwards):
                attention(
                    AttentionCall(
                        q,
                        k,
                        v,
                        text=None,
                        grid=plan.grid,
                        step=step,
                        key=CallKey(0, 0, forward),
                        forwards=forwards,
                        steps=plan.steps,
                    )
                )
