"""impl="triton": allocation and launches; the kernels are in `_triton.py`, their tiles in `configs.py`.

A kernel argument is None for a tensor that a launch does not have; constants tell the kernel so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from vmonarch_kernels import _triton as kernels
from vmonarch_kernels.configs import (
    HOPPER_ROWS,
    AttendConfig,
    Chip,
    HopperConfig,
    attend_config,
    chip,
    hopper_config,
    l_output_config,
    power_of_2,
    r_queries_config,
)
from vmonarch_kernels.cost import L_ROW_ENTRIES, window_frames
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import L_SCALE, Forward, empty_l, split_frames, with_padded_rows

MIN_WAVES = 2
"""The persistent Hopper kernel needs so many tiles for each multiprocessor. With fewer it gains less than its
descriptors cost the host.
"""
HOPPER_REGISTERS = 168
"""Of a thread, on the mean: the Hopper kernels' two warp groups that compute have 240, the one that loads has 24."""
_MIN_SPLIT_KEYS = 1024
_MAX_SPLITS = 12
_FULL_WAVES = 0.93

# A multiply and an add become one instruction. Stated, because later versions of Triton may have another default.
FUSION = {"enable_fp_fusion": True}

_Part = tuple[Tensor, Tensor]
"""Exactly known attention: out (B, T, P, H, D), contiguous, and log-sum-exp (B, H, T, P) float32, contiguous."""


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def on_their_device(
    run: Callable[Concatenate[Inputs, _Arguments], _Result],
) -> Callable[Concatenate[Inputs, _Arguments], _Result]:
    """Make the inputs' device the current one: Triton launches on that, wherever the tensors are."""

    @wraps(run)
    def guarded(inputs: Inputs, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.cuda.device_of(inputs.q):
            return run(inputs, *args, **kwargs)

    return guarded


# Triton's own cdiv is made for kernels and is slow on the host.
def cdiv(x: int, y: int) -> int:
    return -(-x // y)


@dataclass(frozen=True)
class Call:
    """What every launch of one call shares."""

    q: Tensor  # (B, T, P, H, D)
    k: Tensor  # (B, N, H, D)
    v: Tensor
    options: Options
    scale: float
    chip: Chip

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> "Call":
        """The kernels take rows of the head dimension as they lie, so its elements must be side by side."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (inputs.q, inputs.k, inputs.v))
        scale = options.score_scale(inputs.head_dim)
        return cls(split_frames(q, inputs.frames), k, v, options, scale, chip(q.device))

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        batch, frames, positions, heads, dim = self.q.shape
        return batch, frames, positions, heads, dim

    @property
    def block_d(self) -> int:
        return max(16, power_of_2(self.q.shape[-1]))

    @property
    def precision(self) -> str:
        """Of products; only those of float32 have a choice."""
        return self.chip.float32_precision if self.q.dtype == torch.float32 else "ieee"

    @property
    def band_arguments(self) -> tuple[int, int]:
        """(band, width of its window) in frames; (0, 1) where there is no band."""
        band = self.options.band
        return (0 if band is None else band), max(1, window_frames(self.q.shape[1], band))

    @property
    def row_order(self) -> tuple[int, ...]:
        """Strides of q without the head dimension's, as kernels take them."""
        return self.q.stride()[:4]

    def attend_tile(self, *, with_k: bool, with_v: bool) -> tuple[AttendConfig, HopperConfig | None]:
        """Tiles of the attention kernels: the plain one's, and the Hopper one's where it can run."""
        dtype, dim = self.q.dtype, self.q.shape[-1]
        plain = attend_config(self.block_d, dtype, self.chip.shared_memory, with_k=with_k, with_v=with_v)
        return plain, hopper_config(dim, dtype, self.chip.capability, with_k=with_k, with_v=with_v)

    def statistic(self) -> Tensor:
        """An uninitialised (B, H, T, P) float32 tensor."""
        batch, frames, positions, heads, _ = self.sizes
        return self.q.new_empty((batch, heads, frames, positions), dtype=torch.float32)

    def like_q(self) -> Tensor:
        return self.q.new_empty(self.q.shape)


def monarch_triton(inputs: Inputs, options: Options, return_l: bool) -> tuple[Tensor, Tensor | None]:
    """Structured attention on (B, N, H, D); returns (out, L as e4m3 (B, P, H, T, T) or None).

    The caller has handled the cases in which the structure is exact (one frame, full band).
    """
    return structured_triton(inputs, options, return_l, keep_lse=False)[:2]


@on_their_device
def structured_triton(inputs: Inputs, options: Options, return_l: bool, keep_lse: bool) -> Forward:
    """``monarch_triton`` with what its backward pass keeps, which is one more statistic with ``keep_lse``."""
    call = Call.of(inputs, options)
    if options.band is None:
        exact = _extra_part(inputs)
    else:
        exact = _attend_band(call)
        if inputs.extra is not None:
            _merge_extra(call, exact, inputs.extra)

    q_r = call.q if inputs.l_prev is None else r_queries(call, l_prev=inputs.l_prev)
    rk, c_l = call.like_q(), call.statistic()
    for _ in range(options.num_steps - 1):
        r_step(call, q_r, rk, c_l, None)
        q_r = r_queries(call, rk=rk, c_l=c_l, exact_lse=None if exact is None else exact[1])
    y = call.like_q()
    r_step(call, q_r, rk, c_l, y)
    out, l_new = _l_output(call, (rk, c_l, y), exact, inputs.residual, return_l)
    lse = None if exact is None or options.band is None else exact[1]
    if options.first_frame and options.band is None:
        lse = call.statistic()[:, :, :1].contiguous() if keep_lse else None
        _attend_frame(call, 0, out[:, 0], None if lse is None else lse[:, :, 0], extra=exact)
    return Forward(out.flatten(1, 2), l_new, lse if keep_lse else None)


@on_their_device
def frame_triton(inputs: Inputs, frame: int, scale: float) -> tuple[Tensor, Tensor]:
    """Exact attention of one frame's queries over all keys: (out (B, P, H, D), lse (B, P, H) float32).

    Keys outside the video (``inputs.extra``) are the caller's.
    """
    call = Call.of(inputs, Options(scale=scale))
    batch, _, positions, heads, dim = call.sizes
    out = call.q.new_empty((batch, positions, heads, dim))
    lse = call.q.new_empty((batch, heads, positions), dtype=torch.float32)
    _attend_frame(call, frame, out, lse)
    return out, lse.transpose(1, 2)


@on_their_device
def refresh_triton(
    inputs: Inputs,
    out: Tensor,
    residual: tuple[Tensor, Tensor],
    frame: int,
    neighbours: list[int],
    share: float,
    scale: float,
) -> None:
    """Replace one frame of the output (B, N, H, D) by its exact attention, and keep what that changed.

    The difference becomes the frame's ``residual``, (values, scale) as in ``Residual``. ``neighbours`` (of the frames
    before and after it) get a ``share`` of the difference, and the rest of their own residual.
    """
    call = Call.of(inputs, Options(scale=scale))
    kept = kernel_residual(residual)
    keep = _Keep(*kept, share, before=frame - 1 in neighbours, after=frame + 1 in neighbours)
    _attend_frame(call, frame, split_frames(out, inputs.frames)[:, frame], extra=_extra_part(inputs), keep=keep)
    _give_back(kept, residual)


@on_their_device
def turn_triton(
    inputs: Inputs, out: Tensor, residual: tuple[Tensor, Tensor], turn: Tensor, share: float, scale: float
) -> None:
    """``refresh_triton`` of the frame that a tensor names, int32 (4,): the frame, 1 or 0 for the neighbour before and
    the one after it, and a 0 that is not read. A recorded launch then serves every frame.
    """
    call = Call.of(inputs, Options(scale=scale))
    frames = split_frames(out, inputs.frames)
    kept = kernel_residual(residual)
    keep = _Keep(*kept, share, turn=turn, frame_stride=frames.stride(1))
    _attend_frame(call, 0, frames[:, 0], extra=_extra_part(inputs), keep=keep)
    _give_back(kept, residual)


def _give_back(kept: tuple[Tensor, Tensor], residual: tuple[Tensor, Tensor]) -> None:
    """Copy what the kernels have changed into the caller's residual, where they had a copy of it."""
    for mine, theirs in zip(kept, residual, strict=True):
        if mine.data_ptr() != theirs.data_ptr():
            theirs.copy_(mine.view(theirs.dtype))


@dataclass(frozen=True)
class _Keep:
    """Where a recomputed frame's residual goes, and which neighbours get a share of it."""

    values: Tensor  # (B, N, H, D), contiguous
    scale: Tensor  # (B, P, H, T) float32, contiguous
    share: float
    before: bool = False
    after: bool = False
    turn: Tensor | None = None
    """Which frame and neighbours, where memory says it; see ``turn_triton``."""
    frame_stride: int = 0
    """Elements of the output from one frame to the next, for a turn."""

    @property
    def arguments(self) -> tuple[Tensor, Tensor, float, bool, bool, Tensor | None, int]:
        return self.values, self.scale, self.share, self.before, self.after, self.turn, self.frame_stride


def _extra_part(inputs: Inputs) -> _Part | None:
    """The extra part as the kernels read it."""
    if inputs.extra is None:
        return None
    out, lse = (split_frames(x, inputs.frames) for x in inputs.extra)
    return out.contiguous(), lse.permute(0, 3, 1, 2).float().contiguous()


def _merge_extra(call: Call, part: _Part, other: tuple[Tensor, Tensor]) -> None:
    """``merge_exact`` of a part and an extra one, (B, N, H, D) and (B, N, H), into the part."""
    batch, frames, positions, heads, dim = call.sizes
    extra, extra_lse = (split_frames(x, frames) for x in other)
    extra = extra if extra.stride(-1) == 1 else extra.contiguous()
    out, lse = part
    block_m = 32
    kernels.merge_extra_kernel[(cdiv(positions, block_m), frames, batch * heads)](
        out,
        *out.stride()[:4],
        lse,
        extra,
        *extra.stride()[:4],
        extra_lse.permute(0, 3, 1, 2).float().contiguous(),
        frames,
        positions,
        heads,
        dim,
        BLOCK_M=block_m,
        BLOCK_D=call.block_d,
        **FUSION,
    )


@dataclass(frozen=True)
class _Targets:
    """What an attention kernel writes; None for what is not wanted.

    Where keys are split, ``out`` and ``lse`` are the splits' float32 partials, (S, B, P, H, D) and (S, B, H, P).
    """

    rk: Tensor | None = None  # (B, T, P, H, D)
    c_l: Tensor | None = None  # (B, H, T, P)
    out: Tensor | None = None  # (B, T, P, H, D)
    lse: Tensor | None = None  # (B, H, T, P)

    def arguments(self, split: bool) -> tuple[Any, ...]:
        """The tensors with their strides, as the kernels take them."""
        o_strides: tuple[int, ...] = (0, 0, 0, 0)
        l_strides: tuple[int, ...] = (0, 0, 0)
        if self.out is not None:
            o_strides = self.out.stride()[:4]
            if split:
                o_strides = (o_strides[1], o_strides[0], *o_strides[2:])
        if self.lse is not None:
            l_strides = self.lse.stride()[:3]
            if split:
                l_strides = (l_strides[1], l_strides[2], l_strides[0])
        return self.rk, self.c_l, self.out, *o_strides, self.lse, *l_strides


@dataclass(frozen=True)
class _Window:
    """Query frames ``first`` to ``first + count``, and the key frames that each of them sees.

    With ``split_keys`` there is one query frame, and ``splits`` programs take so many of its keys each.
    """

    first: int
    count: int
    band: int
    width: int
    split_keys: int = 0
    splits: int = 1

    @property
    def parts(self) -> int:
        """Programs for each block of rows, head and sample."""
        return self.splits if self.split_keys else self.count

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        return self.first, self.band, self.width, self.split_keys

    def keys(self, positions: int) -> list[int]:
        """How many keys the programs see: one number for most of them, and with splits one for the last."""
        keys = self.width * positions
        return [self.split_keys, keys % self.split_keys] if self.split_keys else [keys]


def r_step(call: Call, q_r: Tensor, rk: Tensor, c_l: Tensor, y: Tensor | None) -> None:
    """R K and c_l of every frame, and R V into ``y`` when it is given."""
    _attend(call, q_r, _Targets(rk, c_l, y), _Window(0, call.sizes[1], band=0, width=1))


def _attend_band(call: Call) -> _Part:
    """Every query frame over its exact key frames."""
    out, lse = call.like_q(), call.statistic()
    first = 0
    if call.options.first_frame:
        _attend_frame(call, 0, out[:, 0], lse[:, :, 0])
        first = 1
    _attend(call, call.q, _Targets(out=out, lse=lse), _Window(first, call.sizes[1] - first, *call.band_arguments))
    return out, lse


def _attend(call: Call, queries: Tensor, targets: _Targets, window: _Window) -> None:
    """Launch an attention kernel: the Hopper one where it can run and has enough to do, else the plain one."""
    batch, frames, positions, heads, dim = call.sizes
    with_k, with_v, split = targets.rk is not None, targets.out is not None, window.split_keys > 0
    config, hopper = call.attend_tile(with_k=with_k, with_v=with_v)
    window_keys = window.keys(positions)
    constants = {
        "BLOCK_D": call.block_d,
        "WITH_K": with_k,
        "WITH_V": with_v,
        "WITH_LSE": targets.lse is not None,
        "SPLIT": split,
        **FUSION,
    }
    if hopper is not None and _fills(call, hopper, window):
        rows = [x for x in map(tile_rows, (queries.flatten(1, 2), call.k, call.v)) if x is not None]
        if len(rows) == 3:
            _attend_hopper(call, hopper, rows, targets, window, constants)
            return
    grid = (cdiv(positions, config.block_m), window.parts, batch * heads)
    kernels.attend_kernel[grid](
        queries,
        *queries.stride()[:4],
        call.k,
        *call.k.stride()[:3],
        call.v,
        *call.v.stride()[:3],
        *targets.arguments(split),
        call.scale,
        frames,
        positions,
        heads,
        dim,
        *window.arguments,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        MASK_D=call.block_d != dim,
        EVEN_KEYS=all(k % config.block_n == 0 for k in window_keys),
        PRECISION=call.precision,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants,
    )


def _tiles(call: Call, window: _Window) -> int:
    """Tiles of query rows that the Hopper kernel computes."""
    batch, _, positions, heads, _ = call.sizes
    return cdiv(positions, HOPPER_ROWS) * window.parts * batch * heads


def _fills(call: Call, config: HopperConfig, window: _Window) -> bool:
    """Whether the Hopper kernel has tiles enough for the chip, and in each of them keys enough for its pipeline."""
    long = all(keys == 0 or keys > config.block_n for keys in window.keys(call.sizes[2]))
    return long and _tiles(call, window) >= MIN_WAVES * call.chip.multiprocessors


def _attend_hopper(
    call: Call,
    config: HopperConfig,
    rows: list[Tensor],
    targets: _Targets,
    window: _Window,
    constants: dict[str, int],
) -> None:
    """Launch ``attend_hopper_kernel`` on as many programs as the chip has multiprocessors."""
    from vmonarch_kernels import _hopper

    _, frames, positions, heads, dim = call.sizes
    blocks = HOPPER_ROWS // 2, config.block_n, config.block_n
    descriptors = [row_descriptor(x, block, dim) for x, block in zip(rows, blocks, strict=True)]
    tail = max(keys % config.block_n or config.block_n for keys in window.keys(positions) if keys)
    tiles = _tiles(call, window)
    _hopper.attend_hopper_kernel[(min(tiles, call.chip.multiprocessors),)](
        *descriptors,
        *targets.arguments(window.split_keys > 0),
        call.scale,
        tiles,
        frames,
        positions,
        window.parts,
        heads,
        *window.arguments,
        BLOCK_N=config.block_n,
        # Narrower than 16 keys the tensor cores do not multiply.
        TAIL=max(16, power_of_2(tail)),
        STAGES=config.stages,
        Q_STAGES=config.query_stages,
        num_warps=4,
        maxnreg=HOPPER_REGISTERS,
        **constants,
    )


def row_descriptor(rows: Tensor, block: int, dim: int) -> Any:
    """How the copy engine brings tiles of so many rows of one head; ``rows`` as ``tile_rows`` gives them."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _layout(block, dim, gl.bfloat16 if rows.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [block, dim], layout)


@cache
def _layout(rows: int, columns: int, dtype: Any) -> Any:
    """Shared-memory layout of a tile that the copy engine brings."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


def tile_rows(x_BNHD: Tensor) -> Tensor | None:
    """The tensor as (B * N, H * D) rows for the copy engine, or None where its layout has none.

    Heads must lie side by side, rows (which do not overlap) and batches on end, base and rows on 16 bytes.
    """
    batch, tokens, heads, dim = x_BNHD.shape
    if x_BNHD.stride(1) < heads * dim:
        return None
    side_by_side = x_BNHD.stride(3) == 1 and (heads == 1 or x_BNHD.stride(2) == dim)
    on_end = batch == 1 or x_BNHD.stride(0) == tokens * x_BNHD.stride(1)
    row_bytes = x_BNHD.stride(1) * x_BNHD.element_size()
    if not (side_by_side and on_end) or row_bytes % 16 or x_BNHD.data_ptr() % 16:
        return None
    return x_BNHD.as_strided((batch * tokens, heads * dim), (x_BNHD.stride(1), 1))


def _attend_frame(
    call: Call,
    frame: int,
    out: Tensor,
    lse: Tensor | None = None,
    *,
    extra: _Part | None = None,
    keep: _Keep | None = None,
) -> None:
    """Exact attention of one frame's queries over all keys, and an extra part, into out (B, P, H, D), lse (B, H, P).

    One frame's queries give too few programs for a large chip, so the keys are split as well. What merges the splits
    also merges the extra part and keeps the residual.
    """
    batch, frames, positions, heads, dim = call.sizes
    tokens = frames * positions
    queries = call.q[:, frame:]
    turn = None if keep is None else keep.turn
    if turn is not None:
        # In memory of q's size: batches lie as far apart as q's, which is what the kernels expect.
        queries = call.like_q()[:, :1]
        torch.index_select(call.q, 1, turn[:1], out=queries)
    config, hopper = call.attend_tile(with_k=False, with_v=True)
    block_m, resident = (HOPPER_ROWS, 1) if hopper is not None else (config.block_m, 2)
    tiles = cdiv(positions, block_m) * heads * batch
    splits = even_splits(tiles, call.chip.multiprocessors * resident, tokens // _MIN_SPLIT_KEYS)
    if splits == 1 and extra is None and keep is None:
        out_lse = call.statistic() if lse is None else lse.unsqueeze(2)  # the plain kernel writes one in any case
        _attend(call, queries, _Targets(out=out.unsqueeze(1), lse=out_lse), _Window(0, 1, band=0, width=frames))
        return
    split_keys = cdiv(cdiv(tokens, splits), 128) * 128
    splits = cdiv(tokens, split_keys)
    # (S, B, P, H, D) seen through strides of (S, B, H, P, D) memory
    part = call.q.new_empty((splits, batch, heads, positions, dim), dtype=torch.float32)
    part_lse = call.q.new_empty((splits, batch, heads, positions), dtype=torch.float32)
    targets = _Targets(out=part.transpose(2, 3), lse=part_lse)
    _attend(call, queries, targets, _Window(0, 1, 0, frames, split_keys=split_keys, splits=splits))
    block_m = 32
    kernels.merge_splits_kernel[(cdiv(positions, block_m), batch * heads)](
        part,
        part_lse,
        *(extra or (None, None)),
        out,
        *out.stride()[:3],
        lse,
        *((0, 0) if lse is None else lse.stride()[:2]),
        *((None, None, 0.0, False, False, None, 0) if keep is None else keep.arguments),
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
        HAS_EXTRA=extra is not None,
        KEEP=keep is not None,
        TURN=turn is not None,
        **FUSION,
    )


@cache
def even_splits(tiles: int, slots: int, largest: int) -> int:
    """The fewest key splits with which ``tiles`` programs, ``slots`` at a time, leave little of the last wave idle."""

    def used(splits: int) -> float:
        return float(tiles * splits / (cdiv(tiles * splits, slots) * slots))

    choices = range(1, max(1, min(largest, _MAX_SPLITS)) + 1)
    return next((s for s in choices if used(s) >= _FULL_WAVES), max(choices, key=used))


def r_queries(
    call: Call,
    *,
    rk: Tensor | None = None,
    c_l: Tensor | None = None,
    exact_lse: Tensor | None = None,
    l_prev: Tensor | None = None,
) -> Tensor:
    """The next R-step's queries, alpha_r / max(c_r, c_floor), of an L-step (rk and c_l given) or of a stored L."""
    batch, frames, positions, heads, dim = call.sizes
    from_l = l_prev is not None
    config = r_queries_config(frames, call.block_d, call.q.dtype, call.chip.shared_memory, from_l=from_l)
    q_r = call.like_q()
    whole_rows = frames <= config.block_k
    row_lse = None
    shared = {
        "BLOCK_L": config.block_l,
        "BLOCK_K": config.block_k,
        "BLOCK_D": call.block_d,
        "MASK_D": call.block_d != dim,
        "HAS_EXACT": exact_lse is not None,
        "BANDED": call.options.band is not None,
        "FIRST_FRAME": call.options.first_frame,
        "PRECISION": call.precision,
        "num_warps": config.num_warps,
        **FUSION,
    }
    if not from_l and not whole_rows:
        row_lse = call.statistic()
        grid = (positions * heads, cdiv(frames, config.block_l), batch)
        kernels.l_lse_kernel[grid](
            call.q,
            *call.row_order,
            rk,
            c_l,
            exact_lse,
            row_lse,
            call.scale,
            frames,
            positions,
            heads,
            dim,
            *call.band_arguments,
            **shared,
        )
    grid = (cdiv(positions, config.strip) * heads, cdiv(frames, config.block_k), batch)
    stored = None if l_prev is None else kernel_l(l_prev, call.chip)
    kernels.r_queries_kernel[grid](
        call.q,
        *call.row_order,
        rk,
        c_l,
        exact_lse,
        row_lse,
        stored,
        0 if stored is None else stored.stride(3) // L_ROW_ENTRIES,
        q_r,
        call.scale,
        # A stored L is L_SCALE times as large, and so is its sum: with the floor as well, the quotient is the same.
        call.options.c_floor * (L_SCALE if from_l else 1.0),
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
    return q_r


def _l_output(
    call: Call,
    r_step: tuple[Tensor, Tensor, Tensor],
    exact: _Part | None,
    residual: tuple[Tensor, Tensor] | None,
    return_l: bool,
) -> tuple[Tensor, Tensor | None]:
    """The last L-step: out (B, T, P, H, D) and L from the last R-step's R K, c_l and R V."""
    batch, frames, positions, heads, dim = call.sizes
    config = l_output_config(frames, call.block_d, call.q.dtype, call.chip.shared_memory, exact=exact is not None)
    out = call.like_q()
    l_new = empty_l(call.q) if return_l else None
    first_row = 1 if call.options.first_frame and call.options.band is None else 0
    grid = (cdiv(positions, config.strip) * heads, cdiv(frames, config.block_l), batch)
    kernels.l_output_kernel[grid](
        call.q,
        *call.row_order,
        *r_step,
        *(exact or (None, None)),
        out,
        None if l_new is None else kernel_l(l_new, call.chip),
        0 if l_new is None else l_new.stride(3) // L_ROW_ENTRIES,
        *((None, None) if residual is None else kernel_residual(residual)),
        call.scale,
        frames,
        positions,
        heads,
        dim,
        *call.band_arguments,
        first_row,
        BLOCK_L=config.block_l,
        BLOCK_K=config.block_k,
        BLOCK_D=call.block_d,
        PARTS=config.parts,
        STRIP=config.strip,
        STAGES=config.num_stages,
        MASK_D=call.block_d != dim,
        HAS_EXACT=exact is not None,
        BANDED=call.options.band is not None,
        FIRST_FRAME=call.options.first_frame,
        STORE_L=l_new is not None,
        HAS_RESIDUAL=residual is not None,
        ONE_TILE=frames <= config.block_k,
        PRECISION=call.precision,
        num_warps=config.num_warps,
        **FUSION,
    )
    return out, l_new


def kernel_l(l_BPHTT: Tensor, chip: Chip) -> Tensor:
    """L as the kernels read and write it: the same memory where it lies as ``empty_l`` has it."""
    return with_padded_rows(l_BPHTT).view(chip.dtype_8bit)


def kernel_residual(residual: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Values and scale as the kernels read and write them: the same memory where both are contiguous."""
    values, scale = residual
    return values.contiguous().view(chip(values.device).dtype_8bit), scale.contiguous().float()
