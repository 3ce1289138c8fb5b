"""A head that reads the objects' outlines from the middle of the transformer, in training alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 4  # the block after which outlines are read (counted from 0)
_SIDE = 4  # each token says in 4 x 4 values where objects are


class OutlineHead(nn.Module):
    """Reads from the tokens in the middle of the transformer where objects are; used in training alone.

    It makes the first blocks find out early, from noise and words, what is where: the idea of REPA (Yu et al., 2024),
    with the renderer's own knowledge in place of another network's.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(dim, elementwise_affine=False),
            nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, _SIDE**2),
        )  # fmt: skip
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

    def loss(self, covered: Tensor) -> Tensor:
        """Mean cross-entropy of the last call's tokens, read as coverage, against `covered` (B, T, h, w) in [0, 1]."""
        if self._tokens is None:
            raise RuntimeError("outlines: the transformer has not run since listen_to")
        target = F.pixel_unshuffle(covered, _SIDE)
        batch, channels, rows, columns = target.shape
        patches = _SIDE**2
        target = target.view(batch, channels // patches, patches, rows, columns).permute(0, 1, 3, 4, 2)
        read = self.layers(self._tokens).view(target.shape)
        self._tokens = None
        return F.binary_cross_entropy_with_logits(read.float(), target)
