"""impl="triton" of the fused operations: allocation, tiles and launches; the kernels are in `_triton_fused.py`.

All of them are bound by memory, so tiles follow from bytes: a program holds a whole row of channels, 16 elements a
thread (two 16-byte loads in 16-bit dtypes), and takes as many rows as pay for what all rows of a sample share.
"""

from typing import Any

import torch
from torch import Tensor

from vmonarch_kernels import _triton_fused as kernels
from vmonarch_kernels.configs import power_of_2
from vmonarch_kernels.fused_spec import E4M3, LARGEST, LEAST, Activation, HeadNorm, Norm, Rotation, Term
from vmonarch_kernels.launch import cdiv

ELEMENTS_A_THREAD = 16
SHARED_ROWS = 8
"""Rows of a program where scale, shift and gate are a sample's: float32 tables of 12 C bytes beside 8 C bytes a row."""
ENOUGH_PROGRAMS = 512
"""Rows are shared out to fewer programs only where so many are left: several for each multiprocessor."""
_FLAT_BLOCK = 4096
_MAX_WARPS = 16
_KINDS: dict[str, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_NORMS: dict[str, int] = {"layer": 1, "rms": 2}
_THREADS_A_WARP = 32


def warps(elements: int) -> int:
    """Warps of a program that holds a row of so many elements, a power of two."""
    return min(_MAX_WARPS, max(1, elements // (_THREADS_A_WARP * ELEMENTS_A_THREAD)))


def _rows(tokens: int, shared: bool) -> int:
    """Rows of a program: more than one only where rows share what is read, and where enough programs are left."""
    fitting = (rows for rows in (SHARED_ROWS, 2) if tokens >= rows * ENOUGH_PROGRAMS)
    return next(fitting, 1) if shared else 1


def _row_strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _side_by_side(x: Tensor) -> Tensor:
    """Kernels take rows of channels as they lie."""
    return x if x.stride(-1) == 1 else x.contiguous()


def qk_norm_rope(
    q: Tensor, k: Tensor | None, heads: int, norm: HeadNorm | None, rotation: Rotation | None
) -> tuple[Tensor, Tensor | None]:
    """See ``fused.qk_norm_rope``; one launch for both tensors, so that the tables are read once."""
    q, k = _side_by_side(q), None if k is None else _side_by_side(k)
    batch, tokens, width = q.shape
    dim = width // heads
    out_q = q.new_empty(batch, tokens, heads, dim)
    out_k = None if k is None else k.new_empty(batch, tokens, heads, dim)
    cos, sin = (None, None) if rotation is None else _tables(rotation, batch)
    order = (0, 0, 0) if cos is None else (cos.stride(0), cos.stride(1), cos.stride(2) if cos.shape[2] > 1 else 0)
    block_h, half = power_of_2(heads), power_of_2(dim // 2)
    rows = _rows(tokens, norm is not None and norm.weight_q is not None)
    weights = (None, None) if norm is None else (norm.weight_q, norm.weight_k)
    kernels.qk_norm_rope_kernel[(cdiv(tokens, rows), batch)](
        q, *_row_strides(q), k, *_row_strides(k), out_q, out_k, *weights, cos, sin, *order,
        0.0 if norm is None else norm.eps, tokens, 0 if cos is None else cos.shape[1], heads, dim // 2,
        ROWS=rows, BLOCK_H=block_h, TABLE_H=1 if order[2] == 0 else block_h, HALF=half,
        NORM=norm is not None, PER_HEAD=norm is not None and norm.per_head,
        INTERLEAVED=rotation is None or rotation.layout == "interleaved",
        num_warps=warps(2 * block_h * half),
    )  # fmt: skip
    return out_q, out_k


def _tables(rotation: Rotation, batch: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every sample, of the same strides."""
    cos, sin = (_side_by_side(table).expand(batch, -1, -1, -1) for table in (rotation.cos, rotation.sin))
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def residual_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Term | None,
    norm: Norm | None,
    scale: Term | None,
    shift: Term | None,
    *,
    e4m3: bool = False,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(x + y * gate or None without y, its norm or None without norm, the norm's rows in e4m3 or None)."""
    x, y = _side_by_side(x), None if y is None else _side_by_side(y)
    batch, tokens, channels = x.shape
    total = None if y is None else x.new_empty(x.shape)
    out = None if norm is None else x.new_empty(x.shape)
    rows8 = _rows8(x, batch * tokens) if e4m3 else None
    block = power_of_2(channels)
    token_gate, token_modulation = (term is not None and term.values.shape[1] > 1 for term in (gate, scale))
    rows = _rows(tokens, not (token_gate or token_modulation))
    kernels.residual_norm_kernel[(cdiv(tokens, rows), batch)](
        x, *_row_strides(x), y, *_row_strides(y), total, out,
        *_of_term(gate, batch), *_of_term(scale, batch), *_of_term(shift, batch),
        None if norm is None else norm.weight, None if norm is None else norm.bias, *(rows8 or (None, None)),
        0.0 if norm is None else norm.eps, tokens, channels,
        ROWS=rows, BLOCK=block, NORM=0 if norm is None else _NORMS[norm.kind],
        TOKEN_GATE=token_gate, TOKEN_MODULATION=token_modulation, LARGEST=LARGEST, LEAST=LEAST,
        num_warps=warps(block),
    )  # fmt: skip
    return total, out, rows8


def _rows8(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Where rows of x's width in e4m3 and their scales go."""
    return (
        torch.empty(rows, x.shape[-1], dtype=E4M3, device=x.device),
        x.new_empty(rows, 1, dtype=torch.float32),
    )


def _of_term(term: Term | None, batch: int) -> tuple[Any, ...]:
    """(values, their strides of samples and tokens, table) as the kernel takes them."""
    if term is None:
        return None, 0, 0, None
    values = _side_by_side(term.values).expand(batch, -1, -1)
    return values, *_row_strides(values), term.table


def gelu_tanh_(x: Tensor) -> None:
    """In place, on a contiguous tensor."""
    elements = x.numel()
    kernels.gelu_tanh_kernel[(cdiv(elements, _FLAT_BLOCK),)](
        x, elements, BLOCK=_FLAT_BLOCK, num_warps=warps(_FLAT_BLOCK)
    )


def gated_activation(x: Tensor, kind: Activation) -> Tensor:
    """See ``fused.gated_activation``."""
    flat = _side_by_side(x).reshape(-1, x.shape[-1])
    channels = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], channels)
    block = min(_FLAT_BLOCK // 2, power_of_2(channels))
    kernels.gated_activation_kernel[(flat.shape[0], cdiv(channels, block))](
        flat, flat.stride(0), out, channels, BLOCK=block, KIND=_KINDS[kind], num_warps=warps(block)
    )
    return out


def quantize_rows(x: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """See ``linear8.quantize_rows`` and ``linear8.gelu_tanh_rows``."""
    flat = _side_by_side(x).reshape(-1, x.shape[-1])
    out, scale = _rows8(x, flat.shape[0])
    block = power_of_2(x.shape[-1])
    kernels.quantize_rows_kernel[(flat.shape[0],)](
        *(flat, flat.stride(0), out, scale, x.shape[-1]), LARGEST, LEAST, BLOCK=block, GELU_FIRST=gelu,
        num_warps=warps(block),
    )  # fmt: skip
    return out, scale


def on_device_of(x: Tensor) -> Any:
    """A context that makes x's device the current one: Triton launches on that, wherever the tensors are."""
    return torch.cuda.device_of(x)
