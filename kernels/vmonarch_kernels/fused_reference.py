"""The operations between a block's products, eagerly: what the fused kernels are compared with.

Arithmetic is in float32 (float64 for float64 tensors), as in Wan's own code, and results have the input's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_kernels.fused_spec import Activation, HeadNorm, Norm, Rotation, Term


def wide(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def qk_norm_rope(
    x: Tensor, weight: Tensor | None, heads: int, norm: HeadNorm | None, rotation: Rotation | None
) -> Tensor:
    """x (B, N, heads * D), q or k, -> (B, N, heads, D): RMS norm, then rotary embedding."""
    if norm is not None and norm.per_head:
        out = _rms(x.unflatten(2, (heads, -1)), weight, norm.eps)
    else:
        out = (x if norm is None else _rms(x, weight, norm.eps)).unflatten(2, (heads, -1))
    if rotation is None:
        return out.contiguous()
    count = rotation.cos.shape[1]
    turned = _rotate(out[:, :count], rotation)
    return turned if count == x.shape[1] else torch.cat([turned, out[:, count:]], dim=1)


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = wide(x)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps)
    return (out if weight is None else out * wide(weight)).to(x.dtype)


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, N, heads, D), every pair turned by its angle."""
    cos, sin = (table if x.dtype == torch.float64 else table.float() for table in (rotation.cos, rotation.sin))
    if rotation.layout == "half":
        half = x.shape[-1] // 2
        first, second = x.split(half, dim=-1)
        cos, sin = cos[..., :half], sin[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).to(x.dtype)


def value_of(term: Term) -> Tensor:
    """A modulation's values (B or 1, N or 1, C) with its table, wide."""
    return wide(term.values) if term.table is None else wide(term.values) + wide(term.table)


def add_gated(x: Tensor, y: Tensor, gate: Term | None) -> Tensor:
    """X + y * gate, of (B, N, C) each."""
    return (wide(x) + (wide(y) if gate is None else wide(y) * value_of(gate))).to(x.dtype)


def norm_modulate(x: Tensor, norm: Norm, scale: Term | None, shift: Term | None) -> Tensor:
    """norm(x) * (1 + scale) + shift, of x (B, N, C)."""
    weight, bias = (None if tensor is None else wide(tensor) for tensor in (norm.weight, norm.bias))
    out = wide(x)
    if norm.kind == "layer":
        out = F.layer_norm(out, out.shape[-1:], weight, bias, norm.eps)
    else:
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + norm.eps)
        out = out if weight is None else out * weight
        out = out if bias is None else out + bias
    if scale is not None and shift is not None:
        out = out * (1 + value_of(scale)) + value_of(shift)
    return out.to(x.dtype)


def gated_activation(x: Tensor, kind: Activation) -> Tensor:
    """x[..., :C] * activation(x[..., C:]) of x (..., 2 C)."""
    value, gate = wide(x).chunk(2, dim=-1)
    if kind == "silu":
        return (value * F.silu(gate)).to(x.dtype)
    return (value * F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")).to(x.dtype)
