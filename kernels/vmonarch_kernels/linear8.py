"""Linear layers in fp8: activations in e4m3 with a scale for each token, weights with one for each output channel.

The product is torch's own (`torch._scaled_mm`). What eager torch lacks is the quantisation of the activations in one
pass: written with its operations it reads and writes a tensor six times, which takes longer than the product saves.
What has just written a tensor can write its rows too: they stay with the tensor, and products of it take them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_kernels.api import ImplUnavailable
from vmonarch_kernels.fused import has_e4m3, resolve_fused_impl
from vmonarch_kernels.fused_spec import E4M3, LARGEST, LEAST, Rows, keep_rows, kept_rows

_MAX_CHANNELS = 32768


def quantize_rows(x: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Each row of x in e4m3, and its scale: x is values * scale, and the largest entry of a row is 448 * scale.

    x: (..., C) in bfloat16, float16 or float32; C up to 32,768. impl: "auto", "torch" or "triton", as
    `resolve_fused_impl` takes it. A row that holds an entry which is not finite has no finite values.

    Returns values (rows, C) in e4m3 and scale (rows, 1) in float32. Raises ValueError for another width;
    ImplUnavailable.
    """
    _check_width(x)
    if _chosen(impl, x) == "triton":
        values, scale = _quantize_rows_op(x)
        return values, scale
    return _eager_rows(x)


def _eager_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).float()
    scale = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=LEAST)
    return (rows / scale).to(E4M3), scale


def gelu_tanh_rows(x: Tensor, *, impl: str = "auto") -> Rows:
    """GELU of x (..., C), in its tanh form and in float32, as products in e4m3 take it; nothing is written in 16 bits.

    Arguments and errors are those of `quantize_rows`.
    """
    _check_width(x)
    if _chosen(impl, x) == "triton":
        values, scale = _gelu_tanh_rows_op(x)
    else:
        values, scale = _eager_rows(F.gelu(x.float(), approximate="tanh"))
    return Rows(values, scale, tuple(x.shape), x.dtype)


def _check_width(x: Tensor) -> None:
    if not 1 <= x.shape[-1] <= _MAX_CHANNELS:
        raise ValueError(f"x has {x.shape[-1]} channels; valid are up to {_MAX_CHANNELS}.")


def _chosen(impl: str, x: Tensor) -> str:
    chosen = resolve_fused_impl(impl, x.device, x.dtype)
    if chosen == "triton" and not has_e4m3(x.device):
        if impl == "triton":
            raise ImplUnavailable("impl='triton' cannot run because e4m3 needs compute capability 8.9 or later.")
        return "torch"
    return chosen


def linear_e4m3(
    x: Tensor | Rows, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """x @ (weight * scale)^T + bias with both operands of the product in e4m3; no gradients.

    x: (..., K) in bfloat16, or its rows; a tensor's own rows are made once, and serve all products of it.
    weight: (N, K) in e4m3, contiguous; scale: (N, 1) in float32; bias: (N,) in x's dtype or None. K and N are
    multiples of 16. impl: of the quantisation of x, see `quantize_rows`.

    Returns (..., N) in x's dtype. Raises what `quantize_rows` and `torch._scaled_mm` raise.
    """
    rows = x if isinstance(x, Rows) else _rows_of(x, impl)
    out: Tensor = torch._scaled_mm(
        rows.values, weight.t(), rows.scale, scale.t(), bias=bias, out_dtype=rows.dtype, use_fast_accum=True
    )
    return out.view(*rows.shape[:-1], weight.shape[0])


def _rows_of(x: Tensor, impl: str) -> Rows:
    """A tensor's rows: those that it has, or new ones, which it keeps."""
    rows = kept_rows(x)
    if rows is None:
        rows = Rows(*quantize_rows(x, impl=impl), tuple(x.shape), x.dtype)
        keep_rows(x, rows)
    return rows


@torch.library.custom_op("vmonarch_kernels::gelu_tanh_rows", mutates_args=())
def _gelu_tanh_rows_op(x: Tensor) -> tuple[Tensor, Tensor]:
    from vmonarch_kernels import launch_fused

    with launch_fused.on_device_of(x):
        return launch_fused.quantize_rows(x, gelu=True)


@torch.library.custom_op("vmonarch_kernels::quantize_rows", mutates_args=())
def _quantize_rows_op(x: Tensor) -> tuple[Tensor, Tensor]:
    from vmonarch_kernels import launch_fused

    with launch_fused.on_device_of(x):
        return launch_fused.quantize_rows(x)


@_gelu_tanh_rows_op.register_fake
@_quantize_rows_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(rows, x.shape[-1], dtype=E4M3), x.new_empty(rows, 1, dtype=torch.float32)
