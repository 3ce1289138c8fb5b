"""The processes of a torchrun that train together: torch's own DDP, and what they must agree on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vmonarch_cli.machine.torchrun import read_rank


@dataclass(frozen=True)
class Group:
    """One process, or one of several."""

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    host: Any = None
    """Of the same processes over the CPU, where the main group is of GPUs (a torch process group); see `joined`."""

    def agree(self, *values: float) -> tuple[float, ...]:
        """The first process's values, in all of them; with `host` no GPU is waited for."""
        if self.world == 1:
            return values
        device = self.device if self.host is None else None
        shared = torch.tensor(values, dtype=torch.float64, device=device)
        dist.broadcast(shared, 0, group=self.host)
        return tuple(shared.tolist())

    @torch.no_grad()
    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors, as many and of the same shapes in each process, by their means: one exchange for all."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(self.world).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

    def mean(self, value: float) -> float:
        """The mean over all processes."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        return float(shared) / self.world

    def apart(self, tensors: Sequence[torch.Tensor]) -> float:
        """The relative difference of the norm of all tensors from its mean over all processes: 0 where they are equal
        (and where only their norms are).
        """
        norm = float(torch.nn.utils.get_total_norm(tensors))
        return abs(self.mean(norm) - norm) / norm

    def wait(self) -> float:
        """Until all processes are here; the seconds that it took."""
        began = time.monotonic()
        if self.world > 1:
            dist.barrier(group=self.host)
        return time.monotonic() - began

    def wrap(self, transformers: Sequence[Any]) -> tuple[list[Any], list[Callable[[], Any]]]:
        """(what to call instead of the transformers, for each a context without exchange of gradients)."""
        if self.world == 1:
            return list(transformers), []
        from torch.nn.parallel import DistributedDataParallel

        wrapped = [DistributedDataParallel(transformer) for transformer in transformers]
        return list(wrapped), [module.no_sync for module in wrapped]

    def shard(self, transformer: Any, blocks: Sequence[Any], dtype: torch.dtype) -> None:
        """Give each process a part of every weight, in float32 (torch's FSDP2). Forwards gather them in `dtype`, block
        by block, and gradients are the mean over the processes.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        transformer.float()
        kind = "cpu" if self.device is None else self.device.type
        settings: Any = {
            "mesh": init_device_mesh(kind, (self.world,)),
            # Timesteps must not be rounded: the pipeline's own loop gives them in full.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
        }
        for module in [*blocks, transformer]:
            fully_shard(module, **settings)


@contextmanager
def joined(device: torch.device, *, host: bool = False) -> Iterator[Group]:
    """The processes that torchrun started, connected inside the block; one process alone connects nothing.

    `host`: connect them over the CPU as well, for `Group.agree`.
    """
    rank = read_rank()
    if rank.world == 1:
        yield Group(device=device)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank.rank, world_size=rank.world)
    try:
        # GPUs connect in their first exchange: now, where what keeps them from it is told from slow work.
        dist.all_reduce(torch.zeros(1, device=device))
        over_cpu = dist.new_group(backend="gloo") if host and device.type == "cuda" else None
        yield Group(rank.rank, rank.world, device, over_cpu)
    finally:
        dist.destroy_process_group()
