"""impl="triton": allocation and launches; the kernels are in `_triton.py`, their tiles in `configs.py`."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vmonarch_kernels import _triton as kernels
from vmonarch_kernels.configs import (
    HOPPER_ROWS,
    Chip,
    HopperConfig,
    attend_config,
    chip,
    hopper_config,
    l_output_config,
    next_beta_config,
    power_of_2,
)
from vmonarch_kernels.cost import L_ROW_ENTRIES, window_frames
from vmonarch_kernels.structure import L_DTYPE, empty_l, merge_exact, split_frames, with_padded_rows

# Below so many tiles for each multiprocessor a persistent kernel gains little and its descriptors cost
# more to launch than the plain kernel.
MIN_WAVES = 2
_MIN_SPLIT_KEYS = 1024
_MAX_SPLITS = 12
_FULL_WAVES = 0.93


# Multiply and add as one instruction, said because Triton's own default is about to change.
_FUSION = {"enable_fp_fusion": True}


# Triton's own, made for kernels, takes longer on the host than everything else that a launch computes.
def _cdiv(x: int, y: int) -> int:
    return -(-x // y)


@dataclass(frozen=True)
class _Call:
    """What every launch of one call shares."""

    q: Tensor  # (B, T, P, H, D)
    k: Tensor  # (B, N, H, D)
    v: Tensor
    scale: float
    band: int | None
    first_frame: bool
    chip: Chip

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        batch, frames, positions, heads, dim = self.q.shape
        return batch, frames, positions, heads, dim

    @property
    def block_d(self) -> int:
        return max(16, power_of_2(self.q.shape[-1]))

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
    residual: tuple[Tensor, Tensor] | None,
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
    call = _call(q, k, v, frames, scale, band, first_frame)
    out = call.like_q()
    exact, exact_lse = _extra_part(extra, frames)
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
    l_new = _l_output(call, rk, c_l, y, exact, exact_lse, residual, out, return_l)
    if first_frame and band is None:
        _attend_frame(call, 0, out[:, 0], extra=(exact, exact_lse))
    return out.flatten(1, 2), l_new


def frame_triton(q: Tensor, k: Tensor, v: Tensor, frames: int, frame: int, scale: float) -> tuple[Tensor, Tensor]:
    """Exact attention of one frame's queries over all keys: (out (B, P, H, D), lse (B, P, H) float32)."""
    call = _call(q, k, v, frames, scale, None, first_frame=True)
    batch, _, positions, heads, dim = call.sizes
    out = call.q.new_empty((batch, positions, heads, dim))
    lse = call.q.new_empty((batch, heads, positions), dtype=torch.float32)
    _attend_frame(call, frame, out, lse)
    return out, lse.transpose(1, 2)


def refresh_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra: tuple[Tensor, Tensor] | None,
    out: Tensor,
    corrections: tuple[Tensor, Tensor],
    frames: int,
    frame: int,
    neighbours: list[int],
    share: float,
    scale: float,
) -> None:
    """Replace one frame of the output (B, N, H, D) by its exact attention, and keep what that changed.

    ``corrections``, (values, scale) as in ``Residual``, get the difference for the frame itself, and for ``neighbours``
    (of the frames before and after it) a ``share`` of it and of their own the rest.
    """
    call = _call(q, k, v, frames, scale, None, first_frame=True)
    values, scales = corrections
    converted = _kernel_8bit(values)
    keep = _Keep(converted, scales, share, before=frame - 1 in neighbours, after=frame + 1 in neighbours)
    _attend_frame(call, frame, split_frames(out, frames)[:, frame], extra=_extra_part(extra, frames), keep=keep)
    if converted is not values:
        values.copy_(converted)


@dataclass(frozen=True)
class _Keep:
    """Where a recomputed frame's corrections go, and which neighbours get a share of them."""

    values: Tensor  # (B, N, H, D)
    scale: Tensor  # (B, P, H, T)
    share: float
    before: bool
    after: bool


def _extra_part(extra: tuple[Tensor, Tensor] | None, frames: int) -> tuple[Tensor | None, Tensor | None]:
    """The extra part as the kernels read it, out (B, T, P, H, D) and log-sum-exp (B, H, T, P) float32."""
    if extra is None:
        return None, None
    out, lse = (split_frames(x, frames) for x in extra)
    return out.contiguous(), lse.permute(0, 3, 1, 2).float().contiguous()


def _call(q: Tensor, k: Tensor, v: Tensor, frames: int, scale: float, band: int | None, first_frame: bool) -> _Call:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Call(split_frames(q, frames), k, v, scale, band, first_frame, chip(q.device))


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
        _attend_frame(call, 0, exact[:, 0], exact_lse[:, :, 0])
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
    """Launch an attention kernel; absent tensors are replaced by placeholders that it never touches.

    ``window`` is (band, width) in frames. With ``split_keys`` the programs divide frame 0's
    keys, and out and lse are float32 partials with the split as leading dimension.
    """
    batch, frames, positions, heads, dim = call.sizes
    split = split_keys > 0
    band, width = window
    o = call.q if out is None else out
    o_strides = (o.stride(1), o.stride(0), o.stride(2), o.stride(3)) if split else o.stride()[:4]
    if lse is None:
        lse_strides = (0, 0, 0)
    elif split:  # (S, B, H, P)
        lse_strides = (lse.stride(1), lse.stride(2), lse.stride(0))
    else:  # (B, H, T, P)
        lse_strides = (lse.stride(0), lse.stride(1), lse.stride(2))
    parts = splits if split else query_frames[1] - query_frames[0]
    targets = (
        call.q if rk is None else rk,
        call.q if c_l is None else c_l,
        o,
        *o_strides,
        call.q if lse is None else lse,
        *lse_strides,
    )
    window_arguments = (query_frames[0], band, width, split_keys)
    with_k, with_v = rk is not None, out is not None
    options = {
        "BLOCK_D": call.block_d,
        "WITH_K": with_k,
        "WITH_V": with_v,
        "WITH_LSE": lse is not None,
        "SPLIT": split,
        **_FUSION,
    }
    hopper = hopper_config(dim, call.q.dtype, call.chip.capability, with_k=with_k, with_v=with_v)
    window_keys = [split_keys, width * positions % split_keys] if split else [width * positions]
    tiles = _cdiv(positions, HOPPER_ROWS) * parts * batch * heads
    wide = all(keys == 0 or keys > hopper.block_n for keys in window_keys) if hopper is not None else False
    if hopper is not None and wide and tiles >= MIN_WAVES * call.chip.multiprocessors:
        rows = [x for x in map(_rows, (queries.flatten(1, 2), call.k, call.v)) if x is not None]
        if len(rows) == 3:
            _attend_hopper(call, hopper, rows, targets, window_arguments, window_keys, tiles, parts, options)
            return
    config = attend_config(call.block_d, call.q.dtype, call.chip.shared_memory, with_k=with_k, with_v=with_v)
    grid = (_cdiv(positions, config.block_m), parts, batch * heads)
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
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        MASK_D=call.block_d != dim,
        EVEN_KEYS=all(k % config.block_n == 0 for k in window_keys),
        PRECISION=call.precision,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )


def _attend_hopper(
    call: _Call,
    config: HopperConfig,
    rows: list[Tensor],
    targets: tuple[object, ...],
    window_arguments: tuple[int, int, int, int],
    window_keys: list[int],
    tiles: int,
    parts: int,
    options: dict[str, int],
) -> None:
    """Launch ``attend_hopper_kernel`` on as many programs as the chip has multiprocessors."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from vmonarch_kernels import _hopper

    _, frames, positions, heads, dim = call.sizes
    dtype = gl.bfloat16 if call.q.dtype == torch.bfloat16 else gl.float16
    descriptors = []
    for x, block in zip(rows, (HOPPER_ROWS // 2, config.block_n, config.block_n), strict=True):
        descriptors.append(
            TensorDescriptor(x, list(x.shape), list(x.stride()), [block, dim], _layout(block, dim, dtype))
        )
    tail = max(keys % config.block_n or config.block_n for keys in window_keys if keys)
    _hopper.attend_hopper_kernel[(min(tiles, call.chip.multiprocessors),)](
        *descriptors,
        *targets,
        call.scale,
        tiles,
        frames,
        positions,
        parts,
        heads,
        *window_arguments,
        BLOCK_N=config.block_n,
        # Narrower than 16 keys the tensor cores do not multiply.
        TAIL=max(16, power_of_2(tail)),
        STAGES=config.stages,
        Q_STAGES=config.query_stages,
        num_warps=4,
        maxnreg=168,  # of three warp groups: 240 for each of the two that compute, 24 for the one that loads
        **options,
    )


@cache
def _layout(rows: int, columns: int, dtype: Any) -> Any:
    """Shared-memory layout of a tile that the copy engine brings."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


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


def _attend_frame(
    call: _Call,
    frame: int,
    out: Tensor,
    lse: Tensor | None = None,
    *,
    extra: tuple[Tensor | None, Tensor | None] = (None, None),
    keep: _Keep | None = None,
) -> None:
    """Exact attention of one frame's queries over all keys, and an extra part, into out (B, P, H, D), lse (B, H, P).

    One frame's queries give too few programs for a large chip, so the keys are split as well. What merges the splits
    also merges the extra part and keeps corrections.
    """
    batch, frames, positions, heads, dim = call.sizes
    tokens = frames * positions
    queries = call.q[:, frame:]
    hopper = hopper_config(dim, call.q.dtype, call.chip.capability, with_k=False, with_v=True)
    config = attend_config(call.block_d, call.q.dtype, call.chip.shared_memory, with_k=False, with_v=True)
    block_m, resident = (HOPPER_ROWS, 1) if hopper is not None else (config.block_m, 2)
    tiles = _cdiv(positions, block_m) * heads * batch
    splits = _even_splits(tiles, call.chip.multiprocessors * resident, tokens // _MIN_SPLIT_KEYS)
    extra_out, extra_lse = extra
    if splits == 1 and extra_out is None and keep is None:
        _attend(
            call,
            queries,
            rk=None,
            c_l=None,
            out=out.unsqueeze(1),
            lse=(call.statistic() if lse is None else lse.unsqueeze(2)),
            query_frames=(0, 1),
            window=(0, frames),
        )
        return
    split_keys = _cdiv(_cdiv(tokens, splits), 128) * 128
    splits = _cdiv(tokens, split_keys)
    # (S, B, P, H, D) seen through strides of (S, B, H, P, D) memory
    part = call.q.new_empty((splits, batch, heads, positions, dim), dtype=torch.float32)
    part_lse = call.q.new_empty((splits, batch, heads, positions), dtype=torch.float32)
    _attend(
        call,
        queries,
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
    unused = call.q
    kernels.merge_splits_kernel[(_cdiv(positions, block_m), batch * heads)](
        part,
        part_lse,
        unused if extra_out is None else extra_out,
        unused if extra_lse is None else extra_lse,
        out,
        *out.stride()[:3],
        unused if lse is None else lse,
        *((0, 0) if lse is None else lse.stride()[:2]),
        unused if keep is None else keep.values,
        unused if keep is None else keep.scale,
        0.0 if keep is None else keep.share,
        keep is not None and keep.before,
        keep is not None and keep.after,
        batch,
        frames,
        frame,
        positions,
        heads,
        dim,
        splits,
        BLOCK_M=block_m,
        BLOCK_D=call.block_d,
        WITH_LSE=lse is not None,
        HAS_EXTRA=extra_out is not None,
        KEEP=keep is not None,
        **_FUSION,
    )


@cache
def _even_splits(tiles: int, slots: int, largest: int) -> int:
    """The fewest key splits with which ``tiles`` programs, ``slots`` at a time, leave little of the last wave idle."""

    def used(splits: int) -> float:
        return float(tiles * splits / (_cdiv(tiles * splits, slots) * slots))

    choices = range(1, max(1, min(largest, _MAX_SPLITS)) + 1)
    return next((s for s in choices if used(s) >= _FULL_WAVES), max(choices, key=used))


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
    from_l = l_prev is not None
    config = next_beta_config(frames, call.block_d, call.q.dtype, call.chip.shared_memory, from_l=from_l)
    beta = call.like_q()
    whole_rows = frames <= config.block_k
    row_lse = None
    shared = {
        "BLOCK_L": config.block_l,
        "BLOCK_K": config.block_k,
        "BLOCK_D": call.block_d,
        "MASK_D": call.block_d != dim,
        "HAS_EXACT": exact_lse is not None,
        "BANDED": call.band is not None,
        "FIRST_FRAME": call.first_frame,
        "PRECISION": call.precision,
        "num_warps": config.num_warps,
        **_FUSION,
    }
    if not from_l and not whole_rows:
        row_lse = call.statistic()
        grid = (positions * heads, _cdiv(frames, config.block_l), batch)
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
    grid = (_cdiv(positions, config.strip) * heads, _cdiv(frames, config.block_k), batch)
    unused = call.q
    stored = None if l_prev is None else with_padded_rows(l_prev, call.chip.dtype_8bit)
    kernels.next_beta_kernel[grid](
        call.q,
        *call.q.stride()[:4],
        unused if rk is None else rk,
        unused if c_l is None else c_l,
        unused if exact_lse is None else exact_lse,
        unused if row_lse is None else row_lse,
        unused if stored is None else stored,
        0 if stored is None else stored.stride(3) // L_ROW_ENTRIES,
        beta,
        call.scale,
        c_floor,
        frames,
        positions,
        heads,
        dim,
        *call.band_arguments,
        PARTS=config.parts,
        STRIP=config.strip,
        STAGES=config.num_stages,
        FROM_L=from_l,
        WHOLE_ROWS=whole_rows,
        ONE_TILE=frames <= config.block_l and (whole_rows or from_l),
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
    residual: tuple[Tensor, Tensor] | None,
    out: Tensor,
    return_l: bool,
) -> Tensor | None:
    batch, frames, positions, heads, dim = call.sizes
    config = l_output_config(frames, call.block_d, call.q.dtype, call.chip.shared_memory, exact=exact is not None)
    l_new = None
    if return_l:
        l_new = empty_l(call.q, dtype=call.chip.dtype_8bit)
    grid = (_cdiv(positions, config.strip) * heads, _cdiv(frames, config.block_l), batch)
    unused = call.q
    kernels.l_output_kernel[grid](
        call.q,
        *call.q.stride()[:4],
        rk,
        c_l,
        y,
        unused if exact is None else exact,
        unused if exact_lse is None else exact_lse,
        out,
        unused if l_new is None else l_new,
        0 if l_new is None else l_new.stride(3) // L_ROW_ENTRIES,
        unused if residual is None else _kernel_8bit(residual[0]),
        unused if residual is None else residual[1],
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
        PARTS=config.parts,
        STRIP=config.strip,
        STAGES=config.num_stages,
        MASK_D=call.block_d != dim,
        HAS_EXACT=exact is not None,
        BANDED=call.band is not None,
        FIRST_FRAME=call.first_frame,
        STORE_L=l_new is not None,
        HAS_RESIDUAL=residual is not None,
        ONE_TILE=frames <= config.block_k,
        PRECISION=call.precision,
        num_warps=config.num_warps,
        **_FUSION,
    )
    return None if l_new is None else with_padded_rows(l_new, L_DTYPE)


def _kernel_8bit(x: Tensor) -> Tensor:
    return x.contiguous().to(chip(x.device).dtype_8bit)
