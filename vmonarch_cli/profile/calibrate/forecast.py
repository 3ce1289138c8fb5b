"""How far from dense a schedule will end, forecast from lacks: frame refresh is replayed on their sketches.

The replay is that of `vmonarch_kernels.residual`, without its 8 bits. The squared error of a clip is taken as a sum
over calls, each with the weight of its step times that of its layer; probes, whole clips with only some calls
structured, give the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmonarch_cli.profile.calibrate.lacks import Array, ClipLacks
from vmonarch_kernels.residual import DECAY, NEIGHBOUR_SHARE
from vmonarch_kernels.turns import next_turns, turns

Groups = Sequence[Sequence[int]]
"""Neighbouring steps, or layers, that share a weight."""
Squares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CallKind:
    """What a schedule is replayed with, beside its turns."""

    first_frame: bool
    shared: bool
    dense_steps: int = 0


def in_groups(count: int, alone: int, most: int) -> list[list[int]]:
    """0 to `count` - 1 in at most `most` groups: the first `alone` by themselves, the others in even runs."""
    alone = min(alone, count)
    rest, runs = count - alone, max(1, most - alone)
    bounds = [alone + round(rest * number / min(runs, max(1, rest))) for number in range(min(runs, max(1, rest)) + 1)]
    found = [[number] for number in range(alone)]
    return found + [list(range(a, b)) for a, b in itertools.pairwise(bounds) if b > a]


class Replay:
    """Squared errors of all calls of some measured clips, for any turns."""

    def __init__(self, clips: Sequence[ClipLacks], guidance_scale: float) -> None:
        branches = len(clips[0].warm)
        self.steps, self.layers, self.frames, _ = clips[0].warm[0].shape
        self.branches = branches
        self._share = (guidance_scale, 1 - guidance_scale, *[0.0] * (branches - 2)) if branches > 1 else (1.0,)
        """Guidance adds the branches up so: what they lack in common counts once."""
        stacked = [np.stack([clip.warm[branch] for clip in clips]) for branch in range(branches)]
        self._warm = [x.transpose(1, 2, 3, 0, 4).copy() for x in stacked]  # (S, L, T, clips, sketch)
        self._cold = {
            step: [np.stack([clip.cold[step][b] for clip in clips]).transpose(1, 2, 0, 3) for b in range(branches)]
            for step in clips[0].cold
        }
        self._takes_over = clips[0].takes_over
        self._known: dict[tuple[object, ...], Squares] = {}

    @property
    def dense_steps(self) -> list[int]:
        """Numbers of first dense steps that can be replayed."""
        return [0, *sorted(step for step in self._cold if step < self.steps)]

    def layer(self, layer: int, due: tuple[int, ...], choice: CallKind) -> Squares:
        """(steps, clips): squared error of a layer's calls whose leading forward recomputes `due` frames in each step.

        Without sharing, so does every forward. Dense steps have no error.
        """
        key = (layer, due, choice)
        if key not in self._known:
            self._known[key] = self._replayed(layer, due, choice)
        return self._known[key]

    def _replayed(self, layer: int, due: tuple[int, ...], choice: CallKind) -> Squares:
        order, place = turns(self.frames, choice.first_frame), 0
        kept = [np.zeros_like(self._warm[0][0, layer]) for _ in range(1 if choice.shared else self.branches)]
        squares = np.zeros((self.steps, kept[0].shape[1]))
        for step in range(choice.dense_steps, self.steps):
            cold = step > 0 and step == choice.dense_steps
            lacks = [x[layer] for x in self._cold[step]] if cold else [x[step, layer] for x in self._warm]
            if step in self._takes_over:
                kept, place = [np.zeros_like(x) for x in kept], 0
            chosen, place = next_turns(order, place, due[step])
            error = np.zeros_like(lacks[0])
            for branch, lack in enumerate(lacks):
                left = self._corrected(kept[0 if choice.shared else branch], lack, chosen, order, choice, branch)
                if choice.first_frame:
                    left[0] = 0
                error += np.float32(self._share[branch]) * left
            squares[step] = np.square(error, dtype=np.float64).sum(axis=(0, 2))
        return squares

    @staticmethod
    def _corrected(
        kept: Array, lack: Array, chosen: Sequence[int], order: Sequence[int], choice: CallKind, branch: int
    ) -> Array:
        """What a call still lacks; `kept`, (frames, clips, sketch), ages and takes the turns of a call that has any."""
        if choice.shared and branch:
            return lack - kept
        kept *= np.float32(DECAY)
        left = lack - kept
        for frame in chosen:
            left[frame] = 0
            for other in (frame - 1, frame + 1):
                if other in order and other not in chosen:
                    kept[other] += np.float32(NEIGHBOUR_SHARE) * (lack[frame] - kept[other])
        for frame in chosen:
            kept[frame] = lack[frame]
        return left


class Weights:
    """Of every call's squared error in that of a clip: by step times by layer."""

    def __init__(self, replay: Replay, steps: Groups, layers: Groups, probes: tuple[Squares, Squares]) -> None:
        """probes: mean squared errors of clips in which only the calls of a group of steps, or of layers, were
        structured without any turns.
        """
        bare = CallKind(first_frame=False, shared=False)
        none = (0,) * replay.steps
        alone = np.stack([replay.layer(layer, none, bare).mean(axis=1) for layer in range(replay.layers)], axis=1)
        blocks = np.array([[alone[np.ix_(rows, columns)].sum() for columns in layers] for rows in steps])
        by_step, by_layer = _fit(blocks, *probes)
        self.steps, self.layers = np.zeros(replay.steps), np.zeros(replay.layers)
        for group, value in zip(steps, by_step, strict=True):
            self.steps[list(group)] = value
        for group, value in zip(layers, by_layer, strict=True):
            self.layers[list(group)] = value


def _fit(blocks: Squares, by_step: Squares, by_layer: Squares) -> tuple[Squares, Squares]:
    """Positive factors of rows and columns with which the rows' sums and the columns' come to the given ones.

    The two sets of probes rarely have one total; the columns' wins, the rows keep their shares.
    """
    blocks = np.maximum(blocks, blocks.max() * 1e-9 + 1e-30)
    by_step = by_step * (by_layer.sum() / max(by_step.sum(), 1e-30))
    rows, columns = np.ones(len(by_step)), np.ones(len(by_layer))
    for _ in range(50):
        rows = by_step / np.maximum(blocks @ columns, 1e-30)
        columns = by_layer / np.maximum(rows @ blocks, 1e-30)
    return rows, columns
