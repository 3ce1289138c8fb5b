"""The student: the model with the preset's attention, at the teacher's states, with all that the preset keeps.

It goes through whole trajectories, step after step, so that warm starts, corrections and turns are those that sampling
will have. They are carried from step to step without gradient. Both forwards of a guided step share one loss: that of
the velocity which the sampler makes of them, where errors that they have in common nearly cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.presets import Preset
from vmonarch_cli.tune.recorder import TeacherForward
from vmonarch_cli.tune.trajectories import Trajectories

Run = Callable[..., Any]
NoSync = Callable[[], AbstractContextManager[Any]]


def velocity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the samples of |student - teacher|^2 / |teacher|^2, float32; both (B, C, F, h, w)."""
    change = (student.float() - teacher).flatten(1).square().sum(1)
    return (change / teacher.flatten(1).square().sum(1).clamp_min(1e-12)).mean()


def guided(velocities: Sequence[Tensor], scale: float, *, both_prompts: bool = False) -> Tensor:
    """The velocity that the sampler steps with, float32 (B, C, F, h, w): n + scale (p - n), of the velocities p with
    the prompt and n with the negative one.

    velocities: of a step's forwards, as diffusers runs them: p and then n, or p alone without guidance. both_prompts:
    of its one forward, which has the samples of n and then those of p.
    """
    if both_prompts:
        negative, positive = velocities[0].float().chunk(2)
    elif len(velocities) == 2:
        positive, negative = (velocity.float() for velocity in velocities)
    else:
        return velocities[0].float()
    return negative + scale * (positive - negative)


class Student:
    """Runs the steps of trajectories with a preset's attention, and leaves gradients in the parameters."""

    def __init__(
        self,
        pipeline: Any,
        preset: Preset,
        total_steps: int,
        *,
        runs: Sequence[Run],
        scales: Sequence[float] = (1.0,),
        no_sync: Sequence[NoSync] = (),
        dtype: torch.dtype | None = None,
        checkpointing: bool = False,
    ) -> None:
        """runs: the transformers, or what wraps them. scales: guidance of each, the last one's of all others. no_sync:
        of each, a context in which the processes' gradients are not added up. dtype: of the latents, by default the
        transformer's. checkpointing: the transformers compute their layers again in the backward pass.
        """
        self._pipeline, self._preset, self._total = pipeline, preset, total_steps
        self._runs, self._scales, self._no_sync, self._checkpointing = runs, scales, no_sync, checkpointing
        self._dtype = pipeline.transformer.dtype if dtype is None else dtype

    @contextmanager
    def following(self, trajectories: Trajectories) -> Iterator[Iterator[float]]:
        """Go through trajectories from their first step; every item of the iterator is the loss of one step, for which
        gradients have been added to the parameters.
        """
        with swapped(self._pipeline, self._preset) as session:
            if self._checkpointing:
                session.recomputes = True
                for transformer in transformers_of(self._pipeline):
                    transformer.enable_gradient_checkpointing(_repeatable(session))
            yield self._steps(session, trajectories)

    def _steps(self, session: AttentionSession, trajectories: Trajectories) -> Iterator[float]:
        guidance = trajectories.guidance
        before = guidance.forwards if trajectories.first_step else 1  # of dense steps that are left out
        session.begin_clip(self._total, watching=False, forwards=before)
        session.least_forwards = guidance.known_forwards
        session.always_both_prompts = guidance.both_prompts
        for numbers in trajectories.steps:
            forwards = [trajectories.forward(number) for number in numbers]
            session.begin_step(forwards[0].step)
            with torch.enable_grad():
                velocities = [self._velocity(forward, forward is forwards[-1]) for forward in forwards]
                loss = self._loss(velocities, forwards, trajectories)
                loss.backward()
            session.end_step()
            yield float(loss.detach())

    def _velocity(self, forward: TeacherForward, last: bool) -> Tensor:
        """What the student predicts where the teacher predicted something."""
        index = forward.transformer
        arguments = {**forward.arguments(), "return_dict": False}
        arguments["hidden_states"] = arguments["hidden_states"].to(self._dtype)
        with ExitStack() as apart:
            if self._no_sync and not last:  # processes exchange what the step's one backward pass comes to
                apart.enter_context(self._no_sync[index]())
            velocity: Tensor = self._runs[index](**arguments)[0]
        return velocity

    def _loss(
        self, velocities: Sequence[Tensor], forwards: Sequence[TeacherForward], trajectories: Trajectories
    ) -> Tensor:
        """Of a step. A user's clip is the target of each forward alone, with the prompt and without it."""
        if trajectories.of_clips:
            losses = [velocity_loss(own, one.velocity) for own, one in zip(velocities, forwards, strict=True)]
            return torch.stack(losses).mean()
        scale = self._scales[min(forwards[0].transformer, len(self._scales) - 1)]
        both = trajectories.guidance.both_prompts
        teacher = guided([forward.velocity for forward in forwards], scale, both_prompts=both)
        return velocity_loss(guided(velocities, scale, both_prompts=both), teacher)


def _repeatable(session: AttentionSession) -> Callable[..., Any]:
    """How a transformer checkpoints a layer: its attention calls run again as those of the forward that they were in,
    although another one ran since.
    """

    def run(module: Any, *args: Any) -> Any:
        return checkpoint(
            module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), session.recomputing())
        )

    return run
