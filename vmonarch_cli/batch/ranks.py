"""What torchrun tells a process about itself; the environment is all that its processes share besides the folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from vmonarch_cli.errors import InputError
from vmonarch_cli.plan import GenerateRequest

_GROUP = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"}
_GROUP |= {"ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(frozen=True)
class Rank:
    """Number of this process, how many there are, and its number on this host."""

    rank: int = 0
    world: int = 1
    local: int = 0


def read_rank() -> Rank:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; InputError when they are not numbers."""
    values = []
    for name, otherwise in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name) or otherwise
        if not text.isascii() or not text.isdigit():
            raise InputError(f"the environment's {name} takes a whole number, as torchrun sets it, got {text!r}")
        values.append(int(text))
    return Rank(*values)


def leave_group() -> None:
    """Hide torchrun from the libraries, which would otherwise try to join a group of processes that is not there."""
    for name in [name for name in os.environ if name in _GROUP or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]


def on_own_device(request: GenerateRequest, rank: Rank) -> GenerateRequest:
    """With torchrun, "auto" and "cuda" mean this process's own GPU (imports torch only then)."""
    if rank.world == 1 or request.device not in (None, "auto", "cuda"):
        return request
    import torch

    if request.device == "cuda" or torch.cuda.is_available():
        return replace(request, device=f"cuda:{rank.local}")
    return request
