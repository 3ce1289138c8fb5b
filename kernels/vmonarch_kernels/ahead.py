"""Compile Triton kernels before they are needed, several at a time.

A call is gone through once without compiling or launching anything: Triton tells a hook of each kernel that it would
compile, with all that decides about the code. These are then compiled from several threads; the compiler works outside
Python's lock. Afterwards the call finds every kernel.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from triton import knobs


class Pending(NamedTuple):
    """A kernel that is still to be compiled."""

    kernel: Any
    """Triton's JITFunction."""
    specialization: str
    """Types, constants and options, as Triton writes them down."""

    def compile(self) -> None:
        """Compile it, or read it from Triton's cache; raises whatever the compiler raises."""
        self.kernel.preload(self.specialization)


def pending(run: Callable[[], object]) -> list[Pending]:
    """The kernels, each once, that `run` would compile in this thread.

    None of them is compiled or launched, so that what `run` computes is undefined; kernels that were compiled before
    are launched. Other threads are not affected.
    """
    thread = threading.get_ident()
    found: dict[tuple[str, str], Pending] = {}

    def note(*args: Any, **kwargs: Any) -> bool | None:
        if threading.get_ident() != thread:
            return before(*args, **kwargs) if before is not None else None
        kernel = Pending(kwargs["fn"].jit_function, kwargs["compile"]["specialization_data"])
        found[kernel.kernel.__name__, kernel.specialization] = kernel
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found.values())
