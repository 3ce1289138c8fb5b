"""The public calls: validation, choice of implementation, one custom op for torch.compile."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, overload

import torch
from torch import Tensor

from vmonarch_kernels.autograd import differentiate, frame_op, needs_gradient
from vmonarch_kernels.cost import is_exact
from vmonarch_kernels.dense import attention_lse, dense_attention
from vmonarch_kernels.reference import monarch_reference
from vmonarch_kernels.spec import MAX_FRAMES, PAPER, Grid, Inputs, Options
from vmonarch_kernels.structure import L_DTYPE, Forward, empty_l, merge_exact, split_frames
from vmonarch_kernels.torch_impl import monarch_torch, structured_torch

Attend = Callable[[Inputs, Options, bool], tuple[Tensor, Tensor | None]]
"""An implementation: (inputs, options, whether L is wanted) -> (out, L or None)."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class ImplUnavailable(ValueError):
    """The implementation asked for cannot run here; the message says why."""


def _unless_exact(run: Attend) -> Attend:
    """Dense attention where the structure is exact, and ``run`` elsewhere."""

    def attend(inputs: Inputs, options: Options, return_l: bool) -> tuple[Tensor, Tensor | None]:
        exact = is_exact(inputs.frames, options.band)
        return _dense(inputs, options, return_l) if exact else run(inputs, options, return_l)

    return attend


def _dense(inputs: Inputs, options: Options, return_l: bool) -> tuple[Tensor, Tensor | None]:
    """What the structure is when it is exact; L is zero."""
    q, k, v = inputs.q, inputs.k, inputs.v
    scale = options.score_scale(inputs.head_dim)
    l_new = empty_l(split_frames(q, inputs.frames)).zero_() if return_l else None
    if inputs.extra is None:
        return dense_attention(q, k, v, scale=scale).contiguous(), l_new
    out, lse = attention_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    merged, _ = merge_exact(out.transpose(1, 2), lse.transpose(1, 2), *inputs.extra)
    return merged.contiguous(), l_new


def _triton(inputs: Inputs, options: Options, return_l: bool) -> tuple[Tensor, Tensor | None]:
    """Triton is imported when its kernels are first called, because many machines have none."""
    from vmonarch_kernels.launch import monarch_triton

    return monarch_triton(inputs, options, return_l)


def _kept(inputs: Inputs, options: Options, impl: str, return_l: bool) -> Forward:
    """A call of "torch" or "triton" with what its backward pass keeps."""
    if is_exact(inputs.frames, options.band):
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        out, lse = attention_lse(q, k, v, scale=options.score_scale(inputs.head_dim))
        out, lse = out.transpose(1, 2), lse.mT
        if inputs.extra is not None:
            out, lse = merge_exact(out, lse, *inputs.extra)
        l_new = empty_l(split_frames(inputs.q, inputs.frames)).zero_() if return_l else None
        return Forward(out.contiguous(), l_new, lse.mT.unflatten(2, (inputs.frames, -1)).contiguous())
    if impl == "torch":
        return structured_torch(inputs, options, return_l)
    from vmonarch_kernels.launch import structured_triton

    return structured_triton(inputs, options, return_l, keep_lse=True)


IMPLS: dict[str, Attend] = {
    "reference": monarch_reference,
    "torch": _unless_exact(monarch_torch),
    "triton": _unless_exact(_triton),
}
"""The implementations by name. They take what ``attend`` has checked."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def hardware_obstacle(device: torch.device) -> str | None:
    """Why this machine cannot run the Triton kernels; asked while torch.compile traces, answered by running it."""
    if find_spec("triton") is None:
        return "the triton package is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type!r} and Triton needs CUDA"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor} and the kernels need 8.0 or later"
    return None


def _triton_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels cannot run, or None when they can."""
    obstacle: str | None = hardware_obstacle(device)
    if obstacle is not None:
        return obstacle
    if dtype not in _DTYPES:
        return f"the dtype is {dtype} and the kernels take bfloat16, float16 or float32"
    if not 16 <= head_dim <= 256:
        return f"the head dimension is {head_dim} and the kernels take 16 to 256"
    return None


def resolve_impl(
    impl: str, device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> Literal["reference", "torch", "triton"]:
    """The implementation that will run.

    "auto" is "triton" on a CUDA GPU that can run the kernels and "torch" elsewhere (also where
    Triton's interpreter is on: it is a debugger, not a way to compute). A named implementation is
    returned unchanged. Raises ImplUnavailable when it cannot run, ValueError for an unknown name.
    """
    device = torch.device(device)
    if impl == "auto":
        on_gpu = device.type == "cuda" and _triton_obstacle(device, dtype, head_dim) is None
        return "triton" if on_gpu else "torch"
    if impl == "triton":
        if obstacle := _triton_obstacle(device, dtype, head_dim):
            raise ImplUnavailable(f"impl='triton' cannot run because {obstacle}.")
        return "triton"
    if impl == "torch":
        return "torch"
    if impl == "reference":
        return "reference"
    raise ValueError(f"impl is {impl!r}; valid are {', '.join(('auto', *IMPLS))}.")


@overload
def monarch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    num_steps: int = ...,
    c_floor: float = ...,
    first_frame: bool = ...,
    band: int | None = ...,
    scale: float | None = ...,
    impl: str = ...,
    l_prev: Tensor | None = ...,
    extra: tuple[Tensor, Tensor] | None = ...,
    residual: tuple[Tensor, Tensor] | None = ...,
    return_l: Literal[False] = ...,
) -> Tensor: ...


@overload
def monarch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    num_steps: int = ...,
    c_floor: float = ...,
    first_frame: bool = ...,
    band: int | None = ...,
    scale: float | None = ...,
    impl: str = ...,
    l_prev: Tensor | None = ...,
    extra: tuple[Tensor, Tensor] | None = ...,
    residual: tuple[Tensor, Tensor] | None = ...,
    return_l: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def monarch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    num_steps: int = PAPER.num_steps,
    c_floor: float = PAPER.c_floor,
    first_frame: bool = PAPER.first_frame,
    band: int | None = PAPER.band,
    scale: float | None = PAPER.scale,
    impl: str = "auto",
    l_prev: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    residual: tuple[Tensor, Tensor] | None = None,
    return_l: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Monarch-structured self-attention of a video's tokens (VMonarch, arXiv 2601.22275).

    The flat form of ``attend``.

    Args:
        q, k, v: (B, N, heads, D), any strides, one of bfloat16, float16, float32 (float64 for
            "reference" and "torch" on a CPU); tokens in raster order of ``grid``.
        grid: (T, H, W) latent frames and patches, T * H * W = N. T = 1 is dense attention.
        num_steps: iterations of R-step and L-step, 1 or more (paper: 2).
        c_floor: lower bound of c_r, in (0, 1] (paper: 0.1).
        first_frame: frame 0's queries see every token exactly (paper, first-frame recomputation).
        band: None, or w >= 0: every query frame sees its 2w + 1 nearest key frames exactly (ours).
            All frames in the window (w >= T - 1 at the latest) is dense attention.
        scale: factor of the scores; 1 / sqrt(D) when None.
        impl: "auto", "reference", "torch" or "triton"; see ``resolve_impl``.
        l_prev: what an earlier call with the same shapes returned beside its output: a warm start (ours).
        extra: (out (B, N, heads, D), lse (B, N, heads) float32, natural logarithm) of every query's
            attention over keys outside the video, such as a prompt's; merged exactly (ours). Queries
            without such keys have lse = -inf and finite out.
        residual: (values (B, N, heads, D) float8_e4m3fn, scale (B, H * W, heads, T) float32), whose product is added
            to the output (ours; ``Residual`` keeps it). Frames that are exact already must have scale 0.
        return_l: also return L for the next call's warm start.

    Returns:
        out (B, N, heads, D) in q's dtype, contiguous; with ``return_l`` also 256 L, float8_e4m3fn
        (B, H * W, heads, T, T), indexed [b, j, head, l, k].

    Workspace: at most four tensors of q's size and dtype (the R-step's queries, R K, R V and the exact part), plus
    N * heads float32 statistics.

    Gradients: q, k, v and both tensors of ``extra`` have them, exactly those of what is computed, in every
    implementation; ``l_prev``, ``residual`` and the returned L are constants. For the backward pass the arguments, the
    output and at most N * heads numbers are kept, and the R-steps are computed again; beside the gradients it holds at
    most six tensors of q's size ("triton"; ../README.md, the backward pass).

    Raises ValueError that names the argument, what came and what is valid; ImplUnavailable when a
    named implementation cannot run here.
    """
    inputs = Inputs(q, k, v, grid, l_prev, extra, residual)
    options = Options(num_steps, c_floor, first_frame, band, scale)
    out, l_new = attend(inputs, options, impl=impl, return_l=return_l)
    return out if l_new is None else (out, l_new)


def attend(
    inputs: Inputs, options: Options = PAPER, *, impl: str = "auto", return_l: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``monarch_attention`` of a call that is written down as ``Inputs`` and ``Options``.

    Returns (out, L), where L is None unless ``return_l`` is set. Shapes, dtypes and errors as there.
    """
    _check(inputs)
    q = inputs.q
    chosen = resolve_impl(impl, q.device, q.dtype, inputs.head_dim)
    differentiable = needs_gradient(inputs)
    if chosen == "reference" and differentiable:
        return IMPLS[chosen](inputs, options, return_l)  # plain autograd, which a custom op would not let through
    out, l_new, _ = _monarch_op(
        q,
        inputs.k,
        inputs.v,
        inputs.l_prev,
        *(inputs.extra or (None, None)),
        *(inputs.residual or (None, None)),
        list(inputs.grid),
        options.num_steps,
        options.c_floor,
        options.first_frame,
        options.band,
        options.score_scale(inputs.head_dim),
        chosen,
        return_l,
        differentiable,
    )
    return out, l_new if return_l else None


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    frame: int,
    *,
    scale: float | None = None,
    impl: str = "auto",
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Exact attention of one latent frame's queries over all keys (the paper's recomputation, of any frame).

    Args as in ``monarch_attention``; ``frame`` counts from 0. Returns (B, H * W, heads, D) in q's dtype.

    Raises ValueError for a frame that the grid does not have, ImplUnavailable when a named implementation cannot run.
    """
    inputs = Inputs(q, k, v, grid, extra=extra)
    _check(inputs)
    if not 0 <= frame < inputs.frames:
        raise ValueError(f"frame is {frame}; valid are 0 to {inputs.frames - 1}.")
    scale = Options(scale=scale).score_scale(inputs.head_dim)
    chosen = resolve_impl(impl, q.device, q.dtype, inputs.head_dim)
    out: Tensor
    out, _ = frame_op(q, k, v, *(extra or (None, None)), list(grid), frame, scale, chosen)
    return out


def _check(inputs: Inputs) -> None:
    """ValueError unless the tensors fit each other and the grid."""
    q, k, v, grid = inputs.q, inputs.k, inputs.v, inputs.grid
    for name, x in inputs.tensors():
        if x.device != q.device:
            raise ValueError(f"q is on {q.device} and {name} on {x.device}; all tensors must be on one device.")
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v are {shapes}; they must share one shape (B, N, heads, D).")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one dtype.")
    if len(grid) != 3 or min(grid) < 1 or grid[0] * grid[1] * grid[2] != q.shape[1]:
        raise ValueError(f"grid is {tuple(grid)} for {q.shape[1]} tokens; T * H * W must equal the tokens.")
    frames = inputs.frames
    if frames > MAX_FRAMES:
        raise ValueError(f"grid has {frames} latent frames; at most {MAX_FRAMES} are supported.")
    batch, tokens, heads, _ = q.shape
    if inputs.l_prev is not None:
        found, expected = inputs.l_prev, (batch, tokens // frames, heads, frames, frames)
        if tuple(found.shape) != expected or found.dtype != L_DTYPE:
            raise ValueError(f"l_prev is {tuple(found.shape)} {found.dtype}; these tensors need {expected} {L_DTYPE}.")
    if inputs.extra is not None:
        out, lse = inputs.extra
        if out.shape != q.shape or lse.shape != q.shape[:3]:
            raise ValueError(
                f"extra is {tuple(out.shape)} and {tuple(lse.shape)}; "
                f"these tensors need {tuple(q.shape)} and {tuple(q.shape[:3])}."
            )
    if inputs.residual is not None:
        values, scale = inputs.residual
        scale_shape = (batch, tokens // frames, heads, frames)
        if values.shape != q.shape or values.dtype != L_DTYPE or tuple(scale.shape) != scale_shape:
            raise ValueError(
                f"residual is {tuple(values.shape)} {values.dtype} and {tuple(scale.shape)}; "
                f"these tensors need {tuple(q.shape)} {L_DTYPE} and {scale_shape}."
            )


@torch.library.custom_op("vmonarch_kernels::monarch_attention", mutates_args=())
def _monarch_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_prev: Tensor | None,
    extra_out: Tensor | None,
    extra_lse: Tensor | None,
    residual_values: Tensor | None,
    residual_scale: Tensor | None,
    grid: list[int],
    num_steps: int,
    c_floor: float,
    first_frame: bool,
    band: int | None,
    scale: float,
    impl: str,
    return_l: bool,
    keep_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, L or an empty tensor, ``Forward.lse`` or an empty tensor)."""
    extra = None if extra_out is None or extra_lse is None else (extra_out, extra_lse)
    residual = None if residual_values is None or residual_scale is None else (residual_values, residual_scale)
    inputs = Inputs(q, k, v, (grid[0], grid[1], grid[2]), l_prev, extra, residual)
    options = Options(num_steps, c_floor, first_frame, band, scale)
    lse = None
    if keep_lse:
        out, l_new, lse = _kept(inputs, options, impl, return_l)
    else:
        out, l_new = IMPLS[impl](inputs, options, return_l)
    l_new = q.new_empty(0, dtype=L_DTYPE) if l_new is None else l_new
    return out, l_new, _statistic(q, 0, 0) if lse is None else lse


def _statistic(q: Tensor, frames: int, positions: int) -> Tensor:
    batch, _, heads, _ = q.shape
    return q.new_empty((batch, heads, frames, positions), dtype=torch.promote_types(q.dtype, torch.float32))


@_monarch_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_prev: Tensor | None,
    extra_out: Tensor | None,
    extra_lse: Tensor | None,
    residual_values: Tensor | None,
    residual_scale: Tensor | None,
    grid: list[int],
    num_steps: int,
    c_floor: float,
    first_frame: bool,
    band: int | None,
    scale: float,
    impl: str,
    return_l: bool,
    keep_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    l_new = empty_l(split_frames(q, grid[0])) if return_l else q.new_empty(0, dtype=L_DTYPE)
    rows = 0
    if keep_lse:
        rows = grid[0] if band is not None or is_exact(grid[0], band) else int(first_frame)
    return q.new_empty(q.shape), l_new, _statistic(q, rows, grid[1] * grid[2] if rows else 0)


differentiate(_monarch_op)
