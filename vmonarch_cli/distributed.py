"""Several processes on one clip, started by torchrun: attention is split by heads (Ulysses) and rank 0 writes."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch

from vmonarch_cli.additions import transformers_of
from vmonarch_cli.errors import InputError


def world_size() -> int:
    """Processes of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device() -> torch.device:
    """The GPU of this process, or the CPU on a machine without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def split(pipeline: Any, device: torch.device) -> None:
    """Split the transformers over all processes of a torchrun; nothing to do for a single one.

    Raises InputError for a family that diffusers has no plan for, and for heads that cannot be shared out evenly.
    """
    count = world_size()
    if count == 1:
        return
    from diffusers import ContextParallelConfig

    for transformer in transformers_of(pipeline):
        name, heads = type(transformer).__name__, transformer.config.num_attention_heads
        if getattr(transformer, "_cp_plan", None) is None:
            raise InputError(
                f"{name} cannot be split over {count} processes: diffusers has no context-parallel plan for it "
                "(it has one for Wan)"
            )
        if name.startswith("LTX"):
            # In 0.42.1 the unswapped model fails, too: its mask has all heads where each process has a part of them.
            raise InputError(
                f"{name} cannot be split over {count} processes: diffusers' plan for it fails on the mask of its text"
            )
        if heads % count:
            raise InputError(f"{count} processes cannot share the {heads} heads of {name} evenly")
    if not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_stop)
    for transformer in transformers_of(pipeline):
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))


def check_tokens(tokens: int) -> None:
    """InputError when the clip's tokens cannot be shared out evenly."""
    if tokens % world_size():
        raise InputError(
            f"{world_size()} processes cannot share {tokens:,} tokens evenly: choose a size with a number of latent "
            f"rows or columns that {world_size()} divides"
        )


def _stop() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
