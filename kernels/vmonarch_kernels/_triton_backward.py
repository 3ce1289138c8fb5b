"""Triton kernel bodies of the backward pass; `launch_backward.py` holds their grids, `../README.md` the derivation.

Names as in `_triton.py`. Tokens of a sample and head are numbered through, [0, frames * positions), so that statistics
(B, H, T, P) are rows of (B, H, N). Log-sum-exps are in base 2 here, in memory too.
"""

import triton
import triton.language as tl

from vmonarch_kernels._triton import LOG2E, from_8bit, l_logits, load_rows, store_rows


@triton.jit
def _add_rows(p, o_row, s_row, o_d, rows, row_end, d_end, MASK_D: tl.constexpr, ADD: tl.constexpr):
    """`store_rows`, or with ADD the sum of the rows and what is there."""
    if ADD:
        rows += load_rows(p, o_row, s_row, o_d, row_end, d_end, True, MASK_D).to(tl.float32)
    store_rows(p, o_row, s_row, o_d, rows, row_end, d_end, MASK_D)


@triton.jit
def grad_queries_kernel(
    p_q, s_qb, s_qn, s_qh,  # queries (B, N, H, D): q_r of an R-step, q of exact rows
    p_k, s_kb, s_kn, s_kh,
    p_v, s_vb, s_vn, s_vh,
    p_gk, p_gv,  # gradients of R K and of R V (or the output), (B, N, H, D) contiguous
    p_lse, p_delta, p_share,  # (B, H, N) float32
    p_dq,  # (B, N, H, D) contiguous, or float32 partial sums (S, B, P, H, D)
    p_product,  # queries . their gradient, (B, H, N)
    qk_scale,
    frames, positions, heads, head_dim, batch,
    first_query_frame, band, width, split_keys,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_D: tl.constexpr, EVEN_KEYS: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr,
    SHARED: tl.constexpr, SPLIT: tl.constexpr, ADD: tl.constexpr, WITH_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of one frame's queries from a window of key frames (as `_triton.attend_kernel`'s).

    With R = exp(s q K^T - lse) this is s dS K of dS = R (share (gk K^T + gv V^T) - delta). An R-step has WITH_K (and
    WITH_V in the last iteration), exact rows WITH_V alone. SPLIT divides the window's keys over programs.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = (tl.program_id(2) % heads).to(tl.int64)
    tokens = frames * positions
    if SPLIT:
        frame = first_query_frame
        key_first = part * split_keys
        key_end = tl.minimum(key_first + split_keys, width * positions)
    else:
        frame = part + first_query_frame
        key_first = tl.minimum(tl.maximum(frame - band, 0), frames - width) * positions
        key_end = key_first + width * positions
    row_first = frame * positions
    row_end = row_first + positions
    o_row = row_first + block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < row_end
    o_d = tl.arange(0, BLOCK_D)
    s_row = heads * head_dim
    o_head = (b * tokens * heads + h) * head_dim
    o_stats = (b * heads + h) * tokens

    q = load_rows(p_q + b * s_qb + h * s_qh, o_row, s_qn, o_d, row_end, head_dim, True, MASK_D)
    if WITH_K:
        gk = load_rows(p_gk + o_head, o_row, s_row, o_d, row_end, head_dim, True, MASK_D)
    if WITH_V:
        gv = load_rows(p_gv + o_head, o_row, s_row, o_d, row_end, head_dim, True, MASK_D)
    lse = tl.load(p_lse + o_stats + o_row, mask=m_row, other=0.0)
    shift = tl.load(p_delta + o_stats + o_row, mask=m_row, other=0.0) * qk_scale
    if SHARED:
        factor = (tl.load(p_share + o_stats + o_row, mask=m_row, other=0.0) * qk_scale)[:, None]
    else:
        factor = qk_scale
    p_k += b * s_kb + h * s_kh
    p_v += b * s_vb + h * s_vh
    scale2 = qk_scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(key_first, key_end, BLOCK_N, num_stages=STAGES):
        o_key = start + tl.arange(0, BLOCK_N)
        keys = load_rows(p_k, o_key, s_kn, o_d, key_end, head_dim, not EVEN_KEYS, MASK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        # No weight is above one. Keys past the end are zero, so that their finite weights add nothing.
        weights = tl.math.exp2(tl.minimum(scores * scale2 - lse[:, None], 0.0))
        if WITH_V:
            values = load_rows(p_v, o_key, s_vn, o_d, key_end, head_dim, not EVEN_KEYS, MASK_D)
            d_weights = tl.dot(gv, tl.trans(values), input_precision=PRECISION)
            if WITH_K:
                d_weights = tl.dot(gk, tl.trans(keys), d_weights, input_precision=PRECISION)
        else:
            d_weights = tl.dot(gk, tl.trans(keys), input_precision=PRECISION)
        d_scores = weights * (d_weights * factor - shift[:, None])
        acc = tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)

    if WITH_PRODUCT:
        q = load_rows(p_q + b * s_qb + h * s_qh, o_row, s_qn, o_d, row_end, head_dim, True, MASK_D)
        tl.store(p_product + o_stats + o_row, tl.sum(acc * q.to(tl.float32), 1), mask=m_row)
    if SPLIT:
        p_dq += ((part * batch + b) * positions * heads + h) * head_dim
        store_rows(p_dq, o_row - row_first, s_row, o_d, acc, positions, head_dim, MASK_D)
    else:
        _add_rows(p_dq + o_head, o_row, s_row, o_d, acc, row_end, head_dim, MASK_D, ADD)


@triton.jit
def _grad_keys_range(
    keys, values, acc_k, acc_v, p_q, s_qn, p_gk, p_gv, s_row, p_lse, p_delta, p_w, p_share,
    row_first, row_end, qk_scale, o_d, head_dim,
    BLOCK_M: tl.constexpr, MASK_D: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what the queries [row_first, row_end) give a tile of keys and values."""
    scale2 = qk_scale * LOG2E
    for start in tl.range(row_first, row_end, BLOCK_M, num_stages=STAGES):
        o_row = start + tl.arange(0, BLOCK_M)
        m_row = o_row < row_end
        q = load_rows(p_q, o_row, s_qn, o_d, row_end, head_dim, True, MASK_D)
        # Rows past the end get no weight.
        lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
        shift = -tl.load(p_delta + o_row, mask=m_row, other=0.0)
        if WITH_K:
            shift += tl.load(p_w + o_row, mask=m_row, other=0.0)
        scores = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
        weights = tl.math.exp2(scores * scale2 - lse[None, :])
        if SHARED:
            share = tl.load(p_share + o_row, mask=m_row, other=0.0)
            factor = (share * qk_scale)[None, :]
        else:
            factor = qk_scale
        if WITH_V:
            gv = load_rows(p_gv, o_row, s_row, o_d, row_end, head_dim, True, MASK_D)
            d_weights = tl.dot(values, tl.trans(gv), input_precision=PRECISION)
            if SHARED:
                acc_v = tl.dot((weights * share[None, :]).to(q.dtype), gv, acc_v, input_precision=PRECISION)
            else:
                acc_v = tl.dot(weights.to(q.dtype), gv, acc_v, input_precision=PRECISION)
        if WITH_K:
            gk = load_rows(p_gk, o_row, s_row, o_d, row_end, head_dim, True, MASK_D)
            if WITH_V:
                d_weights = tl.dot(keys, tl.trans(gk), d_weights, input_precision=PRECISION)
            else:
                d_weights = tl.dot(keys, tl.trans(gk), input_precision=PRECISION)
            acc_k = tl.dot(weights.to(q.dtype), gk, acc_k, input_precision=PRECISION)
        d_scores = weights * (d_weights * factor + (shift * qk_scale)[None, :])
        acc_k = tl.dot(d_scores.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def grad_keys_kernel(
    p_q, s_qb, s_qn, s_qh,
    p_k, s_kb, s_kn, s_kh,
    p_v, s_vb, s_vn, s_vh,
    p_gk, p_gv,  # (B, N, H, D) contiguous
    p_lse, p_delta, p_w, p_share,  # (B, H, N) float32; p_w: sums of the gradients of the L logits
    p_dk, p_dv,  # (B, N, H, D) contiguous
    qk_scale,
    frames, positions, heads, head_dim,
    band, width, whole_frame,  # key frames that a query frame sees; the query frame that sees all, or -1
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_D: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr, SHARED: tl.constexpr,
    BANDED: tl.constexpr, WHOLE: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of one frame's keys and values: dV = R^T gv, dK = s (dS + w R)^T q + R^T gk.

    With BANDED from all query frames whose window has this key frame (an R-step: its own alone), with WHOLE from one
    query frame more, which sees every key.
    """
    frame = tl.program_id(1)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = (tl.program_id(2) % heads).to(tl.int64)
    tokens = frames * positions
    key_end = (frame + 1) * positions
    o_key = frame * positions + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    s_row = heads * head_dim
    o_head = (b * tokens * heads + h) * head_dim
    o_stats = (b * heads + h) * tokens
    keys = load_rows(p_k + b * s_kb + h * s_kh, o_key, s_kn, o_d, key_end, head_dim, True, MASK_D)
    if WITH_V:
        values = load_rows(p_v + b * s_vb + h * s_vh, o_key, s_vn, o_d, key_end, head_dim, True, MASK_D)
    else:
        values = keys
    p_q += b * s_qb + h * s_qh
    if WITH_K:
        p_gk += o_head
        p_w += o_stats
    if WITH_V:
        p_gv += o_head
    if SHARED:
        p_share += o_stats
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if BANDED:
        # Query frame l sees [start, start + width) with start = clamp(l - band, 0, frames - width).
        low = frame - (width - 1 - band)
        if frame < width:
            low = 0
        high = frame + band + 1
        if frame >= frames - width:
            high = frames
        if WHOLE:
            low = tl.maximum(low, whole_frame + 1)
        acc_k, acc_v = _grad_keys_range(
            keys, values, acc_k, acc_v, p_q, s_qn, p_gk, p_gv, s_row, p_lse + o_stats, p_delta + o_stats, p_w, p_share,
            low * positions, tl.minimum(high, frames) * positions, qk_scale, o_d, head_dim,
            BLOCK_M, MASK_D, WITH_K, WITH_V, SHARED, PRECISION, STAGES,
        )  # fmt: skip
    if WHOLE:
        acc_k, acc_v = _grad_keys_range(
            keys, values, acc_k, acc_v, p_q, s_qn, p_gk, p_gv, s_row, p_lse + o_stats, p_delta + o_stats, p_w, p_share,
            whole_frame * positions, (whole_frame + 1) * positions, qk_scale, o_d, head_dim,
            BLOCK_M, MASK_D, WITH_K, WITH_V, SHARED, PRECISION, STAGES,
        )  # fmt: skip
    _add_rows(p_dk + o_head, o_key, s_row, o_d, acc_k, key_end, head_dim, MASK_D, ADD_K)
    if WITH_V:
        _add_rows(p_dv + o_head, o_key, s_row, o_d, acc_v, key_end, head_dim, MASK_D, ADD_V)


@triton.jit
def _row_products(a, b):
    """Products of the rows of two tiles."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def _softmax_rows(logits, exact):
    """Normalised entries of whole base-2 rows beside an exact entry, that entry's weight, and the log-sum-exps."""
    top = tl.maximum(tl.max(logits, 1), exact)
    top = tl.where(top == float("-inf"), 0.0, top)
    entries = tl.math.exp2(logits - top[:, None])
    weight = tl.math.exp2(exact - top)
    total = tl.sum(entries, 1) + weight
    return entries / total[:, None], weight / total, top + tl.math.log2(total)


@triton.jit
def _store_r_gradients(
    sums, w, q_r, rk, c_l, p_gk, p_lse, p_delta, p_w, o_k, o_row_k, o_d, s_row, frames, head_dim, qk_scale, delta,
    MASK_D: tl.constexpr,
):  # fmt: skip
    """What an R-step's backward takes of an L-step's: gk = s (sum_l dz q - w q_r), lse, w, and delta plus gk . RK."""
    m_k = o_k < frames
    gk = (qk_scale * (sums - w[:, None] * q_r.to(tl.float32))).to(p_gk.dtype.element_ty)
    store_rows(p_gk, o_k, s_row, o_d, gk, frames, head_dim, MASK_D)
    tl.store(p_lse + o_row_k, (qk_scale * _row_products(q_r, rk) - c_l) * LOG2E, mask=m_k)
    tl.store(p_delta + o_row_k, delta + _row_products(gk, rk), mask=m_k)
    tl.store(p_w + o_row_k, w, mask=m_k)


@triton.jit
def l_backward_kernel(
    p_q, s_qb, s_qn, s_qh,
    p_q_r, s_rb, s_rn, s_rh,  # the R-step's queries
    p_rk, p_c, p_exact_lse,  # RK (B, T, P, H, D), c_l and the exact part's natural log-sum-exp (B, H, T, P)
    p_y, p_go, p_row_delta,  # LAST: RV, gradient of the output, and with an exact part output . gradient (B, H, T, P)
    p_dq_r, p_product,  # else: gradient of the next R-step's queries, and its products with them
    p_dq, p_gk, p_gv,  # (B, T, P, H, D), written
    p_lse, p_delta, p_w,  # for the R-step's backward, written
    p_row_lse,  # LAST: base-2 log-sum-exps of the rows, written
    p_exact_grad,  # else: gradient of the exact part's log-sum-exp, added to
    qk_scale, c_floor,
    frames, positions, heads, head_dim, band, width, first_row,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr, MASK_D: tl.constexpr,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, LAST: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """An L-step's backward where all frames are in one tile: one head, STRIP positions after one another.

    Rows before ``first_row`` have no gradient here (the first frame's output is another kernel's).
    """
    j_first = (tl.program_id(0) // heads) * STRIP
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < frames
    s_row = positions * heads * head_dim  # from frame to frame
    p_q += b * s_qb + h * s_qh
    p_q_r += b * s_rb + h * s_rh
    for j_now in tl.range(j_first, tl.minimum(j_first + STRIP, positions), num_stages=STAGES):
        j = tl.cast(j_now, tl.int64)
        o_tokens = ((b * frames * positions + j) * heads + h) * head_dim
        o_row = (b * heads + h) * frames * positions + j + o_t * positions
        q = load_rows(p_q + j * s_qn, o_t, s_qn * positions, o_d, frames, head_dim, True, MASK_D)
        rk = load_rows(p_rk + o_tokens, o_t, s_row, o_d, frames, head_dim, True, MASK_D)
        c_l = tl.load(p_c + o_row, mask=m_t, other=0.0)
        exact = tl.full([BLOCK_T], float("-inf"), tl.float32)
        if HAS_EXACT:
            exact = tl.load(p_exact_lse + o_row, mask=m_t, other=0.0) * LOG2E
        product = tl.dot(q, tl.trans(rk), input_precision=PRECISION)
        logits = l_logits(product, c_l, o_t, o_t, frames, band, width, qk_scale, BANDED, FIRST_FRAME)
        entries, exact_weight, row_lse = _softmax_rows(logits, exact)
        entries = tl.where(m_t[:, None], entries, 0.0)
        delta = tl.zeros([BLOCK_T], tl.float32)
        if LAST:
            y = load_rows(p_y + o_tokens, o_t, s_row, o_d, frames, head_dim, True, MASK_D)
            go = load_rows(p_go + o_tokens, o_t, s_row, o_d, frames, head_dim, True, MASK_D)
            entries = tl.where((o_t >= first_row)[:, None], entries, 0.0)
            d_entries = tl.dot(go, tl.trans(y), input_precision=PRECISION)
            if HAS_EXACT:
                row_delta = tl.load(p_row_delta + o_row, mask=m_t, other=0.0)
            else:
                row_delta = tl.sum(entries * d_entries, 1)
            gv = tl.dot(tl.trans(entries).to(q.dtype), go, input_precision=PRECISION).to(p_gv.dtype.element_ty)
            store_rows(p_gv + o_tokens, o_t, s_row, o_d, gv, frames, head_dim, MASK_D)
            delta = _row_products(gv, y)
            tl.store(p_row_lse + o_row, row_lse, mask=m_t & (o_t >= first_row))
            if not HAS_EXACT:
                tl.store(p_row_delta + o_row, row_delta, mask=m_t & (o_t >= first_row))
        else:
            dq_r = load_rows(p_dq_r + o_tokens, o_t, s_row, o_d, frames, head_dim, True, MASK_D)
            c_r = tl.sum(entries, 0)
            inverse = 1.0 / tl.maximum(c_r, c_floor)
            product_r = tl.load(p_product + o_row, mask=m_t, other=0.0)
            dc = tl.where(c_r > c_floor, -product_r * inverse, 0.0)
            d_entries = tl.dot(q, tl.trans(dq_r), input_precision=PRECISION) * inverse[None, :] + dc[None, :]
            row_delta = tl.sum(entries * d_entries, 1)
            if HAS_EXACT:
                before = tl.load(p_exact_grad + o_row, mask=m_t, other=0.0)
                tl.store(p_exact_grad + o_row, before - exact_weight * row_delta, mask=m_t)
        dz = (entries * (d_entries - row_delta[:, None])).to(q.dtype)
        # From the rounded dz that the product below takes, so that gk keeps the difference of q and q_r.
        w = tl.sum(dz.to(tl.float32), 0)
        dq = tl.dot(dz, rk, input_precision=PRECISION) * qk_scale
        if not LAST:
            dq = tl.dot((entries * inverse[None, :]).to(q.dtype), dq_r, dq, input_precision=PRECISION)
        _add_rows(p_dq + o_tokens, o_t, s_row, o_d, dq, frames, head_dim, MASK_D, ADD)
        sums = tl.dot(tl.trans(dz), q, input_precision=PRECISION)
        q_r = load_rows(p_q_r + j * s_rn, o_t, s_rn * positions, o_d, frames, head_dim, True, MASK_D)
        _store_r_gradients(
            sums, w, q_r, rk, c_l, p_gk + o_tokens, p_lse, p_delta, p_w, o_t, o_row, o_d, s_row,
            frames, head_dim, qk_scale, delta, MASK_D,
        )  # fmt: skip


@triton.jit
def _l_tile(
    q, rk, p_c, p_row_lse, o_stats, o_l, o_k, frames, positions, band, width, qk_scale, first_row,
    BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Entries of L [BLOCK_L, BLOCK_K], zero before ``first_row`` and outside."""
    c_l = tl.load(p_c + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
    row_lse = tl.load(p_row_lse + o_stats + o_l * positions, mask=o_l < frames, other=0.0)
    product = tl.dot(q, tl.trans(rk), input_precision=PRECISION)
    logits = l_logits(product, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME)
    valid = (o_l >= first_row) & (o_l < frames)
    return tl.where(valid[:, None], tl.math.exp2(logits - row_lse[:, None]), 0.0)


@triton.jit
def l_sums_kernel(
    p_q, s_qb, s_qn, s_qh,
    p_rk, p_c, p_row_lse,
    p_product,  # of the next R-step's queries with their gradients
    p_inverse, p_dc,  # 1 / max(c_r, c_floor) and the gradient of c_r, (B, H, T, P) float32
    qk_scale, c_floor,
    frames, positions, heads, head_dim, band, width,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, MASK_D: tl.constexpr,
    BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column sums of L where rows or columns are in several tiles, as the step back from q_r needs them."""
    j = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    s_row = positions * heads * head_dim
    o_tokens = ((b * frames * positions + j) * heads + h) * head_dim
    o_stats = (b * heads + h) * frames * positions + j
    p_q += b * s_qb + h * s_qh + j * s_qn
    rk = load_rows(p_rk + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
    c_r = tl.zeros([BLOCK_K], tl.float32)
    for l_first in range(0, frames, BLOCK_L):
        o_l = l_first + tl.arange(0, BLOCK_L)
        q = load_rows(p_q, o_l, s_qn * positions, o_d, frames, head_dim, True, MASK_D)
        entries = _l_tile(
            q, rk, p_c, p_row_lse, o_stats, o_l, o_k, frames, positions, band, width, qk_scale, 0,
            BANDED, FIRST_FRAME, PRECISION,
        )  # fmt: skip
        c_r += tl.sum(entries, 0)
    m_k = o_k < frames
    o_row = o_stats + o_k * positions
    inverse = 1.0 / tl.maximum(c_r, c_floor)
    product_r = tl.load(p_product + o_row, mask=m_k, other=0.0)
    tl.store(p_inverse + o_row, inverse, mask=m_k)
    tl.store(p_dc + o_row, tl.where(c_r > c_floor, -product_r * inverse, 0.0), mask=m_k)


@triton.jit
def _d_entries(
    other, value, p_inverse, p_dc, o_stats, o_k, frames, positions, LAST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Gradients of entries of L: go . y in the last L-step, q . dq_r / max(c_r, c_floor) + dc in an earlier one."""
    product = tl.dot(other, tl.trans(value), input_precision=PRECISION)
    if LAST:
        return product
    else:  # the compiler would go on behind the branch, with pointers that are None
        inverse = tl.load(p_inverse + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
        dc = tl.load(p_dc + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
        return product * inverse[None, :] + dc[None, :]


@triton.jit
def l_rows_kernel(
    p_q, s_qb, s_qn, s_qh,
    p_rk, p_c, p_exact_lse, p_row_lse,
    p_value, p_go,  # LAST: RV and the output's gradient; else the gradient of the next R-step's queries
    p_inverse, p_dc,  # of l_sums_kernel, None with LAST
    p_row_delta,  # sums of L dL; read with LAST and HAS_EXACT, else written
    p_dq,
    p_exact_grad,
    qk_scale,
    frames, positions, heads, head_dim, band, width, first_row,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, MASK_D: tl.constexpr,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, LAST: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query frames' side of an L-step's backward, in tiles: row sums, then dq."""
    j = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < frames
    o_d = tl.arange(0, BLOCK_D)
    s_row = positions * heads * head_dim
    o_tokens = ((b * frames * positions + j) * heads + h) * head_dim
    o_stats = (b * heads + h) * frames * positions + j
    o_row = o_stats + o_l * positions
    q = load_rows(p_q + b * s_qb + h * s_qh + j * s_qn, o_l, s_qn * positions, o_d, frames, head_dim, True, MASK_D)
    if LAST:
        other = load_rows(p_go + o_tokens, o_l, s_row, o_d, frames, head_dim, True, MASK_D)
    else:
        other = q
    if LAST and HAS_EXACT:
        row_delta = tl.load(p_row_delta + o_row, mask=m_l, other=0.0)
    else:
        row_delta = tl.zeros([BLOCK_L], tl.float32)
        for k_first in range(0, frames, BLOCK_K):
            o_k = k_first + tl.arange(0, BLOCK_K)
            rk = load_rows(p_rk + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
            value = load_rows(p_value + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
            entries = _l_tile(
                q, rk, p_c, p_row_lse, o_stats, o_l, o_k, frames, positions, band, width, qk_scale, first_row,
                BANDED, FIRST_FRAME, PRECISION,
            )  # fmt: skip
            d_entries = _d_entries(
                other, value, p_inverse, p_dc, o_stats, o_k, frames, positions, LAST, PRECISION
            )  # fmt: skip
            row_delta += tl.sum(entries * d_entries, 1)
        tl.store(p_row_delta + o_row, row_delta, mask=m_l & (o_l >= first_row))
        if HAS_EXACT:
            exact = tl.load(p_exact_lse + o_row, mask=m_l, other=0.0) * LOG2E
            weight = tl.math.exp2(exact - tl.load(p_row_lse + o_row, mask=m_l, other=0.0))
            before = tl.load(p_exact_grad + o_row, mask=m_l, other=0.0)
            tl.store(p_exact_grad + o_row, before - weight * row_delta, mask=m_l)
    dq = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for k_first in range(0, frames, BLOCK_K):
        o_k = k_first + tl.arange(0, BLOCK_K)
        rk = load_rows(p_rk + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
        value = load_rows(p_value + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
        entries = _l_tile(
            q, rk, p_c, p_row_lse, o_stats, o_l, o_k, frames, positions, band, width, qk_scale, first_row,
            BANDED, FIRST_FRAME, PRECISION,
        )  # fmt: skip
        d_entries = _d_entries(
            other, value, p_inverse, p_dc, o_stats, o_k, frames, positions, LAST, PRECISION
        )  # fmt: skip
        dz = (entries * (d_entries - row_delta[:, None]) * qk_scale).to(q.dtype)
        dq = tl.dot(dz, rk, dq, input_precision=PRECISION)
        if not LAST:
            inverse = tl.load(p_inverse + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
            dq = tl.dot((entries * inverse[None, :]).to(q.dtype), value, dq, input_precision=PRECISION)
    _add_rows(p_dq + o_tokens, o_l, s_row, o_d, dq, frames, head_dim, MASK_D, ADD)


@triton.jit
def l_columns_kernel(
    p_q, s_qb, s_qn, s_qh,
    p_q_r, s_rb, s_rn, s_rh,
    p_rk, p_c, p_row_lse,
    p_value, p_go, p_inverse, p_dc, p_row_delta,  # as l_rows_kernel's
    p_gk, p_gv, p_lse, p_delta, p_w,  # as l_backward_kernel's
    qk_scale,
    frames, positions, heads, head_dim, band, width, first_row,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, MASK_D: tl.constexpr,
    BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key frames' side of an L-step's backward, in tiles: what the R-step's backward takes."""
    j = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    s_row = positions * heads * head_dim
    o_tokens = ((b * frames * positions + j) * heads + h) * head_dim
    o_stats = (b * heads + h) * frames * positions + j
    p_q += b * s_qb + h * s_qh + j * s_qn
    p_q_r += b * s_rb + h * s_rh + j * s_rn
    rk = load_rows(p_rk + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
    value = load_rows(p_value + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
    sums = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    gv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    w = tl.zeros([BLOCK_K], tl.float32)
    for l_first in range(0, frames, BLOCK_L):
        o_l = l_first + tl.arange(0, BLOCK_L)
        q = load_rows(p_q, o_l, s_qn * positions, o_d, frames, head_dim, True, MASK_D)
        if LAST:
            other = load_rows(p_go + o_tokens, o_l, s_row, o_d, frames, head_dim, True, MASK_D)
        else:
            other = q
        entries = _l_tile(
            q, rk, p_c, p_row_lse, o_stats, o_l, o_k, frames, positions, band, width, qk_scale, first_row,
            BANDED, FIRST_FRAME, PRECISION,
        )  # fmt: skip
        d_entries = _d_entries(
            other, value, p_inverse, p_dc, o_stats, o_k, frames, positions, LAST, PRECISION
        )  # fmt: skip
        row_delta = tl.load(p_row_delta + o_stats + o_l * positions, mask=o_l < frames, other=0.0)
        dz = (entries * (d_entries - row_delta[:, None])).to(q.dtype)
        w += tl.sum(dz.to(tl.float32), 0)
        sums = tl.dot(tl.trans(dz), q, sums, input_precision=PRECISION)
        if LAST:
            gv = tl.dot(tl.trans(entries).to(q.dtype), other, gv, input_precision=PRECISION)
    delta = tl.zeros([BLOCK_K], tl.float32)
    if LAST:
        rounded = gv.to(p_gv.dtype.element_ty)
        store_rows(p_gv + o_tokens, o_k, s_row, o_d, rounded, frames, head_dim, MASK_D)
        delta = _row_products(rounded, value)
    o_row = o_stats + o_k * positions
    c_l = tl.load(p_c + o_row, mask=o_k < frames, other=0.0)
    q_r = load_rows(p_q_r, o_k, s_rn * positions, o_d, frames, head_dim, True, MASK_D)
    _store_r_gradients(
        sums, w, q_r, rk, c_l, p_gk + o_tokens, p_lse, p_delta, p_w, o_k, o_row, o_d, s_row,
        frames, head_dim, qk_scale, delta, MASK_D,
    )  # fmt: skip


@triton.jit
def warm_backward_kernel(
    p_l, l_row_eighth,  # L (B, P, H, T, T) of an earlier call, rows 8 * l_row_eighth apart
    p_dq_r, p_dq,  # (B, T, P, H, D): gradient of the first R-step's queries; what of it belongs to q is added
    c_floor,
    frames, positions, heads, head_dim,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, MASK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through a warm start: dq[l] += sum_k L[l, k] dq_r[k] / max(sum_l L[l, k], c_floor)."""
    j = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    s_row = positions * heads * head_dim
    s_l = l_row_eighth * 8
    o_tokens = ((b * frames * positions + j) * heads + h) * head_dim
    p_l += ((b * positions + j) * heads + h) * frames * s_l
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for k_first in range(0, frames, BLOCK_K):
        o_k = k_first + tl.arange(0, BLOCK_K)
        c_r = tl.zeros([BLOCK_K], tl.float32)
        for first in range(0, frames, BLOCK_L):
            rows = load_rows(p_l, first + tl.arange(0, BLOCK_L), s_l, o_k, frames, s_l, True, True)
            c_r += tl.sum(from_8bit(rows), 0)
        entries = from_8bit(load_rows(p_l, o_l, s_l, o_k, frames, s_l, True, True))
        dq_r = load_rows(p_dq_r + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
        weights = (entries / tl.maximum(c_r, c_floor)[None, :]).to(dq_r.dtype)
        acc = tl.dot(weights, dq_r, acc, input_precision=PRECISION)
    _add_rows(p_dq + o_tokens, o_l, s_row, o_d, acc, frames, head_dim, MASK_D, True)


@triton.jit
def row_delta_kernel(
    p_o, p_go, s_b, s_n, s_h,  # output and its gradient, (B, M, H, D), contiguous alike
    p_residual, p_residual_scale,  # e4m3, or its bytes, (B, M, H, D) times float32 (B, P, H, T), taken off the output
    p_delta, s_db, s_dh,  # (B, H, M) float32
    rows, positions, heads, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Products of the output's rows with their gradients."""
    o_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    offset = b * s_b + h * s_h
    o = load_rows(p_o + offset, o_n, s_n, o_d, rows, head_dim, True, True).to(tl.float32)
    go = load_rows(p_go + offset, o_n, s_n, o_d, rows, head_dim, True, True).to(tl.float32)
    if HAS_RESIDUAL:
        frames = rows // positions
        residual = from_8bit(load_rows(p_residual + offset, o_n, s_n, o_d, rows, head_dim, True, True))
        o_scale = ((b * positions + o_n % positions) * heads + h) * frames + o_n // positions
        o -= residual * tl.load(p_residual_scale + o_scale, mask=o_n < rows, other=0.0)[:, None]
    tl.store(p_delta + b * s_db + h * s_dh + o_n, tl.sum(o * go, 1), mask=o_n < rows)


@triton.jit
def extra_backward_kernel(
    p_extra, s_eb, s_en, s_eh,  # the extra part's output (B, N, H, D)
    p_extra_lse, s_lb, s_ln, s_lh,  # its natural log-sum-exp (B, N, H)
    p_go, p_row_lse, p_row_delta, p_early,  # output's gradient; of the rows, base-2; what earlier steps gave
    p_d_extra, p_d_lse,  # (B, N, H, D) and (B, N, H), contiguous
    rows, row_first, row_end, heads, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the extra part: with its weight A in the whole softmax, A go and A (go . out - delta)."""
    o_n = row_first + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < row_end
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    s_row = heads * head_dim
    o_head = (b * rows * heads + h) * head_dim
    o_stats = (b * heads + h) * rows + o_n
    extra = load_rows(p_extra + b * s_eb + h * s_eh, o_n, s_en, o_d, row_end, head_dim, True, True).to(tl.float32)
    go = load_rows(p_go + o_head, o_n, s_row, o_d, row_end, head_dim, True, True).to(tl.float32)
    lse = tl.load(p_extra_lse + b * s_lb + h * s_lh + o_n * s_ln, mask=m_n, other=0.0).to(tl.float32) * LOG2E
    weight = tl.math.exp2(lse - tl.load(p_row_lse + o_stats, mask=m_n, other=0.0))
    store_rows(p_d_extra + o_head, o_n, s_row, o_d, weight[:, None] * go, row_end, head_dim, True)
    delta = tl.load(p_row_delta + o_stats, mask=m_n, other=0.0)
    early = tl.load(p_early + o_stats, mask=m_n, other=0.0)
    d_lse = weight * (tl.sum(extra * go, 1) - delta) + early
    tl.store(p_d_lse + (b * rows + o_n) * heads + h, d_lse.to(p_d_lse.dtype.element_ty), mask=m_n)
