"""The student: the model with the preset's attention, at the teacher's states, with all that the preset keeps.

It goes through whole trajectories, step after step, so that warm starts, corrections and turns are those that sampling
will have. They are carried from step to step without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.presets import Preset
from vmonarch_cli.tune.trajectories import TeacherForward, Trajectories

Run = Callable[..., Any]
NoSync = Callable[[], AbstractContextManager[Any]]


def velocity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the samples of |student - teacher|^2 / |teacher|^2, float32; both (B, C, F, h, w)."""
    change = (student.float() - teacher).flatten(1).square().sum(1)
    return (change / teacher.flatten(1).square().sum(1).clamp_min(1e-12)).mean()


class Student:
    """Runs the steps of trajectories with a preset's attention, and leaves gradients in the parameters."""

    def __init__(
        self,
        pipeline: Any,
        preset: Preset,
        total_steps: int,
        *,
        runs: Sequence[Run],
        no_sync: Sequence[NoSync] = (),
        dtype: torch.dtype | None = None,
        checkpointing: bool = False,
    ) -> None:
        """runs: the transformers, or what wraps them. no_sync: of each, a context in which the processes' gradients
        are not added up. dtype: of the latents, by default the transformer's. checkpointing: the transformers compute
        their layers again in the backward pass.
        """
        self._pipeline, self._preset, self._total = pipeline, preset, total_steps
        self._runs, self._no_sync, self._checkpointing = runs, no_sync, checkpointing
        self._dtype = pipeline.transformer.dtype if dtype is None else dtype

    @contextmanager
    def following(self, trajectories: Trajectories) -> Iterator[Iterator[float]]:
        """Go through trajectories from their first step; every item of the iterator is the loss of one step, for which
        gradients have been added to the parameters.
        """
        with swapped(self._pipeline, self._preset) as session:
            session.recomputes = self._checkpointing
            yield self._steps(session, trajectories)

    def _steps(self, session: AttentionSession, trajectories: Trajectories) -> Iterator[float]:
        session.begin_clip(self._total, watching=False, forwards=trajectories.most_forwards)
        session.least_forwards = trajectories.most_forwards
        for numbers in trajectories.steps:
            losses = []
            for place, number in enumerate(numbers):
                forward = trajectories.forward(number)
                if place == 0:
                    session.begin_step(forward.step)
                last = place == len(numbers) - 1
                losses.append(self._forward(session, forward, 1 / len(numbers), last))
            session.end_step()
            yield float(torch.stack(losses).mean())

    def _forward(self, session: AttentionSession, forward: TeacherForward, weight: float, last: bool) -> Tensor:
        """The loss of a forward, without gradient; its gradients are added."""
        index = forward.transformer
        apart = self._no_sync[index]() if self._no_sync and not last else nullcontext()
        arguments = {**forward.inputs, **forward.constants, "return_dict": False}
        arguments["hidden_states"] = arguments["hidden_states"].to(self._dtype)
        with torch.enable_grad(), apart:
            loss = velocity_loss(self._runs[index](**arguments)[0], forward.velocity)
            with session.recomputing() if self._checkpointing else nullcontext():
                (loss * weight).backward()
        return loss.detach()
