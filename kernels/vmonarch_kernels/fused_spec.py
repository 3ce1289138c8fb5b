"""What the fused operations take beside their tensors, and what they leave with them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]
"""Of the gate: "silu" makes SwiGLU, "gelu" GEGLU."""
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
Layout = Literal["interleaved", "half"]
"""Which elements of a head a rotation turns together: 2 i and 2 i + 1 (Wan, HunyuanVideo, LTX), or i and D / 2 + i."""
LAYOUTS: tuple[Layout, ...] = ("interleaved", "half")

E4M3 = torch.float8_e4m3fn
LARGEST, LEAST = 448.0, 1e-12
"""Largest number in e4m3, and least scale of a row of such numbers, as one of zeros has it."""


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm of q and k."""

    weight_q: Tensor | None
    """(heads * D), per head (D); any float dtype."""
    weight_k: Tensor | None
    eps: float
    per_head: bool = False
    """Whether the mean square is that of each head (HunyuanVideo) or that of all of them together (Wan, LTX)."""


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding: tables (B or 1, N', heads or 1, D) of any float dtype, which hold every angle twice.

    Tokens from N' on are not turned: a prompt's, behind those of the video.
    """

    cos: Tensor
    sin: Tensor
    layout: Layout = "interleaved"


@dataclass(frozen=True)
class Norm:
    """Norm of a block's residual stream over its channels."""

    eps: float
    weight: Tensor | None = None
    """(C); any float dtype."""
    bias: Tensor | None = None
    kind: Literal["layer", "rms"] = "layer"


@dataclass(frozen=True)
class Term:
    """A gate, a scale or a shift: values of a sample (B or 1, 1, C) or of every token (B or 1, N, C), any float dtype.

    ``table``, (C), is added to them where a block has its own: so the sum, which for every token is as large as the
    video's tensors in float32, is never written.
    """

    values: Tensor
    table: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """A tensor (..., C) as products in e4m3 take it: x is values * scale."""

    values: Tensor
    """(rows, C) in e4m3; the largest entry of a row is 448."""
    scale: Tensor
    """(rows, 1) in float32."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the tensor, which a product of it has too."""


_KEPT = "_vmonarch_rows"


def keep_rows(x: Tensor, rows: Rows) -> None:
    """Let a tensor have its rows until it changes.

    Not within a compiler, nor where torch does not count changes (inference mode).
    """
    if not torch.compiler.is_compiling() and not x.is_inference():
        setattr(x, _KEPT, (x._version, rows))


def kept_rows(x: Tensor) -> Rows | None:
    """The rows that a tensor has, and None where it has none or has changed since."""
    if torch.compiler.is_compiling():
        return None
    version, rows = getattr(x, _KEPT, (None, None))
    return rows if rows is not None and version == x._version else None
