"""The backward pass of impl="torch", in batched products on any device (../README.md, the backward pass).

The forward's R-steps are computed again, R and L a few rows at a time. Sums are float32 or wider.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vmonarch_kernels.cost import is_exact, window_frames
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import (
    L_SCALE,
    Forward,
    Gradients,
    dequantised,
    exact_pairs,
    split_frames,
    window_start,
)
from vmonarch_kernels.torch_impl import (
    LStep,
    by_position,
    l_entries,
    next_beta,
    position_chunks,
    position_rows,
    r_step,
    warm_beta,
)

_CHUNK_ELEMENTS = 1 << 20  # scores held at once


@dataclass(frozen=True)
class _ExactRows:
    """Exactly attending queries (B, M, H, D) with their statistics (B, M, H).

    Their weights over the keys are ``share * exp(score - lse)``.
    """

    q: Tensor
    grad: Tensor
    dq: Tensor
    """Summed here."""
    lse: Tensor
    delta: Tensor
    """What is subtracted from ``share`` times (gradient of the output . value)."""
    share: Tensor | None = None
    """Weight of these keys in the softmax that ``grad`` belongs to; None is one."""

    def frames(self, first: int, stop: int, positions: int) -> "_ExactRows":
        """Those of some frames."""
        at = slice(first * positions, stop * positions)
        share = None if self.share is None else self.share[:, at]
        return _ExactRows(self.q[:, at], self.grad[:, at], self.dq[:, at], self.lse[:, at], self.delta[:, at], share)


@dataclass(frozen=True)
class _Keys:
    """Keys and values (B, S, H, D), and the sums of their gradients."""

    k: Tensor
    v: Tensor
    dk: Tensor
    dv: Tensor

    def tokens(self, first: int, stop: int) -> "_Keys":
        """Some of them."""
        return _Keys(*(x[:, first:stop] for x in (self.k, self.v, self.dk, self.dv)))

    def heads_first(self, b: int) -> Iterator[Tensor]:
        """Those of a sample as (H, S, D)."""
        wide = self.dk.dtype
        yield from (self.k[b].transpose(0, 1).to(wide), self.v[b].transpose(0, 1).to(wide))
        yield from (self.dk[b].transpose(0, 1), self.dv[b].transpose(0, 1))


@dataclass(frozen=True)
class _RStep:
    """An R-step of the forward, computed again: (B, T, P, H, D), and statistics (B, T, P, H)."""

    beta: Tensor
    rk: Tensor
    y: Tensor | None
    lse: Tensor

    @property
    def c_l(self) -> Tensor:
        """sum R log R."""
        return (self.beta * self.rk).sum(-1, dtype=self.lse.dtype) - self.lse


@dataclass(frozen=True)
class _RGradients:
    """What an L-step's backward gives an R-step."""

    g: Tensor
    """Of R K, (B, T, P, H, D) float32 or wider: the gradient within R."""
    dy: Tensor | None
    """Of R V."""
    w: Tensor
    """Of -c_l, (B, T, P, H): g + w beta is the whole gradient of R K."""


def _row_blocks(rows: int, heads: int, keys: int) -> Iterator[slice]:
    step = max(16, _CHUNK_ELEMENTS // (heads * keys))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _exact_backward(rows: _ExactRows, keys: _Keys, scale: float) -> None:
    """Sum the gradients of exact attention."""
    batch, count, heads, _ = rows.q.shape
    wide = keys.dk.dtype
    for b in range(batch):
        k, v, dk, dv = keys.heads_first(b)
        for part in _row_blocks(count, heads, k.shape[1]):
            q, grad = (x[b, part].transpose(0, 1).to(wide) for x in (rows.q, rows.grad))
            lse, delta = (x[b, part].T[..., None] for x in (rows.lse, rows.delta))
            if rows.share is not None:
                grad = grad * rows.share[b, part].T[..., None]
            weights = torch.bmm(q, k.mT).mul_(scale).sub_(lse).exp_()
            dv += torch.bmm(weights.mT, grad)
            d_scores = torch.bmm(grad, v.mT).sub_(delta).mul_(weights).mul_(scale)
            rows.dq[b, part] += torch.bmm(d_scores, k).transpose(0, 1)
            dk += torch.bmm(d_scores.mT, q)


def _r_backward(step: _RStep, to: _RGradients, keys: _Keys) -> Tensor:
    """Sum dK and dV of an R-step; returns the gradient of its beta."""
    batch, frames, positions, heads, _ = step.beta.shape
    dbeta = torch.empty_like(to.g)
    delta = (to.g * step.rk).sum(-1)
    if to.dy is not None and step.y is not None:
        delta += (to.dy * step.y).sum(-1)
    for b in range(batch):
        for frame in range(frames):
            k, v, dk, dv = keys.tokens(frame * positions, (frame + 1) * positions).heads_first(b)
            for part in _row_blocks(positions, heads, positions):
                beta, g = (x[b, frame, part].transpose(0, 1).to(k.dtype) for x in (step.beta, to.g))
                lse, delta_j, w = (x[b, frame, part].T[..., None] for x in (step.lse, delta, to.w))
                R = torch.bmm(beta, k.mT).sub_(lse).exp_()
                d_scores = torch.bmm(g, k.mT)
                if to.dy is not None:
                    dy = to.dy[b, frame, part].transpose(0, 1)
                    d_scores.baddbmm_(dy, v.mT)
                    dv += torch.bmm(R.mT, dy)
                d_scores.sub_(delta_j).mul_(R)
                dbeta[b, frame, part] = torch.bmm(d_scores, k).transpose(0, 1)
                # dK = dS^T beta + R^T (g + w beta)
                dk += torch.bmm(R.mT, g)
                dk += torch.bmm(d_scores.addcmul_(R, w).mT, beta)
    return dbeta


class _Backward:
    """One call's backward pass; frames apart, (B, T, P, H, D), unless a name says tokens."""

    def __init__(self, inputs: Inputs, options: Options, kept: Forward, grad: Tensor) -> None:
        frames = inputs.frames
        self.options, self.scale = options, options.score_scale(inputs.head_dim)
        self.wide = torch.promote_types(inputs.q.dtype, torch.float32)
        self.inputs, self.kept_lse = inputs, kept.lse
        self.q, self.k, self.v, self.grad = (split_frames(x, frames) for x in (inputs.q, inputs.k, inputs.v, grad))
        out = split_frames(kept.out, frames).to(self.wide)
        if inputs.residual is not None:  # a constant, and none of the softmax's
            out = out - dequantised(*inputs.residual, frames)
        self.delta = (self.grad.to(self.wide) * out).sum(-1)
        self.dq = torch.zeros(self.q.shape, dtype=self.wide, device=self.q.device)
        tokens = torch.zeros_like(inputs.q, dtype=self.wide, memory_format=torch.contiguous_format)
        self.keys = _Keys(inputs.k, inputs.v, tokens, tokens.clone())
        self.extra = None if inputs.extra is None else [split_frames(x, frames) for x in inputs.extra]
        self.first_alone = options.first_frame and options.band is None
        exact = pairs = None
        if options.band is not None and kept.lse is not None:
            exact = kept.out, kept.lse.permute(0, 2, 3, 1)  # of these two the L logits take the second alone
            pairs = exact_pairs(frames, options.band, options.first_frame, self.q.device)
        elif self.extra is not None:
            exact = self.extra[0], self.extra[1]
        self.l_step = LStep(self.q, exact, pairs, self.scale, options.c_floor)
        # Of every query's exact part: its weight in the last L-step, its log-sum-exp's gradient in earlier ones.
        self.share, self.d_lse_early = torch.zeros_like(self.delta), torch.zeros_like(self.delta)

    def structured(self) -> None:
        """Back through L- and R-steps, to the gradients of q, k and v but for what is exact."""
        steps = self._recomputed()
        to_r = self._last_l_step(steps[-1])
        for i in reversed(range(len(steps))):
            dbeta = _r_backward(steps[i], to_r, self.keys)
            if i > 0:
                to_r = self._early_l_step(steps[i - 1], steps[i].beta, dbeta)
        l_prev = self.inputs.l_prev
        if l_prev is None:
            self.dq += self.scale * dbeta
            return
        for b, part in self._chunks():
            L = l_prev[b, part].flatten(0, 1).to(self.wide) / L_SCALE
            dalpha = by_position(dbeta[b, :, part]) * (self.scale / L.sum(1).clamp_min(self.options.c_floor))[..., None]
            self._add_dq(b, part, L @ dalpha)

    def _recomputed(self) -> list[_RStep]:
        """The forward's R-steps."""
        l_prev, steps = self.inputs.l_prev, self.options.num_steps
        beta = self.q * self.scale if l_prev is None else warm_beta(self.l_step, l_prev)
        made = []
        for i in range(steps):
            rk, y, lse = r_step(beta, self.k, self.v if i == steps - 1 else None)
            made.append(_RStep(beta, rk, y, lse))
            if i < steps - 1:
                c_l, beta = made[-1].c_l, torch.empty_like(self.q, memory_format=torch.contiguous_format)
                for b, part in self._chunks():
                    q_j = by_position(self.q[b, :, part])
                    L, _ = l_entries(self.l_step, q_j, by_position(rk[b, :, part]), c_l[b, :, part], (b, part))
                    self._put(beta, b, part, next_beta(self.l_step, L, q_j))
        return made

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        return ((b, part) for b in range(self.q.shape[0]) for part in position_chunks(self.q))

    def _put(self, target: Tensor, b: int, part: slice, by_position_: Tensor) -> None:
        """Write (P * H, T, D), or a statistic (P * H, T, 1), to a chunk of (B, T, P, H, D) or (B, T, P, H)."""
        value = by_position_.transpose(0, 1).unflatten(1, (-1, self.q.shape[3]))
        target[b, :, part] = value if target.dim() == 5 else value[..., 0]

    def _add_dq(self, b: int, part: slice, by_position_: Tensor) -> None:
        self.dq[b, :, part] += by_position_.transpose(0, 1).unflatten(1, (-1, self.q.shape[3]))

    def _to_r(self, dy: Tensor | None) -> _RGradients:
        return _RGradients(torch.empty_like(self.dq), dy, torch.empty_like(self.delta))

    def _last_l_step(self, step: _RStep) -> _RGradients:
        """From the gradient of the output."""
        dy = torch.empty_like(self.dq)
        to, c_l, y = self._to_r(dy), step.c_l, step.y
        assert y is not None  # noqa: S101  # the last R-step has it
        for b, part in self._chunks():
            q_j, rk_j = by_position(self.q[b, :, part]), by_position(step.rk[b, :, part])
            grad_j = by_position(self.grad[b, :, part])
            if self.first_alone:
                grad_j = grad_j.clone()
                grad_j[:, 0] = 0
            L, weight = l_entries(self.l_step, q_j, rk_j, c_l[b, :, part], (b, part))
            dL = grad_j @ by_position(y[b, :, part]).mT
            if weight is None:
                total = (L * dL).sum(-1, keepdim=True)
            else:
                total = position_rows(self.delta[b, :, part])
                self._put(self.share, b, part, weight)
                if self.first_alone:
                    total = total.clone()
                    total[:, 0] = 0
            self._put(dy, b, part, L.mT @ grad_j)
            self._l_logits(step, to, (b, part), (q_j, rk_j, L * (dL - total)))
        return to

    def _early_l_step(self, step: _RStep, next_beta_: Tensor, dbeta: Tensor) -> _RGradients:
        """From the gradient of the next R-step's beta."""
        to, c_l = self._to_r(None), step.c_l
        products = (next_beta_ * dbeta).sum(-1)
        for b, part in self._chunks():
            q_j, rk_j = by_position(self.q[b, :, part]), by_position(step.rk[b, :, part])
            L, weight = l_entries(self.l_step, q_j, rk_j, c_l[b, :, part], (b, part))
            c_r = L.sum(1)[..., None]
            floor = self.options.c_floor
            dalpha = by_position(dbeta[b, :, part]) * (self.scale / c_r.clamp_min(floor))
            dc = torch.where(c_r > floor, -position_rows(products[b, :, part]) / c_r, 0.0)
            dL = q_j @ dalpha.mT + dc.mT
            total = (L * dL).sum(-1, keepdim=True)
            if weight is not None:
                self.d_lse_early[b, :, part] -= (weight * total)[..., 0].T.unflatten(1, (-1, self.q.shape[3]))
            self._add_dq(b, part, L @ dalpha)
            self._l_logits(step, to, (b, part), (q_j, rk_j, L * (dL - total)))
        return to

    def _l_logits(
        self, step: _RStep, to: _RGradients, where: tuple[int, slice], matrices: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """From the gradient of the L logits (P * H, T, T) to dq, g and w; ``matrices``: q, R K and that gradient."""
        b, part = where
        q_j, rk_j, d_logits = matrices
        self._add_dq(b, part, self.scale * (d_logits @ rk_j))
        w = d_logits.sum(1)[..., None]
        self._put(to.w, b, part, w)
        self._put(to.g, b, part, self.scale * (d_logits.mT @ q_j) - w * by_position(step.beta[b, :, part]))

    def exact(self) -> None:
        """Sum the gradients of what is exact: the band, the first frame, or everything."""
        frames, positions = self.q.shape[1:3]
        band, lse = self.options.band, self.kept_lse
        if lse is None:
            return
        if self.first_alone or is_exact(frames, band):
            # These rows' weights sum to one, so that their shares are one.
            stop = frames if is_exact(frames, band) else 1
            rows = self._rows(lse, self.delta, None).frames(0, stop, positions)
            _exact_backward(rows, self.keys, self.scale)
            return
        rows = self._rows(lse, self.share * self.delta - self.d_lse_early, self.share)
        for frame in range(frames):
            first, count = window_start(frame, frames, band or 0), window_frames(frames, band)
            if frame == 0 and self.options.first_frame:
                first, count = 0, frames
            keys = self.keys.tokens(first * positions, (first + count) * positions)
            _exact_backward(rows.frames(frame, frame + 1, positions), keys, self.scale)

    def _rows(self, lse_BHTP: Tensor, delta: Tensor, share: Tensor | None) -> _ExactRows:
        q, grad, dq, delta = (x.flatten(1, 2) for x in (self.q, self.grad, self.dq, delta))
        return _ExactRows(q, grad, dq, lse_BHTP.flatten(2).mT, delta, None if share is None else share.flatten(1, 2))

    def extra_gradients(self) -> tuple[Tensor, Tensor] | None:
        """Of the extra part's output (B, N, H, D) and log-sum-exp (B, N, H)."""
        if self.extra is None:
            return None
        out, lse = (x.to(self.wide) for x in self.extra)
        weight, early = self.share, self.d_lse_early
        if self.kept_lse is not None:
            within = (lse[:, : self.kept_lse.shape[2]] - self.kept_lse.permute(0, 2, 3, 1)).exp()
            if self.first_alone or is_exact(self.q.shape[1], self.options.band):
                weight = torch.cat([within, weight[:, within.shape[1] :]], dim=1)
            else:
                weight, early = weight * within, early * within
        grad = self.grad.to(self.wide)
        d_lse = weight * ((grad * out).sum(-1) - self.delta) + early
        return (weight[..., None] * grad).flatten(1, 2), d_lse.flatten(1, 2)

    def result(self) -> Gradients:
        """All of them, in the dtypes of what they belong to."""
        inputs = self.inputs
        q, k, v = (x.to(inputs.q.dtype) for x in (self.dq.flatten(1, 2), self.keys.dk, self.keys.dv))
        extra = self.extra_gradients()
        if extra is None or inputs.extra is None:
            return Gradients(q, k, v)
        return Gradients(q, k, v, *(x.to(like.dtype) for x, like in zip(extra, inputs.extra, strict=True)))


def monarch_backward_torch(inputs: Inputs, options: Options, kept: Forward, grad: Tensor) -> Gradients:
    """Gradients of the output (B, N, H, D) of ``structured_torch``, or of dense attention where all is exact.

    ``kept`` is what the forward returned; tensors may have any strides.
    """
    run = _Backward(inputs, options, kept, grad)
    if not is_exact(inputs.frames, options.band):
        run.structured()
    run.exact()
    return run.result()


def frame_backward_torch(inputs: Inputs, frame: int, scale: float, kept: Forward, grad: Tensor) -> Gradients:
    """Gradients of ``frame_attention``; ``kept`` and ``grad`` are of the frame: (B, P, H, D), lse (B, H, 1, P)."""
    dtype, wide = inputs.q.dtype, torch.promote_types(inputs.q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (inputs.q,) * 3)
    lse = kept.lse
    assert lse is not None  # noqa: S101  # of an exact frame
    q, dq_rows = (split_frames(x, inputs.frames)[:, frame] for x in (inputs.q, dq))
    lse_rows, delta = lse[:, :, 0].mT, (grad.to(wide) * kept.out).sum(-1)
    _exact_backward(_ExactRows(q, grad, dq_rows, lse_rows, delta), _Keys(inputs.k, inputs.v, dk, dv), scale)
    grads = Gradients(dq.to(dtype), dk.to(dtype), dv.to(dtype))
    if inputs.extra is None:
        return grads
    d_extra = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs.extra]
    out, lse_extra = (split_frames(x, inputs.frames)[:, frame] for x in inputs.extra)
    weight = (lse_extra - lse_rows).exp()
    d_out, d_lse = (split_frames(x, inputs.frames)[:, frame] for x in d_extra)
    d_out.copy_(weight[..., None] * grad)
    d_lse.copy_(weight * ((grad.to(wide) * out).sum(-1) - delta))
    return grads._replace(extra_out=d_extra[0], extra_lse=d_extra[1])
