"""The oracle: every step of the algorithm written out, eager, in a precision of the caller's choice.

Sources: VMonarch (arXiv 2601.22275), algorithm of section 3; the exact band and the warm start
are this project's. The entropy is summed directly here, so that the identity which the fast
implementations use is checked against an independent computation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmonarch_kernels.cost import is_exact, window_frames
from vmonarch_kernels.spec import PAPER, Inputs, Options
from vmonarch_kernels.structure import (
    L_SCALE,
    dequantised,
    exact_pairs,
    merge_exact,
    split_frames,
    window_start,
    with_padded_rows,
)


@dataclass(frozen=True)
class Factors:
    """Result of the reference with both Monarch factors.

    ``out`` (B, N, H, D); ``L`` (B, H, T_l, T_k, P) sums to one over k together with ``L_exact``;
    ``R`` (B, H, T_k, P_j, P_i) sums to one over i; ``L_exact`` (B, H, T_l, P) is the weight of the
    exact entry, zero without a band and an extra part; ``c_l`` (B, H, T, P) is sum R log R of the last R-step.
    """

    out: Tensor
    L: Tensor
    R: Tensor
    L_exact: Tensor
    c_l: Tensor


def softmax_attention(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain attention: (out (B, H, S, D), natural log-sum-exp of the scaled scores (B, H, S))."""
    scores = scale * (q_BHSD @ k_BHSD.mT)
    return torch.softmax(scores, dim=-1) @ v_BHSD, torch.logsumexp(scores, dim=-1)


def monarch_factors(inputs: Inputs, options: Options = PAPER, *, compute_dtype: torch.dtype = torch.float64) -> Factors:
    """Steps 1-5 of the algorithm on (B, N, H, D) tensors, with L and R materialised.

    Memory grows with N * P: for tests and pictures. ``compute_dtype`` is used for every
    intermediate; bfloat16 gives the eager low-precision error that bounds a kernel's error.
    ``out`` is returned in ``compute_dtype``.
    """
    q, frames = inputs.q, inputs.frames
    first_frame, band, scale = options.first_frame, options.band, options.score_scale(inputs.head_dim)
    q_BHTPD, k_BHTPD, v_BHTPD = (
        split_frames(x, frames).permute(0, 3, 1, 2, 4).to(compute_dtype) for x in (q, inputs.k, inputs.v)
    )
    batch, heads, _, positions, _ = q_BHTPD.shape

    # Every query's exact entry: the band and the extra part, either of which may be missing.
    exact = torch.zeros(frames, frames, dtype=torch.bool, device=q.device)
    o_exact, lse_exact = torch.zeros_like(q_BHTPD), torch.full_like(q_BHTPD[..., 0], float("-inf"))
    if inputs.extra is not None:
        o_extra, lse_extra = (split_frames(x, frames).transpose(2, 3).transpose(1, 2) for x in inputs.extra)
        o_exact, lse_exact = o_extra.to(compute_dtype), lse_extra.to(compute_dtype)
    if band is not None or is_exact(frames, band):
        exact = exact_pairs(frames, frames if band is None else band, first_frame, q.device)
        windows = [_window(frame, frames, frames if band is None else band, first_frame) for frame in range(frames)]
        o_band, lse_band = _exact_part(q_BHTPD, k_BHTPD, v_BHTPD, windows, scale)
        o_exact, lse_exact = merge_exact(o_band, lse_band, o_exact, lse_exact)

    if inputs.l_prev is None:
        alpha_r, c_r = q_BHTPD, torch.ones_like(q_BHTPD[..., 0])
    else:
        L = inputs.l_prev.to(compute_dtype).permute(0, 2, 3, 4, 1) / L_SCALE  # (B, P, H, l, k) -> (B, H, l, k, P)
        alpha_r, c_r = _gather_queries(L, q_BHTPD)

    for _ in range(options.num_steps):
        beta = scale * alpha_r / c_r.clamp_min(options.c_floor)[..., None]
        log_R = torch.log_softmax(beta @ k_BHTPD.mT, dim=-1)
        R = log_R.exp()
        alpha_l = scale * (R @ k_BHTPD)
        c_l = (R * log_R).sum(-1)
        logits = torch.einsum("bhljd,bhkjd->bhlkj", q_BHTPD, alpha_l) - c_l[:, :, None]
        logits = logits.masked_fill(exact[:, :, None], float("-inf"))
        merged = torch.softmax(torch.cat([logits, lse_exact[:, :, :, None]], dim=3), dim=3)
        L, L_exact = merged[:, :, :, :-1], merged[:, :, :, -1]
        alpha_r, c_r = _gather_queries(L, q_BHTPD)

    out = torch.einsum("bhlkj,bhkjd->bhljd", L, R @ v_BHTPD) + L_exact[..., None] * o_exact
    if inputs.residual is not None:
        out = out + dequantised(*inputs.residual, frames).permute(0, 3, 1, 2, 4)
    if first_frame and band is None and not is_exact(frames, band):
        first, lse = softmax_attention(q_BHTPD[:, :, 0], k_BHTPD.flatten(2, 3), v_BHTPD.flatten(2, 3), scale)
        out[:, :, 0], _ = merge_exact(first, lse, o_exact[:, :, 0], lse_exact[:, :, 0])
    out = out.permute(0, 2, 3, 1, 4).reshape(batch, frames * positions, heads, -1)
    return Factors(out, L, R, L_exact, c_l)


def monarch_reference(inputs: Inputs, options: Options, return_l: bool) -> tuple[Tensor, Tensor | None]:
    """impl="reference": ``monarch_factors`` in float32, float64 for float64; 256 L as e4m3 (B, P, H, T, T)."""
    factors = monarch_factors(inputs, options, compute_dtype=torch.promote_types(inputs.q.dtype, torch.float32))
    l_new = with_padded_rows(L_SCALE * factors.L.detach().permute(0, 4, 1, 2, 3)) if return_l else None
    return factors.out.to(inputs.q.dtype), l_new


def _gather_queries(L: Tensor, q_BHTPD: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_r[k, j] = sum_l L q[l, j] and c_r[k, j] = sum_l L."""
    return torch.einsum("bhlkj,bhljd->bhkjd", L, q_BHTPD), L.sum(dim=2)


def _window(frame: int, frames: int, band: int, first_frame: bool) -> slice:
    """Key frames that a query frame sees exactly."""
    if frame == 0 and first_frame:
        return slice(0, frames)
    start = window_start(frame, frames, band)
    return slice(start, start + window_frames(frames, band))


def _exact_part(
    q_BHTPD: Tensor, k_BHTPD: Tensor, v_BHTPD: Tensor, windows: list[slice], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query frame over its window of key frames: (out, lse) per query."""
    outs, lses = [], []
    for frame, window in enumerate(windows):
        keys, values = (x[:, :, window].flatten(2, 3) for x in (k_BHTPD, v_BHTPD))
        out, lse = softmax_attention(q_BHTPD[:, :, frame], keys, values, scale)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs, dim=2), torch.stack(lses, dim=2)
