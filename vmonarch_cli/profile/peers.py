"""Sparse attention of other packages, measured beside the presets on the same tensors. Torch loads at its first use."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vmonarch_cli.attention.structured import AttentionCall

PEER = "peer"
"""The kind of their rows."""
_MODULE, _DISTRIBUTION = "comfy_kitchen", "comfy-kitchen"
_HEAD_DIM, _BLOCK = 128, 64
"""Sol-Attn's kernels have this head dimension and tokens in a block; narrower heads are filled up with zeros."""


@dataclass(frozen=True)
class SparsePeer:
    """Sol-Attn (arXiv 2607.24027) of comfy-kitchen with one setting; its products are computed in INT8.

    A query block attends to some key blocks exactly, and to one pooled term of each other block.
    """

    top_k: float = 0.0
    """Share of the key blocks that are exact; 0 leaves it to `tau`."""
    tau: float = 1.0
    """Threshold in standard deviations of a block's scores: a higher one keeps fewer blocks."""

    @property
    def name(self) -> str:
        """'sol 10 %', 'sol tau 1.5'."""
        return f"sol {100 * self.top_k:g} %" if self.top_k else f"sol tau {self.tau:g}"

    @property
    def note(self) -> str:
        """Package and version."""
        try:
            version = metadata.version(_DISTRIBUTION)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        return f"{_DISTRIBUTION} {version}"

    @property
    def share(self) -> float | None:
        """Operations over dense attention's, the pooled terms included; None where the tensors decide."""
        return self.top_k + (1 - self.top_k) / _BLOCK if self.top_k else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, heads, D) each, bfloat16 or float16, D at most 128 -> the same; what the package raises is raised."""
        import torch.nn.functional as F

        dim = q.shape[-1]
        if dim < _HEAD_DIM:
            q, k, v = (F.pad(x, (0, _HEAD_DIM - dim)) for x in (q, k, v))
        sol_attn = import_module(_MODULE).sol_attn
        out: Tensor = sol_attn(
            *(x.contiguous() for x in (q, k, v)), tau=self.tau, scale=dim**-0.5, topk_ratio=self.top_k
        )
        return out[..., :dim]

    def attention(self, call: AttentionCall) -> Tensor:
        """The same for a call of a model; ValueError for one with text among its tokens."""
        if call.text is not None:
            raise ValueError("Sol-Attn is measured on video tokens alone, and this model attends to its text as well")
        return self.attend(call.q, call.k, call.v)


SETTINGS = (
    SparsePeer(top_k=0.02),
    SparsePeer(top_k=0.1),
    SparsePeer(top_k=0.2),
    SparsePeer(tau=1.5),
    SparsePeer(tau=1.0),
    SparsePeer(tau=0.5),
)


def installed_peers(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[SparsePeer, ...]:
    """The settings to measure; none where the package is not installed or does not take such tensors.

    Of a package that does not import on a GPU it is one, whose row says why.
    """
    import torch

    if head_dim > _HEAD_DIM or dtype not in (torch.bfloat16, torch.float16):
        return ()
    try:
        if find_spec(_MODULE) is None:
            return ()
        package = import_module(_MODULE)
        available = hasattr(package, "sol_attn") and package.sol_attn_is_available(device)
    except Exception:  # a build for another torch, a missing library
        return SETTINGS[:1] if device.type == "cuda" else ()
    return SETTINGS if available else ()
