"""Gradients for torch's autograd: the backward ops beside the custom ops of `api.py`, and what links them.

Every op is opaque to torch.compile and has a fake, so that a compiled model keeps one graph forwards and backwards.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vmonarch_kernels.backward_torch import frame_backward_torch, monarch_backward_torch
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import Forward, Gradients, merge_exact, split_frames
from vmonarch_kernels.torch_impl import frame_torch


def _triton(inputs: Inputs, options: Options, kept: Forward, grad: Tensor) -> Gradients:
    from vmonarch_kernels.launch_backward import monarch_backward_triton

    return monarch_backward_triton(inputs, options, kept, grad)


def _frame_triton(inputs: Inputs, frame: int, scale: float, kept: Forward, grad: Tensor) -> Gradients:
    from vmonarch_kernels.launch_backward import frame_backward_triton

    return frame_backward_triton(inputs, frame, scale, kept, grad)


_BACKWARD: dict[str, Callable[[Inputs, Options, Forward, Tensor], Gradients]] = {
    "torch": monarch_backward_torch,
    "triton": _triton,
}
_FRAME_BACKWARD: dict[str, Callable[[Inputs, int, float, Forward, Tensor], Gradients]] = {
    "reference": frame_backward_torch,
    "torch": frame_backward_torch,
    "triton": _frame_triton,
}


def needs_gradient(inputs: Inputs) -> bool:
    """Whether autograd wants gradients of a call with these tensors."""
    wanted = (inputs.q, inputs.k, inputs.v, *(inputs.extra or ()))
    return torch.is_grad_enabled() and any(x.requires_grad for x in wanted)


def in_backward_pass() -> bool:
    """Whether this runs inside a backward pass, where a checkpoint computes a forward again."""
    inside: bool = torch._C._current_graph_task_id() != -1
    return inside


def _pair(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if first is None or second is None else (first, second)


def _five(grads: Gradients, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the ops return them: a tensor each, empty where there is no extra part."""
    none = q.new_empty(0)
    d_out, d_lse = grads.extra_out, grads.extra_lse
    return grads.q, grads.k, grads.v, none if d_out is None else d_out, q.new_empty(0) if d_lse is None else d_lse


def _like(q: Tensor, extra_out: Tensor | None, extra_lse: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, q, q, extra_out, extra_lse))


@torch.library.custom_op("vmonarch_kernels::monarch_attention_backward", mutates_args=())
def _monarch_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_prev: Tensor | None,
    extra_out: Tensor | None,
    extra_lse: Tensor | None,
    residual_values: Tensor | None,
    residual_scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: list[int],
    num_steps: int,
    c_floor: float,
    first_frame: bool,
    band: int | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    extra, residual = _pair(extra_out, extra_lse), _pair(residual_values, residual_scale)
    inputs = Inputs(q, k, v, (grid[0], grid[1], grid[2]), l_prev, extra, residual)
    options = Options(num_steps, c_floor, first_frame, band, scale)
    kept = Forward(out, None, lse if lse.numel() else None)
    return _five(_BACKWARD[impl](inputs, options, kept, grad), q)


@_monarch_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_prev: Tensor | None,
    extra_out: Tensor | None,
    extra_lse: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _like(q, extra_out, extra_lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep the tensors, the output and the statistics; L has no gradient."""
    out, l_new, lse = output
    ctx.mark_non_differentiable(l_new, lse)
    ctx.set_materialize_grads(False)  # else the backward pass is given zeros of the size of L
    ctx.save_for_backward(*inputs[:8], out, lse)
    ctx.arguments, ctx.has_lse = inputs[8:15], inputs[16]


def _monarch_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 17
    if not ctx.has_lse:
        raise RuntimeError("the op was called with keep_lse=False, and its backward pass needs the log-sum-exps.")
    saved = ctx.saved_tensors
    dq, dk, dv, d_out, d_lse = _monarch_backward_op(grad, *saved, *ctx.arguments)
    has_extra = saved[4] is not None
    return dq, dk, dv, None, *((d_out, d_lse) if has_extra else (None, None)), *(None,) * 11


def differentiate(op: Any) -> None:
    """Give the custom op of ``monarch_attention`` its gradients."""
    op.register_autograd(_monarch_gradients, setup_context=_save)


@torch.library.custom_op("vmonarch_kernels::frame_attention", mutates_args=())
def frame_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_out: Tensor | None,
    extra_lse: Tensor | None,
    grid: list[int],
    frame: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """``frame_attention`` of one frame: (out (B, P, H, D), lse (B, H, 1, P) of all that its queries see)."""
    inputs = Inputs(q, k, v, (grid[0], grid[1], grid[2]), extra=_pair(extra_out, extra_lse))
    if impl == "triton":
        from vmonarch_kernels.launch import frame_triton

        out, lse = frame_triton(inputs, frame, scale)
    else:
        out, lse = frame_torch(split_frames(q, inputs.frames)[:, frame], k, v, scale)
    if inputs.extra is not None:
        out, lse = merge_exact(out, lse, *(split_frames(x, inputs.frames)[:, frame] for x in inputs.extra))
    return out.to(q.dtype).contiguous(), lse.mT[:, :, None].contiguous()


@frame_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_out: Tensor | None,
    extra_lse: Tensor | None,
    grid: list[int],
    frame: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = q.shape
    positions = grid[1] * grid[2]
    lse = q.new_empty((batch, heads, 1, positions), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((batch, positions, heads, dim)), lse


@torch.library.custom_op("vmonarch_kernels::frame_attention_backward", mutates_args=())
def _frame_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_out: Tensor | None,
    extra_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: list[int],
    frame: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(q, k, v, (grid[0], grid[1], grid[2]), extra=_pair(extra_out, extra_lse))
    return _five(_FRAME_BACKWARD[impl](inputs, frame, scale, Forward(out, None, lse), grad), q)


@_frame_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_out: Tensor | None,
    extra_lse: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _like(q, extra_out, extra_lse)


def _save_frame(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], out, lse)
    ctx.arguments = inputs[5:]


def _frame_gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    dq, dk, dv, d_out, d_lse = _frame_backward_op(grad, *saved, *ctx.arguments)
    return dq, dk, dv, *((d_out, d_lse) if saved[3] is not None else (None, None)), None, None, None, None


frame_op.register_autograd(_frame_gradients, setup_context=_save_frame)
