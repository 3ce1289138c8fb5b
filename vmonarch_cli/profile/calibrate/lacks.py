"""What structured attention lacks in every call of a dense clip, in few numbers: the ground of every prediction.

A *lack* is dense minus structured attention of one query frame. What frame refresh adds to a call are lacks of earlier
calls, so their inner products say how far any schedule is from dense, and the model need not run again for each. A
lack has as many numbers as a frame's output; a count sketch keeps its inner products in a few hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vmonarch_cli.attention.joint import dense_joint
from vmonarch_cli.attention.structured import AttentionCall, StructuredAttention
from vmonarch_cli.presets import Preset

Array = npt.NDArray[np.float32]
SKETCH = 128
"""Numbers that stand for a frame's lack: a squared norm is right to about an eighth, a sum over frames far better."""
COLD_STEPS = (1, 2)
"""Steps (from 0) whose calls are measured with a cold start, too: they are the first ones after dense steps."""


@dataclass(frozen=True)
class ClipLacks:
    """Of one dense clip: (steps, layers, frames, sketch) for each guidance branch, the leading one first."""

    warm: tuple[Array, ...]
    cold: dict[int, tuple[Array, ...]]
    """Step -> (layers, frames, sketch) for each branch, where its calls start cold."""
    takes_over: frozenset[int]
    """Steps in which another transformer begins: it has no residuals."""


class LackRecorder:
    """Computes a session's attention dense, and keeps what the structured call would have lacked."""

    def __init__(self, preset: Preset, layers: Sequence[int], steps: int) -> None:
        """`preset`: without refresh, dense steps or dense layers; its calls start warm where it says so.

        layers: how many each transformer has, all the same.
        """
        self._structured = StructuredAttention(preset, layers)
        self._cold = StructuredAttention(preset, layers)
        self._layers, self._steps, self._warm_start = layers[0], steps, preset.warm_start
        self._hashes: tuple[Tensor, Tensor] | None = None
        self._kept: dict[tuple[int, int, int, bool], Array] = {}
        self._transformers: dict[int, int] = {}
        """Step -> the transformer that it runs."""

    def __call__(self, call: AttentionCall) -> Tensor:
        """Dense attention of the call."""
        dense = dense_joint(call.q, call.k, call.v, call.text)
        self._transformers[call.step] = call.key.transformer
        self._keep(call, dense, self._structured(call), cold=False)
        if self._warm_start and call.step in COLD_STEPS:
            self._keep(call, dense, self._cold(call), cold=True)
            if call.key.forward or not call.forwards > 1:
                self._cold.warm.drop()
        return dense

    def lacks(self) -> ClipLacks:
        """What was kept, for a clip that has run to its end."""
        branches = 1 + max(branch for _, _, branch, _ in self._kept)

        def of(step: int, branch: int, cold: bool) -> Array:
            return np.stack([self._kept[step, layer, branch, cold] for layer in range(self._layers)])

        warm = tuple(np.stack([of(step, branch, False) for step in range(self._steps)]) for branch in range(branches))
        there = {step for step, _, _, cold in self._kept if cold}
        cold = {step: tuple(of(step, branch, True) for branch in range(branches)) for step in there}
        runs = self._transformers
        return ClipLacks(warm, cold, frozenset(step for step in runs if runs[step] != runs.get(step - 1, runs[step])))

    def _keep(self, call: AttentionCall, dense: Tensor, structured: Tensor, *, cold: bool) -> None:
        lack = dense.float() - structured.float()
        if call.text is not None:
            lack = call.text.split(lack)[0]
        samples = lack.shape[0]
        halves = [lack[samples // 2 :], lack[: samples // 2]] if call.both_prompts and samples % 2 == 0 else [lack]
        for half, rows in enumerate(halves):
            place = (call.step, call.key.layer, call.key.forward + half, cold)
            self._kept[place] = self._sketch(rows, call.grid[0]).cpu().numpy()

    def _sketch(self, lack: Tensor, frames: int) -> Tensor:
        """(B, N, heads, D) -> (frames, sketch): every number goes, with a random sign, to one of the sketch's sums."""
        flat = lack.unflatten(1, (frames, -1)).transpose(0, 1).reshape(frames, -1)
        if self._hashes is None or self._hashes[0].shape[0] != flat.shape[1]:
            random = torch.Generator().manual_seed(0)
            places = torch.randint(SKETCH, (flat.shape[1],), generator=random)
            signs = torch.randint(2, (flat.shape[1],), generator=random).float() * 2 - 1
            self._hashes = (places.to(flat.device), signs.to(flat.device))
        places, signs = self._hashes
        return torch.zeros(frames, SKETCH, device=flat.device).index_add_(1, places, flat * signs)


class Probe:
    """Structured attention in some calls of a clip and dense in all others; none recomputes frames."""

    def __init__(self, preset: Preset, layers: Sequence[int], where: Callable[[int, int], bool]) -> None:
        """`where`: of (step, layer), both from 0. `preset` as for `LackRecorder`."""
        self._structured = StructuredAttention(preset, layers)
        self._where = where

    def __call__(self, call: AttentionCall) -> Tensor:
        """The call's output. Structured calls elsewhere go on from step to step, so that later ones start warm."""
        out = self._structured(call)
        return out if self._where(call.step, call.key.layer) else dense_joint(call.q, call.k, call.v, call.text)
