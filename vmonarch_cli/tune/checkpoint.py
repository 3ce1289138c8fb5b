"""Checkpoints of a training: one file, replaced as a whole, from which it goes on bit for bit.

Nothing else is needed: the order of the trajectories follows from the seed and the number of steps done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.tune.trained import parted, whole

_KEY = "vmonarch_checkpoint"


@dataclass
class TrainingProgress:
    """How far a training has come."""

    step: int = 0
    """Optimiser steps done."""
    rounds: int = 0
    """Batches of trajectories gone through."""
    seconds: float = 0.0
    """Of training, all runs together."""
    losses: list[float] = field(default_factory=list)
    """One a step."""


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    averages: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: TrainingProgress,
    *,
    write: bool = True,
) -> None:
    """Write all that training goes on from, atomically.

    write: whether this process writes; where several have a part of each weight, all of them must call.
    """
    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        value = whole(value.detach())
        if write:
            tensors[name] = value.cpu().contiguous()

    for name, parameter in parameters.items():
        keep(f"parameter/{name}", parameter)
        keep(f"average/{name}", averages[name])
        for key, value in optimizer.state[parameter].items():
            keep(f"{key}/{name}", value)
    if not write:
        return
    tensors["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
    said = {"step": progress.step, "rounds": progress.rounds, "seconds": progress.seconds}
    with atomic(path, overwrite=True) as temporary:
        save_file(tensors, temporary, {"format": "pt", _KEY: json.dumps(said)})


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], averages: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> TrainingProgress:
    """Put a checkpoint into parameters, averages and optimiser; InputError when it is not of this training."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            said: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(parted(tensors[f"parameter/{name}"], parameter))
                averages[name] = parted(tensors[f"average/{name}"], parameter)
                optimizer.state[parameter] = {
                    key: value if key == "step" else parted(value, parameter)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if (value := tensors.get(f"{key}/{name}")) is not None
                }
        return TrainingProgress(said["step"], said["rounds"], said["seconds"], tensors["losses"].tolist())
    except Exception as error:
        raise InputError(f"checkpoint {path} cannot be gone on from: pass --overwrite to start anew") from error
