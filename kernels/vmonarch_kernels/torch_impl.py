"""impl="torch": the algorithm through torch's own flash attention, on any device.

Every R-step is an ordinary attention whose values are the keys; its log-sum-exp gives the entropy
for free (the identity of ../README.md). L lives only for a chunk of positions at a time, so no
tensor of N * N or N * P elements exists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmonarch_kernels.cost import window_frames
from vmonarch_kernels.dense import attention_lse
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import (
    L_DTYPE,
    L_SCALE,
    Forward,
    band_groups,
    dequantised,
    empty_l,
    exact_pairs,
    merge_exact,
    split_frames,
)

_CHUNK_ELEMENTS = 1 << 20  # entries of L computed at once: a few MB, so that they stay in cache


@dataclass(frozen=True)
class LStep:
    """What every L-step of a call shares."""

    q: Tensor  # (B, T, P, H, D)
    exact: tuple[Tensor, Tensor] | None
    """(out (B, T, P, H, D), lse (B, T, P, H)) of every query's exact part."""
    pairs: Tensor | None
    """(T, T) bool: which frames the exact part covers; None where it covers none."""
    scale: float
    c_floor: float


def monarch_torch(inputs: Inputs, options: Options, return_l: bool) -> tuple[Tensor, Tensor | None]:
    """Structured attention on (B, N, H, D); returns (out, L_SCALE L as e4m3 (B, P, H, T, T) or None).

    The caller has handled the cases in which the structure is exact (one frame, full band).
    """
    return structured_torch(inputs, options, return_l)[:2]


def structured_torch(inputs: Inputs, options: Options, return_l: bool) -> Forward:
    """``monarch_torch`` with what its backward pass keeps."""
    frames, band, first_frame = inputs.frames, options.band, options.first_frame
    scale = options.score_scale(inputs.head_dim)
    q_BTPHD, k_BTPHD, v_BTPHD = (split_frames(x, frames) for x in (inputs.q, inputs.k, inputs.v))
    out = torch.empty_like(q_BTPHD, memory_format=torch.contiguous_format)
    extra = exact = pairs = lse = None
    if inputs.extra is not None:
        extra = split_frames(inputs.extra[0], frames), split_frames(inputs.extra[1], frames)
        exact = extra
    if band is not None:
        exact = _exact_band(q_BTPHD, k_BTPHD, v_BTPHD, band, first_frame, scale)
        pairs = exact_pairs(frames, band, first_frame, inputs.q.device)
        if extra is not None:
            exact = merge_exact(*exact, *extra)
        lse = exact[1].permute(0, 3, 1, 2).contiguous()
    l_step = LStep(q_BTPHD, exact, pairs, scale, options.c_floor)
    beta = q_BTPHD * scale if inputs.l_prev is None else warm_beta(l_step, inputs.l_prev)

    l_new = None
    for step in range(options.num_steps):
        last = step == options.num_steps - 1
        rk, y, r_lse = r_step(beta, k_BTPHD, v_BTPHD if last else None)
        # sum R log R by the identity, from the very values that enter the products below, so that
        # the rounding of R K cancels in the L logits.
        c_l = (beta * rk).sum(-1, dtype=r_lse.dtype) - r_lse
        if not last:
            beta = torch.empty_like(beta)
            _run_l_step(l_step, rk, c_l, None, beta, None)
        else:
            if return_l:
                l_new = empty_l(q_BTPHD)
            _run_l_step(l_step, rk, c_l, y, out, l_new)
    if inputs.residual is not None:
        out += dequantised(*inputs.residual, frames)
    if first_frame and band is None:
        first, first_lse = frame_torch(q_BTPHD[:, 0], inputs.k, inputs.v, scale)
        if extra is not None:
            first, first_lse = merge_exact(first, first_lse, extra[0][:, 0], extra[1][:, 0])
        out[:, 0] = first
        lse = first_lse.mT[:, :, None].contiguous()
    return Forward(out.flatten(1, 2), l_new, lse)


def r_step(beta: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """R K, R V (None without v), both (B, T, P, H, D), and the log-sum-exp (B, T, P, H) of R."""
    if beta.device.type == "cpu" and beta.dtype in (torch.float32, torch.float64):
        return _r_step_cpu(beta, k, v)
    frames = beta.shape[1]
    beta_, k_ = (x.flatten(0, 1).transpose(1, 2) for x in (beta, k))
    rk, lse = attention_lse(beta_, k_, k_, scale=1.0)
    y = None
    if v is not None:
        y, _ = attention_lse(beta_, k_, v.flatten(0, 1).transpose(1, 2), scale=1.0)
        y = y.transpose(1, 2).unflatten(0, (-1, frames))
    return (
        rk.transpose(1, 2).unflatten(0, (-1, frames)),
        y,
        lse.transpose(1, 2).unflatten(0, (-1, frames)),
    )


def _r_step_cpu(beta: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The R-step by batched products over a few rows of R at a time.

    Faster here than torch's CPU flash kernel: a frame's keys fit the cache, so blocks of rows
    need no online rescaling, and R serves K and V after one softmax.
    """
    batch, frames, positions, heads, _ = beta.shape
    rk = torch.empty_like(beta, memory_format=torch.contiguous_format)
    y = None if v is None else torch.empty_like(rk)
    lse = beta.new_empty(beta.shape[:-1])
    rows = min(positions, max(32, _CHUNK_ELEMENTS // (heads * positions)))
    scores_buffer = beta.new_empty(heads * rows * positions)
    for b in range(batch):
        for frame in range(frames):
            keys = k[b, frame].transpose(0, 1)
            for first in range(0, positions, rows):
                part = slice(first, min(first + rows, positions))
                queries = beta[b, frame, part].transpose(0, 1)
                count = queries.shape[1]
                scores = scores_buffer[: heads * count * positions].view(heads, count, positions)
                torch.bmm(queries, keys.mT, out=scores)
                top = scores.amax(-1)
                R = torch.softmax(scores, -1)
                # log R = score - lse holds for every entry; the largest cannot underflow.
                lse[b, frame, part] = (top - R.amax(-1).log()).T
                rk[b, frame, part] = torch.bmm(R, keys).transpose(0, 1)
                if v is not None and y is not None:
                    y[b, frame, part] = torch.bmm(R, v[b, frame].transpose(0, 1)).transpose(0, 1)
    return rk, y, lse


def frame_torch(q_BPHD: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Exact attention of one frame's queries over all tokens: (out (B, P, H, D), lse (B, P, H))."""
    out, lse = attention_lse(q_BPHD.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _exact_band(q: Tensor, k: Tensor, v: Tensor, band: int, first_frame: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, T, P, H, D), lse (B, T, P, H)) of the exact band, no keys copied."""
    batch, frames, positions, heads, dim = q.shape
    width = window_frames(frames, band)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    if first_frame:
        out[:, 0], lse[:, 0] = frame_torch(q[:, 0], k.flatten(1, 2), v.flatten(1, 2), scale)
    for group in band_groups(frames, band, first_frame):
        rows = slice(group.first, group.first + group.count)
        for b in range(batch):
            queries = q[b, rows].transpose(1, 2)
            if group.stride == 0:  # one window for the whole group: one attention, more queries
                queries = q[b, rows].flatten(0, 1).transpose(0, 1)[None]
            keys, values = (
                torch.as_strided(
                    x,
                    (group.count if group.stride else 1, heads, width * positions, dim),
                    (x.stride(1), x.stride(3), x.stride(2), x.stride(4)),
                    x[b, group.key_first].storage_offset(),
                )
                for x in (k, v)
            )
            part, part_lse = attention_lse(queries, keys, values, scale=scale)
            out[b, rows] = part.transpose(1, 2).reshape(group.count, positions, heads, dim)
            lse[b, rows] = part_lse.transpose(1, 2).reshape(group.count, positions, heads)
    return out, lse


def position_chunks(q_BTPHD: Tensor) -> list[slice]:
    _, frames, positions, heads, _ = q_BTPHD.shape
    size = max(1, _CHUNK_ELEMENTS // (frames * frames * heads))
    return [slice(first, min(first + size, positions)) for first in range(0, positions, size)]


def by_position(x_TPHD: Tensor) -> Tensor:
    """(T, P, H, D) -> (P * H, T, D) in float32 or wider: one small matrix per position and head.

    For a contiguous input this is a view that batched BLAS takes without a copy.
    """
    wide = torch.promote_types(x_TPHD.dtype, torch.float32)
    return x_TPHD.flatten(1, 2).transpose(0, 1).to(wide)


def _run_l_step(step: LStep, rk: Tensor, c_l: Tensor, y: Tensor | None, target: Tensor, l_new: Tensor | None) -> None:
    """L = softmax over key frames; writes the next beta (y is None) or the output into ``target``."""
    q = step.q
    heads = q.shape[3]
    for b in range(q.shape[0]):
        for part in position_chunks(q):
            q_j = by_position(q[b, :, part])
            L, weight = l_entries(step, q_j, by_position(rk[b, :, part]), c_l[b, :, part], (b, part))
            if y is None:
                result = next_beta(step, L, q_j)
            else:
                result = L @ by_position(y[b, :, part])
                if weight is not None and step.exact is not None:
                    result.addcmul_(weight, by_position(step.exact[0][b, :, part]))
            target[b, :, part] = result.transpose(0, 1).unflatten(1, (-1, heads))
            if l_new is not None:
                l_new[b, part] = L.mul_(L_SCALE).unflatten(0, (-1, heads)).to(L_DTYPE)


def l_entries(
    step: LStep, q_j: Tensor, rk_j: Tensor, c_l_TPH: Tensor, where: tuple[int, slice]
) -> tuple[Tensor, Tensor | None]:
    """L (P * H, T, T) of some positions, and the weight (P * H, T, 1) of the exact part where there is one.

    ``where``: the sample and its positions; ``q_j`` and ``rk_j`` are theirs, by position.
    """
    bias = -position_rows(c_l_TPH).mT.to(q_j.dtype)
    logits = torch.baddbmm(bias, q_j, rk_j.mT, alpha=step.scale)
    exact = None
    if step.exact is not None:
        b, part = where
        exact = position_rows(step.exact[1][b, :, part]).to(q_j.dtype)
    if step.pairs is not None:
        logits.masked_fill_(step.pairs, float("-inf"))
    return _softmax_short_rows(logits, exact)


def position_rows(x_TPH: Tensor) -> Tensor:
    """A statistic (T, P, H) as columns beside ``by_position``: (P * H, T, 1)."""
    return x_TPH.flatten(1).T[..., None]


def _softmax_short_rows(logits: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Softmax over the last dimension, with one more entry per row when ``extra`` is given; in place.

    torch.softmax is several times slower on rows of a dozen entries.
    """
    top = logits.amax(-1, keepdim=True)
    if extra is None:
        L = logits.sub_(top).exp_()
        return L.div_(L.sum(-1, keepdim=True)), None
    top = torch.maximum(top, extra)
    L, weight = logits.sub_(top).exp_(), (extra - top).exp_()
    total = L.sum(-1, keepdim=True).add_(weight)
    return L.div_(total), weight.div_(total)


def next_beta(step: LStep, L: Tensor, q_j: Tensor) -> Tensor:
    """beta[k] = s alpha_r / max(c_r, c_floor) of (P * H, T, T) L and (P * H, T, D) queries."""
    c_r = L.sum(dim=1)[..., None]
    return torch.bmm(L.mT, q_j).mul_(step.scale / c_r.clamp_min(step.c_floor))


def warm_beta(step: LStep, l_prev: Tensor) -> Tensor:
    """The first beta of a warm start, from the last call's L and this call's queries."""
    q = step.q
    beta = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b in range(q.shape[0]):
        for part in position_chunks(q):
            q_j = by_position(q[b, :, part])
            L = l_prev[b, part].flatten(0, 1).to(q_j.dtype) / L_SCALE
            result = next_beta(step, L, q_j)
            beta[b, :, part] = result.transpose(0, 1).unflatten(1, (-1, q.shape[3]))
    return beta
