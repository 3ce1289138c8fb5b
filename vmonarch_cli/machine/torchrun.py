"""What torchrun tells a process about itself, read without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vmonarch_cli.errors import InputError


@dataclass(frozen=True)
class Rank:
    """Number of this process, how many there are, and its number on this host."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints, and writes what all of them made together."""
        return self.rank == 0


def read_rank() -> Rank:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; InputError when they are not numbers."""
    values = []
    for name, otherwise in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name) or otherwise
        if not text.isascii() or not text.isdigit():
            raise InputError(f"the environment's {name} takes a whole number, as torchrun sets it, got {text!r}")
        values.append(int(text))
    return Rank(*values)
