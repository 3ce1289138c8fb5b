"""The backward pass of impl="triton": allocation and launches; the kernels are in `_triton_backward.py`."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_kernels import _triton as forward_kernels
from vmonarch_kernels import _triton_backward as kernels
from vmonarch_kernels.configs import HOPPER_ROWS, AttendConfig
from vmonarch_kernels.configs_backward import (
    HOPPER_QUERY_ROWS,
    HopperGradConfig,
    Parts,
    grad_hopper_configs,
    grad_keys_config,
    grad_queries_config,
    l_backward_config,
    product_precision,
    tile_memory,
)
from vmonarch_kernels.cost import L_ROW_ENTRIES, is_exact
from vmonarch_kernels.launch import (
    FUSION,
    HOPPER_REGISTERS,
    MIN_WAVES,
    Call,
    cdiv,
    even_splits,
    kernel_l,
    kernel_residual,
    on_their_device,
    r_queries,
    r_step,
    row_descriptor,
    tile_rows,
)
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import L_SCALE, Forward, Gradients, split_frames

_LOG2E = 1.4426950408889634
_MIN_SPLIT_KEYS = 1024
_ROWS = 32  # of the kernels that take rows one by one
_R_STEP, _LAST_R_STEP, _EXACT = Parts(k=True, v=False), Parts(k=True, v=True), Parts(k=False, v=True)


@dataclass(frozen=True)
class _RStep:
    """An R-step of the forward, computed again: (B, T, P, H, D), c_l (B, H, T, P)."""

    q_r: Tensor | None
    """None where they are computed once more when they are needed."""
    rk: Tensor
    c_l: Tensor
    y: Tensor | None


@dataclass(frozen=True)
class _Queries:
    """What the queries of an attention give its backward: (B, T, P, H, D), statistics (B, H, T, P)."""

    q: Tensor
    gk: Tensor | None
    """Gradient of R K, contiguous; None for exact rows."""
    gv: Tensor | None
    """Gradient of R V, or of the output for exact rows; contiguous."""
    lse: Tensor
    """In base 2."""
    delta: Tensor
    w: Tensor | None = None
    share: Tensor | None = None

    @property
    def parts(self) -> Parts:
        return Parts(k=self.gk is not None, v=self.gv is not None)


@dataclass(frozen=True)
class _Window:
    """Which keys each query frame sees: ``width`` frames around its own, or all (``whole``: that one frame alone)."""

    band: int
    width: int
    banded: bool = True
    whole: int | None = None


class _Backward:
    """The backward pass of one call: what all its launches share, and the sums of gradients."""

    def __init__(self, inputs: Inputs, options: Options, grad: Tensor) -> None:
        self.inputs, self.options = inputs, options
        self.call = Call.of(inputs, options)
        self.grad = split_frames(grad.contiguous(), inputs.frames)
        self.dq, self.dk, self.dv = (self.call.like_q() for _ in range(3))
        self._written: set[str] = set()

    def adds(self, name: str) -> bool:
        """Whether a gradient has been written before, so that the next launch adds to it."""
        before = name in self._written
        self._written.add(name)
        return before

    def result(self) -> Gradients:
        return Gradients(*(x.flatten(1, 2) for x in (self.dq, self.dk, self.dv)))

    def zeroed_statistic(self) -> Tensor:
        return self.call.statistic().zero_()

    def grad_queries(self, rows: _Queries, window: _Window, target: Tensor, add: bool, product: Tensor | None) -> None:
        """Gradient of the queries of every frame, or of those behind the first that sees all."""
        first = 0 if window.whole is None else window.whole + 1
        count = self.call.sizes[1] - first
        config = self._queries_config(rows.parts)
        self._launch_queries(config, rows, (first, count, window.band, window.width, 0), (target, add, product))

    def grad_frame_queries(self, rows: _Queries, frame: int) -> None:
        """Gradient of one frame's queries, which see all keys: its keys are split as well, to fill the chip."""
        batch, frames, positions, heads, dim = self.call.sizes
        tokens = frames * positions
        config = self._queries_config(rows.parts)
        tiles = cdiv(positions, config.block_m) * heads * batch
        splits = even_splits(tiles, self.call.chip.multiprocessors, max(1, tokens // _MIN_SPLIT_KEYS))
        split_keys = cdiv(cdiv(tokens, splits), 128) * 128
        splits = cdiv(tokens, split_keys)
        part = self.call.q.new_empty((splits, batch, positions, heads, dim), dtype=torch.float32)
        window = (frame, splits, 0, frames, split_keys)
        self._launch_queries(config, rows, window, (part, False, None))
        total = part.sum(0) if splits > 1 else part[0]
        if self.adds("dq"):
            total += self.dq[:, frame]
        else:
            self.dq.zero_()
        self.dq[:, frame] = total

    def _queries_config(self, parts: Parts) -> AttendConfig:
        return grad_queries_config(self.call.block_d, self.call.q.dtype, tile_memory(self.call.chip), parts)

    def _launch_queries(
        self,
        config: AttendConfig,
        rows: _Queries,
        window: tuple[int, int, int, int, int],
        target: tuple[Tensor, bool, Tensor | None],
    ) -> None:
        call = self.call
        batch, frames, positions, heads, dim = call.sizes
        first, parts, band, width, split_keys = window
        out, add, product = target
        if self._launch_queries_hopper(rows, window, target):
            return
        keys = split_keys or width * positions
        last = width * positions % split_keys if split_keys else 0
        kernels.grad_queries_kernel[(cdiv(positions, config.block_m), parts, batch * heads)](
            *self._tensors(rows),
            rows.lse,
            rows.delta,
            rows.share,
            out,
            product,
            call.scale,
            frames,
            positions,
            heads,
            dim,
            batch,
            first,
            band,
            width,
            split_keys,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            EVEN_KEYS=keys % config.block_n == 0 and last % config.block_n == 0,
            SPLIT=split_keys > 0,
            ADD=add,
            WITH_PRODUCT=product is not None,
            **self._constants(config, rows),
        )

    def _launch_queries_hopper(
        self,
        rows: _Queries,
        window: tuple[int, int, int, int, int],
        target: tuple[Tensor, bool, Tensor | None],
    ) -> bool:
        """``_launch_queries`` by the Hopper kernel; whether it can run and has enough to do."""
        call = self.call
        batch, frames, positions, heads, dim = call.sizes
        first, parts, band, width, split_keys = window
        out, add, product = target
        tiles = cdiv(positions, HOPPER_ROWS) * parts * batch * heads
        found = self._hopper(rows, tiles)
        if found is None:
            return False
        (config, _), descriptors = found
        from vmonarch_kernels import _hopper_backward

        _hopper_backward.grad_queries_hopper_kernel[(min(tiles, call.chip.multiprocessors),)](
            *descriptors,
            rows.lse,
            rows.delta,
            out,
            product,
            call.scale,
            tiles,
            batch,
            frames,
            positions,
            parts,
            heads,
            first,
            band,
            width,
            split_keys,
            BLOCK_D=dim,
            WITH_K=rows.parts.k,
            WITH_V=rows.parts.v,
            SPLIT=split_keys > 0,
            ADD=add,
            WITH_PRODUCT=product is not None,
            STAGES=config.stages,
            HELD=config.held,
            num_warps=4,
            maxnreg=HOPPER_REGISTERS,
            **FUSION,
        )
        return True

    def grad_keys(self, rows: _Queries, window: _Window) -> None:
        """Gradients of all keys, and values, from the queries that see them."""
        call, parts = self.call, rows.parts
        batch, frames, positions, heads, dim = call.sizes
        if self._grad_keys_hopper(rows, window):
            return
        config = grad_keys_config(call.block_d, call.q.dtype, tile_memory(call.chip), parts)
        kernels.grad_keys_kernel[(cdiv(positions, config.block_n), frames, batch * heads)](
            *self._tensors(rows),
            rows.lse,
            rows.delta,
            rows.w,
            rows.share,
            self.dk,
            self.dv,
            call.scale,
            frames,
            positions,
            heads,
            dim,
            window.band,
            window.width,
            -1 if window.whole is None else window.whole,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BANDED=window.banded,
            WHOLE=window.whole is not None,
            ADD_K=self.adds("dk"),
            ADD_V=parts.v and self.adds("dv"),
            **self._constants(config, rows),
        )

    def _grad_keys_hopper(self, rows: _Queries, window: _Window) -> bool:
        """``grad_keys`` by the Hopper kernel; whether it can run and has enough to do."""
        call, parts = self.call, rows.parts
        batch, frames, positions, heads, dim = call.sizes
        tiles = cdiv(positions, HOPPER_ROWS) * frames * batch * heads
        hopper = self._hopper(rows, tiles)
        if hopper is None:
            return False
        (_, config), descriptors = hopper
        lse, shift = self._tile_statistics(rows)
        from vmonarch_kernels import _hopper_backward

        _hopper_backward.grad_keys_hopper_kernel[(min(tiles, call.chip.multiprocessors),)](
            *descriptors,
            lse,
            shift,
            self.dk,
            self.dv if parts.v else None,
            call.scale,
            tiles,
            frames,
            positions,
            heads,
            window.band,
            window.width,
            -1 if window.whole is None else window.whole,
            BLOCK_D=dim,
            WITH_K=parts.k,
            WITH_V=parts.v,
            BANDED=window.banded,
            WHOLE=window.whole is not None,
            ADD_K=self.adds("dk"),
            ADD_V=parts.v and self.adds("dv"),
            STAGES=config.stages,
            HELD=config.held,
            num_warps=4,
            maxnreg=HOPPER_REGISTERS,
            **FUSION,
        )
        return True

    def _hopper(self, rows: _Queries, tiles: int) -> tuple[tuple[HopperGradConfig, HopperGradConfig], list[Any]] | None:
        """The Hopper kernels' tiles, and queries, keys, values and gradients as they take them; None where they cannot
        run or have too little to do.
        """
        call = self.call
        configs = grad_hopper_configs(call.sizes[4], call.q.dtype, call.chip.capability, rows.parts)
        if configs is None or rows.share is not None or tiles < MIN_WAVES * call.chip.multiprocessors:
            return None
        gradients = (None if x is None else x.flatten(1, 2) for x in (rows.gk, rows.gv))
        tensors = (rows.q.flatten(1, 2), call.k, call.v if rows.parts.v else None, *gradients)
        found = [None if x is None else tile_rows(x) for x in tensors]
        if any((x is None) != (y is None) for x, y in zip(tensors, found, strict=True)):
            return None
        return configs, [None if x is None else row_descriptor(x, HOPPER_ROWS // 2, call.sizes[4]) for x in found]

    def _tile_statistics(self, rows: _Queries) -> tuple[Tensor, Tensor]:
        """Log-sum-exps and s (w - delta), frames padded to whole tiles, in which rows past them get no weight."""
        shift = -rows.delta if rows.w is None else rows.w - rows.delta
        past = (0, -self.call.sizes[2] % HOPPER_QUERY_ROWS)
        return F.pad(rows.lse, past, value=torch.inf), F.pad(shift.mul_(self.call.scale), past)

    def _tensors(self, rows: _Queries) -> tuple[Any, ...]:
        """Queries, keys and values with their strides, and the gradients that come in."""
        call, q = self.call, rows.q
        strides = q.stride(0), q.stride(2), q.stride(3)
        return (q, *strides, call.k, *call.k.stride()[:3], call.v, *call.v.stride()[:3], rows.gk, rows.gv)

    def _constants(self, config: AttendConfig, rows: _Queries) -> dict[str, Any]:
        call, precision = self.call, self.call.precision
        if call.q.dtype == torch.float32:
            precision = product_precision(call.chip, call.block_d, rows.parts)
        return {
            "BLOCK_D": call.block_d,
            "MASK_D": call.block_d != call.sizes[4],
            "WITH_K": rows.parts.k,
            "WITH_V": rows.parts.v,
            "SHARED": rows.share is not None,
            "PRECISION": precision,
            "STAGES": config.num_stages,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **FUSION,
        }


def _row_delta(out: Tensor, grad: Tensor, delta: Tensor, residual: tuple[Tensor, Tensor] | None = None) -> None:
    """Products of the output's rows (B, T', P, H, D), without the residual, with their gradients, into (B, H, T', P).

    Rows and gradients lie alike; a residual needs all frames.
    """
    batch, frames, positions, heads, dim = out.shape
    rows = frames * positions
    values, scales = (None, None) if residual is None else kernel_residual(residual)
    kernels.row_delta_kernel[(cdiv(rows, _ROWS), batch * heads)](
        out,
        grad,
        out.stride(0),
        out.stride(2),
        out.stride(3),
        values,
        scales,
        delta,
        delta.stride(0),
        delta.stride(1),
        rows,
        positions,
        heads,
        dim,
        BLOCK_M=_ROWS,
        BLOCK_D=max(16, 1 << (dim - 1).bit_length()),
        HAS_RESIDUAL=residual is not None,
        **FUSION,
    )


class _Structured(_Backward):
    """Back through the L- and R-steps of one call."""

    def __init__(self, inputs: Inputs, options: Options, kept: Forward, grad: Tensor) -> None:
        super().__init__(inputs, options, grad)
        self.exact_lse: Tensor | None = None
        if options.band is not None:
            self.exact_lse = kept.lse
        elif inputs.extra is not None:
            self.exact_lse = split_frames(inputs.extra[1], inputs.frames).permute(0, 3, 1, 2).float().contiguous()
        self.first_alone = options.first_frame and options.band is None
        # Of the rows of the whole softmax: base-2 log-sum-exps, and products of outputs and gradients.
        self.row_lse, self.row_delta = self.call.statistic(), self.call.statistic()
        out = split_frames(kept.out, inputs.frames)
        if self.exact_lse is not None:
            _row_delta(out, self.grad, self.row_delta, inputs.residual)
        elif self.first_alone:
            _row_delta(out[:, :1], self.grad[:, :1], self.row_delta[:, :, :1])
        several = options.num_steps > 1
        self.early = self.zeroed_statistic() if several and self.exact_lse is not None else None

    def run(self) -> None:
        """Sum dq, dk and dv of what is structured, and make the rows' statistics.

        No more than six tensors are held beside the sums: here the first iteration's R K, from which the others are
        computed again when their turn comes, of one iteration the queries, R K and R V, and two gradients.
        """
        call, steps = self.call, self.options.num_steps
        first = self._first_step(with_y=steps == 1)
        gk, gv = call.like_q(), call.like_q()
        after = self._iteration(steps - 1, self._recomputed(first, steps - 1), gk, gv, (None, None))
        del gv
        for i in reversed(range(steps - 1)):
            after = self._iteration(i, self._recomputed(first, i), gk, None, after)
        if self.inputs.l_prev is not None and after[0] is not None:
            self._warm(self.inputs.l_prev, after[0])

    def _iteration(
        self, i: int, step: _RStep, gk: Tensor, gv: Tensor | None, after: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Back through an iteration: the gradient of its queries, and its products with them where they are needed."""
        rows = self._l_step(step, gk, gv, after)
        cold = i == 0 and self.inputs.l_prev is None
        # R K is not needed any more, and the first queries of a cold start are q.
        dq_r, product = (self.dq, None) if cold else (step.rk, self.call.statistic() if i > 0 else None)
        own = _Window(band=0, width=1)
        self.grad_queries(rows, own, dq_r, cold, product)
        self.grad_keys(rows, own)
        return dq_r, product

    def _first_queries(self) -> Tensor:
        l_prev = self.inputs.l_prev
        return self.call.q if l_prev is None else r_queries(self.call, l_prev=l_prev)

    def _first_step(self, with_y: bool) -> _RStep:
        """The forward's first R-step; that of a warm start without its queries, unless it is the last as well."""
        call, q_r = self.call, self._first_queries()
        step = _RStep(q_r, call.like_q(), call.statistic(), call.like_q() if with_y else None)
        r_step(call, q_r, step.rk, step.c_l, step.y)
        return step if with_y or self.inputs.l_prev is None else replace(step, q_r=None)

    def _recomputed(self, first: _RStep, i: int) -> _RStep:
        """The forward's R-step of iteration ``i``, from the first one."""
        call = self.call
        if i == 0:
            return first if first.q_r is not None else replace(first, q_r=self._first_queries())
        rk, c_l = first.rk, first.c_l
        q_r = y = None
        for step in range(1, i + 1):
            del q_r  # before its successor is allocated
            q_r = r_queries(call, rk=rk, c_l=c_l, exact_lse=self.exact_lse)
            if step == 1:
                rk, c_l = call.like_q(), call.statistic()
            y = call.like_q() if step == self.options.num_steps - 1 else None
            r_step(call, q_r, rk, c_l, y)
        return _RStep(q_r, rk, c_l, y)

    def _l_step(
        self, step: _RStep, gk: Tensor, gv: Tensor | None, after: tuple[Tensor | None, Tensor | None]
    ) -> _Queries:
        """Back through an L-step, from the output's gradient (with ``gv``) or that of the next R-step's queries."""
        call = self.call
        batch, frames, positions, heads, dim = call.sizes
        config = l_backward_config(frames, call.block_d, call.q.dtype, call.chip.shared_memory)
        assert step.q_r is not None  # noqa: S101  # of a step that `_recomputed` gave
        lse, delta, w = (call.statistic() for _ in range(3))
        queries = (call.q, *_token_strides(call.q))
        step_queries = (step.q_r, *_token_strides(step.q_r))
        r_gradients = gk, gv, lse, delta, w
        last = gv is not None
        first_row = int(last and self.first_alone)
        flags = {
            "BLOCK_D": call.block_d,
            "MASK_D": call.block_d != dim,
            "BANDED": self.options.band is not None,
            "FIRST_FRAME": self.options.first_frame,
            "PRECISION": call.precision,
            "num_warps": config.num_warps,
            **FUSION,
        }
        exact = {"HAS_EXACT": self.exact_lse is not None}
        sizes = (frames, positions, heads, dim, *call.band_arguments)
        row_delta = self.row_delta if last else None
        row_lse = self.row_lse if last else None
        add = self.adds("dq")
        if frames <= config.block_l:
            kernels.l_backward_kernel[(cdiv(positions, config.strip) * heads, batch)](
                *queries,
                *step_queries,
                step.rk,
                step.c_l,
                self.exact_lse,
                step.y,
                self.grad,
                row_delta,
                *after,
                self.dq,
                *r_gradients,
                row_lse,
                self.early,
                call.scale,
                self.options.c_floor,
                *sizes,
                first_row,
                BLOCK_T=config.block_l,
                STRIP=config.strip,
                STAGES=config.num_stages,
                LAST=last,
                ADD=add,
                **exact,
                **flags,
            )
            return _Queries(step.q_r, gk, gv, lse, delta, w)
        row_lse = call.statistic() if row_lse is None else row_lse
        row_delta = call.statistic() if row_delta is None else row_delta
        blocks = {"BLOCK_L": config.block_l, "BLOCK_K": config.block_k}
        grid = (positions * heads, cdiv(frames, config.block_l), batch)
        l_step = (step.rk, step.c_l)
        forward_kernels.l_lse_kernel[grid](
            call.q, *call.row_order, *l_step, self.exact_lse, row_lse, call.scale, *sizes, **blocks, **exact, **flags
        )
        inverse = dc = None
        if not last:
            inverse, dc = call.statistic(), call.statistic()
            kernels.l_sums_kernel[grid](
                *queries,
                *l_step,
                row_lse,
                after[1],
                inverse,
                dc,
                call.scale,
                self.options.c_floor,
                *sizes,
                **blocks,
                **flags,
            )
        value = step.y if last else after[0]
        kernels.l_rows_kernel[grid](
            *queries,
            *l_step,
            self.exact_lse,
            row_lse,
            value,
            self.grad,
            inverse,
            dc,
            row_delta,
            self.dq,
            self.early,
            call.scale,
            *sizes,
            first_row,
            LAST=last,
            ADD=add,
            **blocks,
            **exact,
            **flags,
        )
        kernels.l_columns_kernel[grid](
            *queries,
            *step_queries,
            *l_step,
            row_lse,
            value,
            self.grad,
            inverse,
            dc,
            row_delta,
            *r_gradients,
            call.scale,
            *sizes,
            first_row,
            LAST=last,
            **blocks,
            **flags,
        )
        return _Queries(step.q_r, gk, gv, lse, delta, w)

    def _warm(self, l_prev: Tensor, dq_r: Tensor) -> None:
        """Back through a warm start."""
        call = self.call
        batch, frames, positions, heads, dim = call.sizes
        stored = kernel_l(l_prev, call.chip)
        config = l_backward_config(frames, call.block_d, call.q.dtype, call.chip.shared_memory)
        kernels.warm_backward_kernel[(positions * heads, cdiv(frames, config.block_l), batch)](
            stored,
            stored.stride(3) // L_ROW_ENTRIES,
            dq_r,
            self.dq,
            self.options.c_floor * L_SCALE,  # a stored L is so many times as large, and so is its sum
            frames,
            positions,
            heads,
            dim,
            BLOCK_L=config.block_l,
            BLOCK_K=config.block_k,
            BLOCK_D=call.block_d,
            MASK_D=call.block_d != dim,
            PRECISION=call.precision,
            num_warps=config.num_warps,
            **FUSION,
        )

    def exact(self, kept_lse: Tensor | None) -> None:
        """Sum the gradients of the band and of the first frame."""
        if kept_lse is None:
            return
        band, first_frame = self.options.band, self.options.first_frame
        if self.first_alone:
            self.row_lse[:, :, 0] = kept_lse[:, :, 0] * _LOG2E
        rows = _Queries(self.call.q, None, self.grad, self.row_lse, self.row_delta)
        if band is None:
            self.grad_frame_queries(rows, 0)
            self.grad_keys(rows, _Window(0, 1, banded=False, whole=0))
            return
        if self.early is not None:
            # Earlier steps' gradients go to the exact part's own softmax, of which the last step has a share.
            lse = kept_lse * _LOG2E
            share = (lse - self.row_lse).exp2_()
            rows = _Queries(self.call.q, None, self.grad, lse, share * self.row_delta - self.early, share=share)
        window = _Window(*self.call.band_arguments, whole=0 if first_frame else None)
        if first_frame:
            self.grad_frame_queries(rows, 0)
        self.grad_queries(rows, window, self.dq, True, None)
        self.grad_keys(rows, window)


def _token_strides(x_BTPHD: Tensor) -> tuple[int, int, int]:
    """Strides of samples, tokens and heads."""
    return x_BTPHD.stride(0), x_BTPHD.stride(2), x_BTPHD.stride(3)


@on_their_device
def monarch_backward_triton(inputs: Inputs, options: Options, kept: Forward, grad: Tensor) -> Gradients:
    """Gradients of the output (B, N, H, D) of ``structured_triton``, or of dense attention where all is exact.

    ``kept`` is what the forward returned.
    """
    if is_exact(inputs.frames, options.band):
        return _dense_backward(inputs, options, kept, grad)
    run = _Structured(inputs, options, kept, grad)
    run.run()
    run.exact(kept.lse)
    grads = run.result()
    if inputs.extra is None:
        return grads
    early = run.early if run.early is not None else run.zeroed_statistic()
    if options.band is not None and run.early is not None and kept.lse is not None:
        lse = split_frames(inputs.extra[1], inputs.frames).permute(0, 3, 1, 2)
        early = early * (lse - kept.lse).exp()
    return _with_extra(grads, inputs.extra, run, (run.row_lse, run.row_delta, early))


def _dense_backward(inputs: Inputs, options: Options, kept: Forward, grad: Tensor) -> Gradients:
    run = _Backward(inputs, options, grad)
    assert kept.lse is not None  # noqa: S101  # of exact rows
    lse, delta = kept.lse * _LOG2E, run.call.statistic()
    _row_delta(split_frames(kept.out, inputs.frames), run.grad, delta)
    rows = _Queries(run.call.q, None, run.grad, lse, delta)
    window = _Window(band=inputs.frames, width=inputs.frames)
    run.grad_queries(rows, window, run.dq, False, None)
    run.grad_keys(rows, window)
    if inputs.extra is None:
        return run.result()
    return _with_extra(run.result(), inputs.extra, run, (lse, delta, run.zeroed_statistic()))


def _with_extra(
    grads: Gradients, extra: tuple[Tensor, Tensor], run: _Backward, rows: tuple[Tensor, Tensor, Tensor]
) -> Gradients:
    """The gradients with those of the extra part; ``rows``: base-2 log-sum-exps, deltas and earlier steps' part."""
    d_out, d_lse = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in extra)
    _extra_backward(run, extra, rows, (d_out, d_lse), slice(0, run.call.sizes[1]))
    return grads._replace(extra_out=d_out, extra_lse=d_lse)


def _extra_backward(
    run: _Backward,
    extra: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    frames: slice,
) -> None:
    """``extra_backward_kernel`` on the rows of some frames."""
    out, lse = extra
    out = out if out.stride(-1) == 1 else out.contiguous()
    batch, all_frames, positions, heads, dim = run.call.sizes
    first, stop = frames.start * positions, frames.stop * positions
    kernels.extra_backward_kernel[(cdiv(stop - first, _ROWS), batch * heads)](
        out,
        *out.stride()[:3],
        lse,
        *lse.stride(),
        run.grad,
        *rows,
        *targets,
        all_frames * positions,
        first,
        stop,
        heads,
        dim,
        BLOCK_M=_ROWS,
        BLOCK_D=run.call.block_d,
        **FUSION,
    )


@on_their_device
def frame_backward_triton(inputs: Inputs, frame: int, scale: float, kept: Forward, grad: Tensor) -> Gradients:
    """Gradients of ``frame_attention``; ``kept`` and ``grad`` are of the frame: (B, P, H, D), lse (B, H, 1, P)."""
    q = inputs.q
    # The kernels number all tokens: the frame's rows lie at their place, the others are never read.
    full = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # The Hopper kernel reads whole tiles: rows behind the frame, which may be the next sample's, get no weight there,
    # but must be finite.
    samples, tokens = full.shape[:2]
    for behind in range((frame + 1) * grad.shape[1], samples * tokens, tokens):
        full.flatten(0, 1)[behind : behind + HOPPER_QUERY_ROWS] = 0
    split_frames(full, inputs.frames)[:, frame] = grad
    run = _Backward(inputs, Options(first_frame=False, scale=scale), full)
    assert kept.lse is not None  # noqa: S101  # of exact rows
    lse, delta = run.call.statistic(), run.call.statistic()
    lse[:, :, frame] = kept.lse[:, :, 0] * _LOG2E
    only = slice(frame, frame + 1)
    # The kept output is one frame: it lies as its gradient does once that is contiguous, too.
    rows_grad = grad.contiguous().unsqueeze(1)
    _row_delta(kept.out.unsqueeze(1), rows_grad, delta[:, :, only])
    rows = _Queries(run.call.q, None, run.grad, lse, delta)
    run.grad_frame_queries(rows, frame)
    run.grad_keys(rows, _Window(0, 1, banded=False, whole=frame))
    grads = run.result()
    if inputs.extra is None:
        return grads
    d_extra = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs.extra)
    _extra_backward(run, inputs.extra, (lse, delta, run.zeroed_statistic()), (d_extra[0], d_extra[1]), only)
    return grads._replace(extra_out=d_extra[0], extra_lse=d_extra[1])
