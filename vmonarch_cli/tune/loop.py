"""Training: AdamW with a warm-up, clipped gradients and a moving average of the weights, over the trajectories."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vmonarch_cli.errors import NonFiniteError
from vmonarch_cli.machine.group import Group
from vmonarch_cli.tune.checkpoint import TrainingProgress, load_checkpoint, save_checkpoint
from vmonarch_cli.tune.request import TRAINING_NOISE
from vmonarch_cli.tune.student import Student
from vmonarch_cli.tune.trained import Trained, whole
from vmonarch_cli.tune.trajectories import Trajectories

AVERAGE = 0.98
"""Decay of the moving average of the weights, once it has run for long enough."""
WARM_UP = 10
"""Steps in which the learning rate rises."""
CLIP = 1.0
"""Largest norm of the gradient."""
CHECKPOINT_EVERY_S = 20.0
"""As many times the seconds that the last one took, where that was more than one."""
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class TrainingSchedule:
    """When training ends, and how fast it learns until then."""

    lr: float
    steps: int | None
    seconds: float | None
    """Of training; whichever ends first."""

    def done(self, step: int, seconds: float) -> float:
        """Share of the training that is over, 1 at its end."""
        of_steps = step / self.steps if self.steps else 0.0
        of_seconds = seconds / self.seconds if self.seconds else 0.0
        return min(1.0, max(of_steps, of_seconds))

    def rate(self, step: int, done: float) -> float:
        """Learning rate of a step (from 0): a rise, a plateau, and a linear fall in the second half."""
        return self.lr * min(1.0, (step + 1) / WARM_UP) * min(1.0, max(0.02, 2 * (1 - done)))


@dataclass(frozen=True)
class TrainStep:
    """What a step of training came to."""

    step: int
    """Steps done."""
    steps: int | None
    loss: float
    rate: float
    done: float
    """Share of the training that is over."""
    seconds: float
    """Of training so far."""


def order(seed: int, count: int, first: int, length: int) -> list[int]:
    """Numbers of the trajectories at places `first`, `first` + 1, ... of an endless list of shuffled rounds."""
    found = []
    for place in range(first, first + length):
        epoch, index = divmod(place, count)
        found.append(random.Random(f"{seed}/{epoch}").sample(range(count), count)[index])
    return found


class Training:
    """The state of a training, and its loop."""

    def __init__(
        self,
        trained: Trained,
        student: Student,
        schedule: TrainingSchedule,
        checkpoint: Path,
        group: Group,
        *,
        seed: int = 0,
        batch: int = 1,
    ) -> None:
        """Goes on from the checkpoint where there is one."""
        self._trained, self._student, self._schedule = trained, student, schedule
        self._parameters: Mapping[str, nn.Parameter] = trained.parameters
        self._path, self._group, self._seed, self._batch = checkpoint, group, seed, batch
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=schedule.lr, betas=_BETAS, weight_decay=0.0)
        self.averages: dict[str, Tensor] = {name: value.detach().clone() for name, value in self._parameters.items()}
        """Moving averages of the weights, which become the adapter."""
        self.progress = TrainingProgress()
        if checkpoint.exists():
            self.progress = load_checkpoint(checkpoint, self._parameters, self.averages, self._optimizer)
            trained.spread()

    def run(self, paths: Sequence[Path], on_step: Callable[[TrainStep], None]) -> None:
        """Train on trajectories to the schedule's end.

        Raises NonFiniteError when the loss, or a gradient, stops being finite; the last checkpoint is of a step before.
        """
        began, saved, took = time.monotonic() - self.progress.seconds, time.monotonic(), 1.0
        each = self._batch * self._group.world
        device = next(iter(self._parameters.values())).device
        while self._group.agree(self._over())[0] < 1:
            first = self.progress.rounds * each + self._group.rank * self._batch
            chosen = order(self._seed, len(paths), first, self._batch)
            seeds = [self._seed + TRAINING_NOISE + first + i for i in range(self._batch)]
            with self._student.following(Trajectories([paths[i] for i in chosen], device, seeds)) as losses:
                for loss in losses:
                    self._update(loss, on_step)
                    self.progress.seconds = time.monotonic() - began
                    if self._group.agree(self._over())[0] >= 1:
                        break
            self.progress.rounds += 1
            now = time.monotonic()
            due = self._over() >= 1 or now - saved > CHECKPOINT_EVERY_S * took
            if self._group.agree(due)[0]:
                self._save()
                saved = time.monotonic()
                took = max(1.0, saved - now)

    def _over(self) -> float:
        return self._schedule.done(self.progress.step, self.progress.seconds)

    def _update(self, loss: float, on_step: Callable[[TrainStep], None]) -> None:
        """One step of the optimiser with the gradients that are there."""
        loss = self._group.mean(loss)
        step = self.progress.step
        self._trained.gather()
        norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters.values(), CLIP))
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            kept = "no checkpoint was written yet"
            if self._path.exists():
                kept = f"{self._path} is of a step before it, and --resume goes on from there"
            what = "the gradient" if math.isfinite(loss) else "the loss"
            raise NonFiniteError(
                f"{what} stopped being finite in step {step + 1} of training: a lower --lr may help; {kept}"
            )
        done = self._over()
        rate = self._schedule.rate(step, done)
        for entry in self._optimizer.param_groups:
            entry["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._trained.spread()
        decay = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self.averages[name].lerp_(parameter.detach(), 1 - decay)
        self.progress.step += 1
        self.progress.losses.append(loss)
        on_step(TrainStep(self.progress.step, self._schedule.steps, loss, rate, self._over(), self.progress.seconds))

    def _save(self) -> None:
        save_checkpoint(
            self._path,
            self._parameters,
            self.averages,
            self._optimizer,
            self.progress,
            write=self._group.rank == 0,
        )
