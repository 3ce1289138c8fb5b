"""A head that reads what the clip shows from the middle of the transformer, in training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.demo_vocabulary import MOTIONS

HEAD_FILE = "middle_head.safetensors"
"""Beside the exported weights, for a training that goes on from them."""
_BLOCK = 4  # the block after which it reads (counted from 0)
_SIDE = 4  # each token says in 4 x 4 values where objects are


class MiddleHead(nn.Module):
    """Reads from the tokens in the middle of the transformer where objects are in each frame, and how they move then.

    It makes the first blocks find out early, from noise and words, what is where and which of several motions has its
    turn: the idea of REPA (Yu et al., 2024), with the renderer's own knowledge in place of another network's. The
    velocity alone teaches turns slowly, since a frame's noise hides how the frames around it move.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.outlines = _reading(dim, _SIDE**2)
        self.motions = _reading(dim, len(MOTIONS))
        self._tokens: Tensor | None = None

    def listen_to(self, transformer: Any) -> None:
        """Keep what the middle block returns, compiled or not; call it again after (un)compiling the block."""
        block = transformer.blocks[min(_BLOCK, len(transformer.blocks) - 1)]
        run = block._compiled_call_impl or block._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            self._tokens = run(*args, **kwargs)
            return self._tokens

        # Outside the compiled code: a hook would be traced into this block and keep it from sharing the others' code.
        block._compiled_call_impl = call

    def losses(self, covered: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """What the last call's tokens miss of its first B clips: two mean cross-entropies (scalars).

        Args:
            covered: how much of each place objects cover, (B, T, h, w) in [0, 1].
            moving: which motions of the vocabulary objects have in each latent frame, (B, T, motions) of 0 and 1.

        Raises:
            RuntimeError: the transformer has not run since `listen_to`.

        """
        if self._tokens is None:
            raise RuntimeError("middle head: the transformer has not run since listen_to")
        tokens, self._tokens = self._tokens[: len(covered)], None
        target = F.pixel_unshuffle(covered, _SIDE)
        batch, channels, rows, columns = target.shape
        patches = _SIDE**2
        target = target.view(batch, channels // patches, patches, rows, columns).permute(0, 1, 3, 4, 2)
        outlines = F.binary_cross_entropy_with_logits(self.outlines(tokens).view(target.shape).float(), target)
        of_frames = tokens.view(batch, moving.shape[1], rows * columns, -1).mean(2)
        return outlines, F.binary_cross_entropy_with_logits(self.motions(of_frames).float(), moving)

    def export(self, folder: Path) -> None:
        """Write the head into a folder, as HEAD_FILE."""
        temporary = folder / f"{HEAD_FILE}.tmp"
        save_file({name: value.contiguous().cpu() for name, value in self.state_dict().items()}, temporary)
        temporary.replace(folder / HEAD_FILE)

    def load_beside(self, weights: Path) -> Path | None:
        """Take over the head of the training that exported `weights`: HEAD_FILE or the checkpoint beside that folder.

        Returns:
            The file that it came from; None where neither is there, which leaves the head as it is.

        Raises:
            InputError: the head in the file is one of another transformer.

        """
        folder = weights.absolute().parent
        for path in (folder / HEAD_FILE, folder / "dit_checkpoint.pt"):
            if not path.is_file():
                continue
            if path.name == HEAD_FILE:
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)["middle_head"]
            if _shapes(state) != _shapes(self.state_dict()):
                raise InputError(
                    f"--init: got {path}, the middle head of another transformer than the one in {weights}"
                )
            self.load_state_dict(state)
            return path
        return None


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _reading(dim: int, values: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim, elementwise_affine=False), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, values)
    )
