"""A batch under torchrun: its processes work apart, and share nothing but the folder."""

from __future__ import annotations

import os
from dataclasses import replace

from vmonarch_cli.machine.torchrun import Rank
from vmonarch_cli.plan.request import GenerateRequest

_GROUP = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"}
_GROUP |= {"ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}


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
