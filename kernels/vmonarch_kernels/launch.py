"""impl="triton": allocation and launches; the kernels are in `_triton.py`, their tiles in `configs.py`."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vmonarch_kernels import _triton as kernels
from vmonarch_kernels.configs import attend_config, l_step_config, shared_memory_limit
from vmonarch_kernels.cost import window_frames
from vmonarch_kernels.structure import merge_exact, split_frames
from vmonarch_kernels.torch_impl import L_DTYPE

# Programs to aim at when the first frame's keys are split: several waves on the largest chips, so
# that the last wave's idle part is small.
_SPLIT_PROGRAMS = 800
_MIN_SPLIT_KEYS = 1024


@dataclass(frozen=True)
class _Call:
    """What every launch of one call shares."""

    q: Tensor  # (B, T, P, H, D)
    k: Tensor  # (B, N, H, D)
    v: Tensor
    scale: float
    band: int | None
    first_frame: bool
    shared_memory: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        batch, frames, positions, heads, dim = self.q.shape
        return batch, frames, positions, heads, dim

    @property
    def block_d(self) -> int:
        return max(16, int(triton.next_power_of_2(self.q.shape[-1])))

    @property
    def precision(self) -> str:
        """float32 products as three tf32 ones, which keeps float32's accuracy on tensor cores."""
        return "tf32x3" if self.q.dtype == torch.float32 else "tf32"

    @property
    def width(self) -> int:
        return max(1, window_frames(self.q.shape[1], self.band))

    @property
    def band_arguments(self) -> tuple[int, int]:
        return (0 if self.band is None else self.band), self.width

    def statistic(self) -> Tensor:
        """An uninitialised (B, H, T, P) float32 tensor."""
        batch, frames, positions, heads, _ = self.sizes
        return self.q.new_empty((batch, heads, frames, positions), dtype=torch.float32)

    def like_q(self) -> Tensor:
        return self.q.new_empty(self.q.shape)


def monarch_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_prev: Tensor | None,
    extra: tuple[Tensor, Tensor] | None,
    frames: int,
    num_steps: int,
    c_floor: float,
    first_frame: bool,
    band: int | None,
    scale: float,
    return_l: bool,
) -> tuple[Tensor, Tensor | None]:
    """Structured attention on (B, N, H, D); returns (out, L as e4m3 (B, P, H, T, T) or None).

    The caller has handled the cases in which the structure is exact (one frame, full band).
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    limit = shared_memory_limit(q.device)
    call = _Call(split_frames(q, frames), k, v, scale, band, first_frame, limit)
    out = call.like_q()
    exact = exact_lse = None
    if extra is not None:
        exact = split_frames(extra[0], frames).contiguous()
        exact_lse = split_frames(extra[1], frames).permute(0, 3, 1, 2).float().contiguous()  # (B, H, T, P)
    if band is not None:
        band_out, band_lse = call.like_q(), call.statistic()
        _attend_band(call, band_out, band_lse)
        exact, exact_lse = _merge(band_out, band_lse, exact, exact_lse)

    beta = call.q if l_prev is None else _next_beta(call, c_floor, l_prev=l_prev)
    rk, c_l = call.like_q(), call.statistic()
    for _ in range(num_steps - 1):
        _r_step(call, beta, rk, c_l, None)
        beta = _next_beta(call, c_floor, rk=rk, c_l=c_l, exact_lse=exact_lse)
    y = call.like_q()
    _r_step(call, beta, rk, c_l, y)
    l_new = _l_output(call, rk, c_l, y, exact, exact_lse, out, return_l)
    if first_frame and band is None:
        first_lse = call.statistic() if extra is not None else None
        _attend_first_frame(call, out, first_lse)
        if first_lse is not None and exact is not None and exact_lse is not None:
            out[:, :1], _ = _merge(out[:, :1], first_lse[:, :, :1], exact[:, :1], exact_lse[:, :, :1])
    return out.flatten(1, 2), l_new


def _merge(out: Tensor, lse: Tensor, other: Tensor | None, other_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """``merge_exact`` of outs (B, T, P, H, D) and statistics (B, H, T, P); the first alone without another."""
    if other is None or other_lse is None:
        return out, lse
    merged, merged_lse = merge_exact(out, lse.permute(0, 2, 3, 1), other, other_lse.permute(0, 2, 3, 1))
    return merged.contiguous(), merged_lse.permute(0, 3, 1, 2).contiguous()


def _r_step(call: _Call, beta: Tensor, rk: Tensor, c_l: Tensor, y: Tensor | None) -> None:
    """R K and c_l of every frame, and R V into ``y`` when it is given."""
    frames = call.sizes[1]
    _attend(call, beta, rk=rk, c_l=c_l, out=y, lse=None, query_frames=(0, frames), window=(0, 1))


def _attend_band(call: _Call, exact: Tensor, exact_lse: Tensor) -> None:
    frames = call.sizes[1]
    first = 0
    if call.first_frame:
        _attend_first_frame(call, exact, exact_lse)
        first = 1
    _attend(
        call,
        call.q,
        rk=None,
        c_l=None,
        out=exact,
        lse=exact_lse,
        query_frames=(first, frames),
        window=call.band_arguments,
    )


def _attend(
    call: _Call,
    queries: Tensor,
    *,
    rk: Tensor | None,
    c_l: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    query_frames: tuple[int, int],
    window: tuple[int, int],
    split_keys: int = 0,
    splits: int = 1,
) -> None:
    """Launch ``attend_kernel``; absent tensors are replaced by placeholders that it never touches.

    ``window`` is (band, width) in frames. With ``split_keys`` the programs divide frame 0's
    keys, and out and lse are float32 partials with the split as leading dimension.
    """
    batch, frames, positions, heads, dim = call.sizes
    split = split_keys > 0
    config = attend_config(
        call.block_d,
        call.q.dtype,
        call.shared_memory,
        with_k=rk is not None,
        with_v=out is not None,
    )
    band, width = window
    keys = split_keys if split else width * positions
    even = keys % config.block_n == 0 and (not split or (width * positions) % split_keys == 0)
    o = call.q if out is None else out
    o_strides = (o.stride(1), o.stride(0), o.stride(2), o.stride(3)) if split else o.stride()[:4]
    if lse is None:
        lse_strides = (0, 0, 0)
    elif split:  # (S, B, H, P)
        lse_strides = (lse.stride(1), lse.stride(2), lse.stride(0))
    else:  # (B, H, T, P)
        lse_strides = (lse.stride(0), lse.stride(1), lse.stride(2))
    parts = splits if split else query_frames[1] - query_frames[0]
    grid = (triton.cdiv(positions, config.block_m), parts, batch * heads)
    targets = (
        call.q if rk is None else rk,
        call.q if c_l is None else c_l,
        o,
        *o_strides,
        call.q if lse is None else lse,
        *lse_strides,
    )
    window_arguments = (query_frames[0], band, width, split_keys)
    options = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": call.block_d,
        "EVEN_KEYS": even,
        "WITH_K": rk is not None,
        "WITH_V": out is not None,
        "WITH_LSE": lse is not None,
        "SPLIT": split,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    rows = [_rows(x) for x in (queries.flatten(1, 2), call.k, call.v)]
    if config.warp_specialized and call.block_d == dim and all(x is not None for x in rows):
        blocks = (config.block_m, config.block_n, config.block_n)
        descriptors = [
            TensorDescriptor(x, x.shape, x.stride(), [block, dim])
            for x, block in zip(rows, blocks, strict=True)
            if x is not None
        ]
        kernels.attend_ws_kernel[grid](
            *descriptors,
            queries,
            *queries.stride()[:4],
            *targets,
            call.scale,
            frames,
            positions,
            heads,
            *window_arguments,
            **options,
        )
        return
    kernels.attend_kernel[grid](
        queries,
        *queries.stride()[:4],
        call.k,
        *call.k.stride()[:3],
        call.v,
        *call.v.stride()[:3],
        *targets,
        call.scale,
        frames,
        positions,
        heads,
        dim,
        *window_arguments,
        MASK_D=call.block_d != dim,
        PRECISION=call.precision,
        **options,
    )


def _rows(x_BNHD: Tensor) -> Tensor | None:
    """The tensor as (B * N, H * D) rows for the copy engine, or None where its layout has none.

    Heads must lie side by side, batches on end, base and rows on 16 bytes.
    """
    batch, tokens, heads, dim = x_BNHD.shape
    side_by_side = x_BNHD.stride(3) == 1 and (heads == 1 or x_BNHD.stride(2) == dim)
    on_end = batch == 1 or x_BNHD.stride(0) == tokens * x_BNHD.stride(1)
    row_bytes = x_BNHD.stride(1) * x_BNHD.element_size()
    if not (side_by_side and on_end) or row_bytes % 16 or x_BNHD.data_ptr() % 16:
        return None
    return x_BNHD.as_strided((batch * tokens, heads * dim), (x_BNHD.stride(1), 1))


def _attend_first_frame(call: _Call, out: Tensor, lse: Tensor | None) -> None:
    """Exact attention of frame 0 over all keys, into frame 0 of ``out`` and ``lse``.

    One frame's queries give too few programs for a large chip, so the keys are split as well.
    """
    batch, frames, positions, heads, dim = call.sizes
    tokens = frames * positions
    config = attend_config(call.block_d, call.q.dtype, call.shared_memory, with_k=False, with_v=True)
    programs = triton.cdiv(positions, config.block_m) * heads * batch
    splits = min(triton.cdiv(_SPLIT_PROGRAMS, programs), max(1, tokens // _MIN_SPLIT_KEYS))
    if splits == 1:
        _attend(
            call,
            call.q,
            rk=None,
            c_l=None,
            out=out,
            lse=call.statistic() if lse is None else lse,
            query_frames=(0, 1),
            window=(0, frames),
        )
        return
    split_keys = triton.cdiv(triton.cdiv(tokens, splits), config.block_n) * config.block_n
    splits = triton.cdiv(tokens, split_keys)
    # (S, B, P, H, D) seen through strides of (S, B, H, P, D) memory
    part = call.q.new_empty((splits, batch, heads, positions, dim), dtype=torch.float32)
    part_lse = call.q.new_empty((splits, batch, heads, positions), dtype=torch.float32)
    _attend(
        call,
        call.q,
        rk=None,
        c_l=None,
        out=part.transpose(2, 3),
        lse=part_lse,
        query_frames=(0, 1),
        window=(0, frames),
        split_keys=split_keys,
        splits=splits,
    )
    block_m = 32
    kernels.merge_splits_kernel[(triton.cdiv(positions, block_m), batch * heads)](
        part,
        part_lse,
        out,
        out.stride(0),
        out.stride(2),
        out.stride(3),
        call.q if lse is None else lse,
        *((0, 0) if lse is None else lse.stride()[:2]),
        batch,
        positions,
        heads,
        dim,
        splits,
        BLOCK_M=block_m,
        BLOCK_D=call.block_d,
        WITH_LSE=lse is not None,
    )


def _next_beta(
    call: _Call,
    c_floor: float,
    *,
    rk: Tensor | None = None,
    c_l: Tensor | None = None,
    exact_lse: Tensor | None = None,
    l_prev: Tensor | None = None,
) -> Tensor:
    """alpha_r / max(c_r, c_floor) of an L-step (rk and c_l given) or of a stored L; the kernels
    apply the score scale, so that beta has the magnitude of a query.
    """
    batch, frames, positions, heads, dim = call.sizes
    config = l_step_config(frames, call.block_d, call.q.dtype)
    beta = call.like_q()
    one_tile = frames <= config.block_k
    row_lse = None
    shared = {
        "BLOCK_L": config.block_l,
        "BLOCK_K": config.block_k,
        "BLOCK_D": call.block_d,
        "HAS_EXACT": exact_lse is not None,
        "BANDED": call.band is not None,
        "FIRST_FRAME": call.first_frame,
        "PRECISION": call.precision,
        "num_warps": config.num_warps,
    }
    if l_prev is None and not one_tile:
        row_lse = call.statistic()
        grid = (positions * heads, triton.cdiv(frames, config.block_l), batch)
        kernels.l_lse_kernel[grid](
            call.q,
            *call.q.stride()[:4],
            rk,
            c_l,
            call.q if exact_lse is None else exact_lse,
            row_lse,
            call.scale,
            frames,
            positions,
            heads,
            dim,
            *call.band_arguments,
            **shared,
        )
    grid = (positions * heads, triton.cdiv(frames, config.block_k), batch)
    unused = call.q
    kernels.next_beta_kernel[grid](
        call.q,
        *call.q.stride()[:4],
        unused if rk is None else rk,
        unused if c_l is None else c_l,
        unused if exact_lse is None else exact_lse,
        unused if row_lse is None else row_lse,
        unused if l_prev is None else _kernel_l(l_prev),
        beta,
        call.scale,
        c_floor,
        frames,
        positions,
        heads,
        dim,
        *call.band_arguments,
        FROM_L=l_prev is not None,
        ONE_TILE=one_tile,
        **shared,
    )
    return beta


def _l_output(
    call: _Call,
    rk: Tensor,
    c_l: Tensor,
    y: Tensor,
    exact: Tensor | None,
    exact_lse: Tensor | None,
    out: Tensor,
    return_l: bool,
) -> Tensor | None:
    batch, frames, positions, heads, dim = call.sizes
    config = l_step_config(frames, call.block_d, call.q.dtype)
    l_new = None
    if return_l:
        shape = (batch, positions, heads, frames, frames)
        l_new = call.q.new_empty(shape, dtype=_kernel_l_dtype(call.q.device))
    grid = (positions * heads, triton.cdiv(frames, config.block_l), batch)
    kernels.l_output_kernel[grid](
        call.q,
        *call.q.stride()[:4],
        rk,
        c_l,
        y,
        call.q if exact is None else exact,
        call.q if exact_lse is None else exact_lse,
        out,
        call.q if l_new is None else l_new,
        call.scale,
        frames,
        positions,
        heads,
        dim,
        *call.band_arguments,
        1 if call.first_frame and call.band is None else 0,
        BLOCK_L=config.block_l,
        BLOCK_K=config.block_k,
        BLOCK_D=call.block_d,
        HAS_EXACT=exact is not None,
        BANDED=call.band is not None,
        FIRST_FRAME=call.first_frame,
        STORE_L=l_new is not None,
        PRECISION=call.precision,
        num_warps=config.num_warps,
    )
    return None if l_new is None else l_new.to(L_DTYPE)


def _kernel_l_dtype(device: torch.device) -> torch.dtype:
    """dtype in which the kernels read and write L: GPUs before compute capability 8.9 and the
    interpreter cannot convert e4m3, so there float16 goes between.
    """
    converts = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return L_DTYPE if converts else torch.float16


def _kernel_l(l_prev: Tensor) -> Tensor:
    return l_prev.contiguous().to(_kernel_l_dtype(l_prev.device))
