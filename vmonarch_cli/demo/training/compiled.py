"""Compiled blocks of the transformer. They are used only while their gradients are those of the code itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmonarch_cli.demo.training import loop
from vmonarch_cli.demo.training.middle_head import MiddleHead
from vmonarch_cli.demo.training.parts import compile_parts


class CompileBlocks(Protocol):
    """Gives every block of a transformer compiled code."""

    def __call__(self, transformer: Any, *, dynamic: bool) -> None: ...


@dataclass
class CompiledBlocks:
    """Compiles a transformer's blocks, and takes that back where it fails or gives other gradients.

    Args:
        transformer: of diffusers; its blocks are compiled one for all.
        middle_head: listens to a block anew after each change.
        log: told how long compiling took, or why it failed.
        device: where it runs.
        compile_blocks: gives every block of the transformer compiled code; `dynamic`: for clips of several lengths and
            sizes.
        kept: whether compiled blocks run.
        seconds: of compiling and comparing so far.

    """

    transformer: Any
    middle_head: MiddleHead
    log: loop.JsonLog
    device: torch.device
    compile_blocks: CompileBlocks = compile_parts
    kept: bool = False
    seconds: float = 0.0

    def compile(self, *, dynamic: bool) -> None:
        """Compile the blocks; `dynamic`: for clips of several lengths and sizes."""
        # One compilation serves all lengths and sizes, if it does not take numbers that are equal by chance for one.
        torch.fx.experimental._config.use_duck_shape = False
        # More of them than this would end the training: graphs are whole ones.
        torch._dynamo.config.recompile_limit = 32
        self.compile_blocks(self.transformer, dynamic=dynamic)
        self.middle_head.listen_to(self.transformer)
        self.kept = True

    def keep_if_right(
        self, objectives: Iterable[tuple[str, Callable[[], Tensor]]], *, compare_first: bool = False
    ) -> None:
        """Try objectives, each with the name of its clips, without an update; where one fails, or code that it is the
        first to run has other gradients than without compilation, say so and go on eagerly.

        `compare_first`: compare the first one in any case, because what runs beside the compiled code is new.
        """
        began = time.monotonic()
        for name, objective in objectives:
            if not self.kept:
                break
            if not loop.trial(self.log, f"dit, {name}", self.device, partial(self._try, objective, compare_first)):
                for block in self.transformer.blocks:
                    block._compiled_call_impl = None
                self.middle_head.listen_to(self.transformer)
                self.kept = False
            compare_first = False
        self.seconds += time.monotonic() - began

    def _try(self, objective: Callable[[], Tensor], compare: bool) -> None:
        """Run what may compile, and compare it with the code itself where it did, or if told to."""
        known = _compilations()
        objective().backward()
        if compare or _compilations() > known:
            compare_compiled(list(self.transformer.parameters()), lambda: objective().backward())


def compare_compiled(parameters: Sequence[nn.Parameter], backward: Callable[[], None]) -> None:
    """Run `backward` compiled and not, and raise ArithmeticError where the norms of the gradients differ by 5 %."""

    def norm() -> float:
        for parameter in parameters:
            parameter.grad = None
        backward()
        return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    with torch.compiler.set_stance("force_eager"):
        expected = norm()
    found = norm()
    if not math.isclose(found, expected, rel_tol=0.05):
        raise ArithmeticError(f"the gradient's norm is {found:.4g} compiled and {expected:.4g} otherwise")


def _compilations() -> int:
    """How many graphs this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
