"""What the forwards of a pipeline's transformers took and gave, as its own loop called them."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.errors import NonFiniteError
from vmonarch_cli.pipeline.parts import transformers_of

LATENTS = "hidden_states"
"""The argument that is the state of sampling, in every family."""


@dataclass(frozen=True)
class TeacherForward:
    """One forward of the teacher."""

    step: int
    """0-based denoising step."""
    transformer: int
    """0, or 1 for `transformer_2`."""
    inputs: dict[str, Tensor]
    """Arguments of the forward that are tensors, the batch in front; "NAME/0", "NAME/1" of one that is several."""
    constants: dict[str, Any]
    """Its other arguments that are plain values, or several of them."""
    velocity: Tensor
    """What the transformer predicted, (B, C, F, h, w)."""

    def arguments(self) -> dict[str, Any]:
        """Of the forward, by name."""
        several: dict[str, list[Tensor]] = {}
        for name, value in self.inputs.items():  # in the order of their numbers
            several.setdefault(name.partition("/")[0], []).append(value)
        tensors = {name: tuple(found) if f"{name}/0" in self.inputs else found[0] for name, found in several.items()}
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in self.constants.items()}
        return {**tensors, **plain}


def _flat(given: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain values) of a forward's arguments, as a `TeacherForward` has them."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in given.items():
        parts = list(value) if isinstance(value, tuple | list) else [value]
        if parts and all(isinstance(part, Tensor) for part in parts):
            several = isinstance(value, tuple | list)
            tensors |= {f"{name}/{i}" if several else name: part.detach() for i, part in enumerate(parts)}
        elif parts and all(isinstance(part, bool | int | float | str) for part in parts):
            plain[name] = parts if isinstance(value, tuple | list) else value
    return tensors, plain


@dataclass(frozen=True)
class Guidance:
    """How the sampler compares the prompts; attention corrects by it what the forwards of a step share."""

    forwards: int = 1
    """Of a step."""
    known_forwards: int = 1
    """Of them, those that the pipeline tells beforehand."""
    both_prompts: bool = False
    """Each forward has the samples of the negative prompts and then those of the prompts."""


class ForwardRecorder:
    """Keeps every forward of a pipeline's transformers, inside the block of `recording`."""

    def __init__(self) -> None:
        self.forwards: list[TeacherForward] = []
        self.guidance = Guidance()
        self.sigmas: list[float | None] = []
        """Noise level of each step, complete when the pipeline's call is over; None where its scheduler has none."""
        self._session: AttentionSession | None = None
        self._state: tuple[Tensor, int, Tensor] | None = None
        """The last latents that came, their version and their copy: the forwards of a step share them."""

    @contextmanager
    def recording(self, pipeline: Any, session: AttentionSession) -> Iterator[None]:
        """`session` tells the steps apart."""
        self._session = session
        with ExitStack() as undo:
            for index, transformer in enumerate(transformers_of(pipeline)):
                hook = functools.partial(self._keep, index)
                undo.callback(transformer.register_forward_hook(hook, with_kwargs=True).remove)
            yield
        self.sigmas = [step.sigma for step in session.steps]
        most = max(Counter(forward.step for forward in self.forwards).values())
        self.guidance = Guidance(most, session.known_forwards, session.both_prompts)

    def _keep(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = inspect.signature(module.forward).parameters
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors, plain = _flat(given)
        tensors[LATENTS] = self._copied(given[LATENTS])
        velocity = output[0] if isinstance(output, tuple) else output.sample
        step = len(self._session.steps) if self._session is not None else 0
        self.forwards.append(TeacherForward(step, index, tensors, plain, narrow(velocity)))

    def _copied(self, latents: Tensor) -> Tensor:
        if self._state is None or self._state[0] is not latents or self._state[1] != latents._version:
            self._state = (latents, latents._version, narrow(latents))
        return self._state[2]


def narrow(value: Tensor) -> Tensor:
    """A copy in float16 on the CPU; NonFiniteError for what does not fit."""
    narrow = value.detach().to(torch.float16)
    if not torch.isfinite(narrow).all():
        raise NonFiniteError("a state of the teacher is not finite in float16, and its trajectory was not kept")
    return narrow.to("cpu", copy=True).contiguous()
