"""Several processes on one clip, started by torchrun: attention is split by heads (Ulysses) and rank 0 writes."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from vmonarch_cli.errors import InputError
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.pipeline.parts import transformers_of


def split(pipeline: Any, device: torch.device) -> None:
    """Split the transformers over all processes of a torchrun; nothing to do for a single one.

    Raises InputError for a family that diffusers has no plan for, and for heads that cannot be shared out evenly.
    """
    count = read_rank().world
    if count == 1:
        return
    from diffusers import ContextParallelConfig

    # diffusers calls functions of torch that newer versions of torch warn about, in every process.
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    for transformer in transformers_of(pipeline):
        name, heads = type(transformer).__name__, transformer.config.num_attention_heads
        if getattr(transformer, "_cp_plan", None) is None:
            raise InputError(
                f"{name} cannot be split over {count} processes: diffusers has no context-parallel plan for it "
                "(it has one for Wan and LTX-Video)"
            )
        if FAMILIES[name].parallel_obstacle is not None:
            raise InputError(f"{name} cannot be split over {count} processes: {FAMILIES[name].parallel_obstacle}")
        if heads % count:
            raise InputError(f"{count} processes cannot share the {heads} heads of {name} evenly")
    if not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_stop)
    with nullcontext() if device.type == "cuda" else _cpu_as_an_accelerator():
        for transformer in transformers_of(pipeline):
            plan = FAMILIES[type(transformer).__name__].parallel_plan(transformer)
            transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count), cp_plan=plan)
            for name, module in transformer.named_modules():
                if name.endswith(".attn2"):  # all of the text for a part of the video: nothing to exchange
                    module.processor._parallel_config = None


def check_tokens(tokens: int) -> None:
    """InputError when the clip's tokens cannot be shared out evenly."""
    count = read_rank().world
    if tokens % count:
        raise InputError(
            f"{count} processes cannot share {tokens:,} tokens evenly: choose a size with a number of latent "
            f"rows or columns that {count} divides"
        )


@contextmanager
def _cpu_as_an_accelerator() -> Iterator[None]:
    """diffusers 0.42 divides by the number of accelerators, which is 0 on a machine without a GPU."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def _stop() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
