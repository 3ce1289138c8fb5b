"""How the demo's own commands end where something cannot be done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from vmonarch_cli.errors import VmonarchError


@contextmanager
def one_sentence() -> Iterator[None]:
    """A VmonarchError of the block is shown on stderr, and becomes a SystemExit with its exit code."""
    try:
        yield
    except VmonarchError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error.message}", markup=False, highlight=False)
        raise SystemExit(error.exit_code) from None
