"""Triton kernel bodies; `launch.py` holds their grids, `../README.md` the derivation.

Names: p_ pointer, s_ stride, o_ offset, m_ mask. Every statistic is kept in base 2 inside a
kernel (exp2 is one instruction) and in base e in memory.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(p, o_row, s_row, o_d, row_end, d_end, MASK_ROWS: tl.constexpr, MASK_D: tl.constexpr):
    """[rows, BLOCK_D] from p + o_row * s_row; zero outside."""
    p_tile = p + o_row[:, None].to(tl.int64) * s_row + o_d[None, :]
    if MASK_ROWS and MASK_D:
        return tl.load(p_tile, mask=(o_row < row_end)[:, None] & (o_d < d_end)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(p_tile, mask=(o_row < row_end)[:, None], other=0.0)
    elif MASK_D:
        return tl.load(p_tile, mask=(o_d < d_end)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def _key_range(part, frames, positions, first_query_frame, band, width, split_keys, SPLIT: tl.constexpr):
    """First key token and end of a program's window: the clamped band of a query frame, or a split of frame 0's."""
    if SPLIT:
        key_first = part * split_keys
        key_end = tl.minimum(key_first + split_keys, width * positions)
    else:
        key_first = tl.minimum(tl.maximum(part + first_query_frame - band, 0), frames - width) * positions
        key_end = key_first + width * positions
    return key_first, key_end


@triton.jit
def _store_output(p_o, s_op, acc, total, o_j, o_d, positions, head_dim):
    """Normalised rows of an attention, to p_o + o_j * s_op."""
    m_tile = (o_j < positions)[:, None] & (o_d < head_dim)[None, :]
    o = (acc * (1.0 / total)[:, None]).to(p_o.dtype.element_ty)
    tl.store(p_o + o_j[:, None].to(tl.int64) * s_op + o_d[None, :], o, mask=m_tile)


@triton.jit
def _store_r_step(
    p_q, s_qp, acc, total, lse, p_rk, p_c, b, h, frame, o_j, o_d,
    qk_scale, frames, positions, heads, head_dim,
):  # fmt: skip
    """R K and c_l of a block of rows; p_q points at the frame's queries."""
    m_j = o_j < positions
    m_tile = m_j[:, None] & (o_d < head_dim)[None, :]
    rk = (acc * (1.0 / total)[:, None]).to(p_rk.dtype.element_ty)
    row = ((b * frames + frame) * positions + o_j) * heads + h
    tl.store(p_rk + row[:, None] * head_dim + o_d[None, :], rk, mask=m_tile)
    # The queries are read again: kept in registers through the loop they would spill its sums.
    q = tl.load(p_q + o_j[:, None].to(tl.int64) * s_qp + o_d[None, :], mask=m_tile, other=0.0, volatile=True)
    # From the rounded RK, the very values that the L-step multiplies, so that their rounding
    # cancels in its logits.
    c_l = tl.sum(q.to(tl.float32) * rk.to(tl.float32), 1) * qk_scale - lse
    tl.store(p_c + ((b * heads + h) * frames + frame) * positions + o_j, c_l, mask=m_j)


@triton.jit
def attend_kernel(
    p_q, s_qb, s_qt, s_qp, s_qh,  # queries (B, T, P, H, D)
    p_k, s_kb, s_kn, s_kh,  # keys (B, N, H, D)
    p_v, s_vb, s_vn, s_vh,  # values (B, N, H, D)
    p_rk, p_c,  # RK (B, T, P, H, D); c_l = sum R log R (B, H, T, P) float32
    p_o, s_ob, s_ot, s_op, s_oh,  # out (B, T, P, H, D), or float32 partials with s_ot per split
    p_lse, s_lb, s_lh, s_lt,  # log-sum-exp (B, H, T, P) float32, or per split
    qk_scale,
    frames, positions, heads, head_dim,
    first_query_frame, band, width, split_keys,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_D: tl.constexpr, EVEN_KEYS: tl.constexpr,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, WITH_LSE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of a block of one frame's queries over a window of key frames.

    The R-step (window: the own frame, WITH_K), the exact band and the first frame (WITH_V,
    WITH_LSE) are this one loop; SPLIT divides the window's keys over programs.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)  # query frame, or key split of frame 0
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = (tl.program_id(2) % heads).to(tl.int64)

    key_first, key_end = _key_range(part, frames, positions, first_query_frame, band, width, split_keys, SPLIT)
    frame = 0 if SPLIT else part + first_query_frame

    o_j = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    p_q += b * s_qb + h * s_qh
    if not SPLIT:
        p_q += frame.to(tl.int64) * s_qt
    q = _load_rows(p_q, o_j, s_qp, o_d, positions, head_dim, True, MASK_D)
    p_k += b * s_kb + h * s_kh
    p_v += b * s_vb + h * s_vh

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if WITH_K:
        acc_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WITH_V:
        acc_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    scale2 = qk_scale * LOG2E
    if EVEN_KEYS:
        full_end = key_end
    else:
        full_end = key_first + (key_end - key_first) // BLOCK_N * BLOCK_N
    for start in tl.range(key_first, full_end, BLOCK_N, num_stages=STAGES):
        o_key = start + tl.arange(0, BLOCK_N)
        keys = _load_rows(p_k, o_key, s_kn, o_d, key_end, head_dim, False, MASK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(scores, 1) * scale2)
        weights = tl.math.exp2(scores * scale2 - new_top[:, None])
        decay = tl.math.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        weights = weights.to(keys.dtype)
        if WITH_K:
            acc_k = tl.dot(weights, keys, acc_k * decay[:, None], input_precision=PRECISION)
        if WITH_V:
            values = _load_rows(p_v, o_key, s_vn, o_d, key_end, head_dim, False, MASK_D)
            acc_v = tl.dot(weights, values, acc_v * decay[:, None], input_precision=PRECISION)
    if not EVEN_KEYS:
        o_key = full_end + tl.arange(0, BLOCK_N)
        keys = _load_rows(p_k, o_key, s_kn, o_d, key_end, head_dim, True, MASK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale2
        scores = tl.where((o_key < key_end)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_top[:, None])
        decay = tl.math.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        weights = weights.to(keys.dtype)
        if WITH_K:
            acc_k = tl.dot(weights, keys, acc_k * decay[:, None], input_precision=PRECISION)
        if WITH_V:
            values = _load_rows(p_v, o_key, s_vn, o_d, key_end, head_dim, True, MASK_D)
            acc_v = tl.dot(weights, values, acc_v * decay[:, None], input_precision=PRECISION)

    lse = (top + tl.math.log2(total)) * LN2
    if WITH_K:
        _store_r_step(
            p_q, s_qp, acc_k, total, lse, p_rk, p_c, b, h, frame, o_j, o_d,
            qk_scale, frames, positions, heads, head_dim,
        )  # fmt: skip
    if WITH_V:
        p_o += b * s_ob + (part + first_query_frame).to(tl.int64) * s_ot + h * s_oh
        _store_output(p_o, s_op, acc_v, total, o_j, o_d, positions, head_dim)
    if WITH_LSE:
        p_lse += b * s_lb + h * s_lh + (part + first_query_frame).to(tl.int64) * s_lt
        tl.store(p_lse + o_j, lse, mask=o_j < positions)


@triton.jit
def merge_splits_kernel(
    p_part, p_part_lse,  # float32 (S, B, H, P, D) and (S, B, H, P)
    p_o, s_ob, s_op, s_oh,  # frame 0 of the output
    p_lse, s_lb, s_lh,  # frame 0 of the log-sum-exp
    batch, positions, heads, head_dim, splits,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Combine the key splits of the first frame by their log-sum-exps."""
    o_j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    m_j = o_j < positions
    m_tile = m_j[:, None] & (o_d < head_dim)[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(splits):
        row = (split * batch * heads + bh) * positions + o_j
        lse = tl.load(p_part_lse + row, mask=m_j, other=0.0) * LOG2E
        part = tl.load(p_part + row[:, None] * head_dim + o_d[None, :], mask=m_tile, other=0.0)
        new_top = tl.maximum(top, lse)
        decay, weight = tl.math.exp2(top - new_top), tl.math.exp2(lse - new_top)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        top = new_top
    o = (acc / total[:, None]).to(p_o.dtype.element_ty)
    p_o += b * s_ob + h * s_oh
    tl.store(p_o + o_j[:, None].to(tl.int64) * s_op + o_d[None, :], o, mask=m_tile)
    if WITH_LSE:
        lse = (top + tl.math.log2(total)) * LN2
        tl.store(p_lse + b * s_lb + h * s_lh + o_j, lse, mask=m_j)


@triton.jit
def _exact_mask(o_l, o_k, frames, band, width, FIRST_FRAME: tl.constexpr):
    """[l, k] bool: key frames that a query frame sees exactly (structure.exact_pairs)."""
    start = tl.minimum(tl.maximum(o_l - band, 0), frames - width)
    inside = (o_k[None, :] >= start[:, None]) & (o_k[None, :] < (start + width)[:, None])
    if FIRST_FRAME:
        inside = inside | (o_l == 0)[:, None]
    return inside


@triton.jit
def _l_logits(
    q, rk, c_l, o_l, o_k, frames, band, width, qk_scale,
    BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 L logits [BLOCK_L, BLOCK_K]: s q RK - c_l, minus infinity for exact pairs."""
    logits = tl.dot(q, tl.trans(rk), input_precision=PRECISION) * qk_scale - c_l[None, :]
    valid = (o_k < frames)[None, :]
    if BANDED:
        valid = valid & ~_exact_mask(o_l, o_k, frames, band, width, FIRST_FRAME)
    return tl.where(valid, logits * LOG2E, float("-inf"))


@triton.jit
def _l_output_tile(
    q, p_rk, p_c, p_y, b, j, h, o_l, k_first, o_d, top, total, acc, qk_scale,
    frames, positions, heads, head_dim, band, width,
    BLOCK_K: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of an L row over the key frames from k_first on: new top, total, sum and the tile's logits."""
    o_k = k_first + tl.arange(0, BLOCK_K)
    m_k = (o_k < frames)[:, None] & (o_d < head_dim)[None, :]
    o_row = (((b * frames + o_k) * positions + j) * heads + h)[:, None] * head_dim + o_d[None, :]
    rk = tl.load(p_rk + o_row, mask=m_k, other=0.0)
    y = tl.load(p_y + o_row, mask=m_k, other=0.0)
    c_l = tl.load(p_c + ((b * heads + h) * frames + o_k) * positions + j, mask=o_k < frames, other=0.0)
    logits = _l_logits(q, rk, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME, PRECISION)
    new_top = tl.maximum(top, tl.max(logits, 1))
    decay = tl.math.exp2(top - new_top)
    weights = tl.math.exp2(logits - new_top[:, None])
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(y.dtype), y, acc * decay[:, None], input_precision=PRECISION)
    return new_top, total, acc, logits


@triton.jit
def _store_l(p_l, logits, top, total, o_l, o_k, frames):
    """Normalised entries of L to the (T, T) matrix at p_l."""
    entries = (tl.math.exp2(logits - top[:, None]) / total[:, None]).to(p_l.dtype.element_ty)
    m_lk = (o_l < frames)[:, None] & (o_k < frames)[None, :]
    tl.store(p_l + o_l[:, None] * frames + o_k[None, :], entries, mask=m_lk)


@triton.jit
def l_output_kernel(
    p_q, s_qb, s_qt, s_qp, s_qh,  # queries (B, T, P, H, D)
    p_rk, p_c, p_y,  # RK and RV (B, T, P, H, D), c_l (B, H, T, P)
    p_exact, p_exact_lse,  # exact part (B, T, P, H, D) and its log-sum-exp (B, H, T, P)
    p_o,  # out (B, T, P, H, D)
    p_l,  # L (B, P, H, T, T)
    p_residual, p_residual_scale,  # what is added: e4m3 (B, T, P, H, D) times float32 (B, H, T)
    qk_scale,
    frames, positions, heads, head_dim, band, width, first_row,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, STORE_L: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Last L-step: o[l, j] = sum_k L y[k, j], the exact part being one more entry of the softmax.

    One program: one head, STRIP positions after one another, BLOCK_L query frames; key frames in tiles of BLOCK_K.
    The work is small beside the memory it reads, so the next position's tiles (or, with several, the next key
    frames') are fetched during this one's. Rows before ``first_row`` are not written (another kernel owns them).
    """
    j_first = (tl.program_id(0) // heads) * STRIP
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    m_l = (o_l < frames)[:, None] & (o_d < head_dim)[None, :]
    p_q += b * s_qb + h * s_qh

    for j_now in tl.range(j_first, tl.minimum(j_first + STRIP, positions), num_stages=STAGES if ONE_TILE else 1):
        j = tl.cast(j_now, tl.int64)
        q = tl.load(p_q + j * s_qp + o_l[:, None].to(tl.int64) * s_qt + o_d[None, :], mask=m_l, other=0.0)
        row_l = ((b * frames + o_l) * positions + j) * heads + h
        if HAS_EXACT:
            stat_l = ((b * heads + h) * frames + o_l) * positions + j
            top = tl.load(p_exact_lse + stat_l, mask=o_l < frames, other=0.0) * LOG2E
            total = tl.full([BLOCK_L], 1.0, tl.float32)
            acc = tl.load(p_exact + row_l[:, None] * head_dim + o_d[None, :], mask=m_l, other=0.0)
            acc = acc.to(tl.float32)
        else:
            top = tl.full([BLOCK_L], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_L], tl.float32)
            acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        p_l_j = p_l + ((b * positions + j) * heads + h) * frames * frames
        if ONE_TILE:
            top, total, acc, logits = _l_output_tile(
                q, p_rk, p_c, p_y, b, j, h, o_l, 0, o_d, top, total, acc, qk_scale,
                frames, positions, heads, head_dim, band, width, BLOCK_K, BANDED, FIRST_FRAME, PRECISION,
            )  # fmt: skip
            if STORE_L:
                _store_l(p_l_j, logits, top, total, o_l, tl.arange(0, BLOCK_K), frames)
        else:
            for k_first in tl.range(0, frames, BLOCK_K, num_stages=STAGES):
                top, total, acc, logits = _l_output_tile(
                    q, p_rk, p_c, p_y, b, j, h, o_l, k_first, o_d, top, total, acc, qk_scale,
                    frames, positions, heads, head_dim, band, width, BLOCK_K, BANDED, FIRST_FRAME, PRECISION,
                )  # fmt: skip
            if STORE_L:
                for k_first in range(0, frames, BLOCK_K):
                    o_k = k_first + tl.arange(0, BLOCK_K)
                    m_k = (o_k < frames)[:, None] & (o_d < head_dim)[None, :]
                    row_k = ((b * frames + o_k) * positions + j) * heads + h
                    rk = tl.load(p_rk + row_k[:, None] * head_dim + o_d[None, :], mask=m_k, other=0.0)
                    stat_k = ((b * heads + h) * frames + o_k) * positions + j
                    c_l = tl.load(p_c + stat_k, mask=o_k < frames, other=0.0)
                    logits = _l_logits(
                        q, rk, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME, PRECISION
                    )  # fmt: skip
                    _store_l(p_l_j, logits, top, total, o_l, o_k, frames)
        o = acc / total[:, None]
        if HAS_RESIDUAL:
            residual = tl.load(p_residual + row_l[:, None] * head_dim + o_d[None, :], mask=m_l, other=0.0)
            scale = tl.load(p_residual_scale + (b * heads + h) * frames + o_l, mask=o_l < frames, other=0.0)
            o += residual.to(tl.float32) * scale[:, None]
        o = o.to(p_o.dtype.element_ty)
        tl.store(p_o + row_l[:, None] * head_dim + o_d[None, :], o, mask=m_l & (o_l >= first_row)[:, None])


@triton.jit
def l_lse_kernel(
    p_q, s_qb, s_qt, s_qp, s_qh,
    p_rk, p_c, p_exact_lse,
    p_row_lse,  # base-2 log-sum-exp of every L row (B, H, T, P) float32
    qk_scale,
    frames, positions, heads, head_dim, band, width,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Normalisers of L, needed apart when the key frames do not fit one tile."""
    j = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < head_dim)[None, :]
    m_l = (o_l < frames)[:, None] & m_d
    p_q += b * s_qb + j * s_qp + h * s_qh
    q = tl.load(p_q + o_l[:, None].to(tl.int64) * s_qt + o_d[None, :], mask=m_l, other=0.0)
    stat_l = ((b * heads + h) * frames + o_l) * positions + j
    if HAS_EXACT:
        top = tl.load(p_exact_lse + stat_l, mask=o_l < frames, other=0.0) * LOG2E
        total = tl.full([BLOCK_L], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_L], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_L], tl.float32)
    for k_first in range(0, frames, BLOCK_K):
        o_k = k_first + tl.arange(0, BLOCK_K)
        m_k = (o_k < frames)[:, None] & m_d
        row_k = ((b * frames + o_k) * positions + j) * heads + h
        stat_k = ((b * heads + h) * frames + o_k) * positions + j
        rk = tl.load(p_rk + row_k[:, None] * head_dim + o_d[None, :], mask=m_k, other=0.0)
        c_l = tl.load(p_c + stat_k, mask=o_k < frames, other=0.0)
        logits = _l_logits(q, rk, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME, PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.math.exp2(top - new_top)
        total += tl.sum(tl.math.exp2(logits - new_top[:, None]), 1)
        top = new_top
    tl.store(p_row_lse + stat_l, top + tl.math.log2(total), mask=o_l < frames)


@triton.jit
def _l_entries(
    q, rk, c_l, p_exact_lse, p_row_lse, stat_l, o_l, o_k, frames, band, width, qk_scale,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Normalised entries of L [BLOCK_L, BLOCK_K]: whole rows as they are, parts of rows by their log-sum-exps."""
    logits = _l_logits(q, rk, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME, PRECISION)
    if not WHOLE_ROWS:
        row_lse = tl.load(p_row_lse + stat_l, mask=o_l < frames, other=0.0)
        return tl.math.exp2(logits - row_lse[:, None])
    elif HAS_EXACT:
        exact = tl.load(p_exact_lse + stat_l, mask=o_l < frames, other=0.0) * LOG2E
        top = tl.maximum(tl.max(logits, 1), exact)
        entries = tl.math.exp2(logits - top[:, None])
        return entries / (tl.sum(entries, 1) + tl.math.exp2(exact - top))[:, None]
    else:
        entries = tl.math.exp2(logits - tl.max(logits, 1)[:, None])
        return entries / tl.sum(entries, 1)[:, None]


@triton.jit
def _beta_tile(
    p_q, s_qt, rk, c_l, p_exact_lse, p_row_lse, p_l, b, j, h, l_first, o_k, o_d, acc, c_r, qk_scale,
    frames, positions, heads, head_dim, band, width,
    BLOCK_L: tl.constexpr, HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr,
    FROM_L: tl.constexpr, WHOLE_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the query frames from l_first on to the sums of L q and of L."""
    o_l = l_first + tl.arange(0, BLOCK_L)
    m_l = (o_l < frames)[:, None] & (o_d < head_dim)[None, :]
    q = tl.load(p_q + o_l[:, None].to(tl.int64) * s_qt + o_d[None, :], mask=m_l, other=0.0)
    if FROM_L:
        m_lk = (o_l < frames)[:, None] & (o_k < frames)[None, :]
        entries = tl.load(p_l + o_l[:, None] * frames + o_k[None, :], mask=m_lk, other=0.0).to(tl.float32)
    else:
        entries = _l_entries(
            q, rk, c_l, p_exact_lse, p_row_lse, ((b * heads + h) * frames + o_l) * positions + j,
            o_l, o_k, frames, band, width, qk_scale, HAS_EXACT, BANDED, FIRST_FRAME, WHOLE_ROWS, PRECISION,
        )  # fmt: skip
    entries = tl.where((o_l < frames)[:, None], entries, 0.0)
    acc = tl.dot(tl.trans(entries).to(q.dtype), q, acc, input_precision=PRECISION)
    return acc, c_r + tl.sum(entries, 0)


@triton.jit
def next_beta_kernel(
    p_q, s_qb, s_qt, s_qp, s_qh,  # queries (B, T, P, H, D)
    p_rk, p_c, p_exact_lse, p_row_lse,  # of the L-step; unused with FROM_L
    p_l,  # L (B, P, H, T, T) of an earlier call; unused without FROM_L
    p_beta,  # (B, T, P, H, D)
    qk_scale, c_floor,
    frames, positions, heads, head_dim, band, width,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, FROM_L: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """beta[k, j] = sum_l L q[l, j] / max(sum_l L, c_floor), from an L-step or from a stored L.

    One program: one head, STRIP positions after one another, BLOCK_K key frames; query frames in tiles of BLOCK_L.
    With WHOLE_ROWS all key frames are in the tile and the rows of L are normalised here; with ONE_TILE all query frames
    are, too.
    """
    j_first = (tl.program_id(0) // heads) * STRIP
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    m_k = (o_k < frames)[:, None] & (o_d < head_dim)[None, :]
    p_q += b * s_qb + h * s_qh

    for j_now in tl.range(j_first, tl.minimum(j_first + STRIP, positions), num_stages=STAGES if ONE_TILE else 1):
        j = tl.cast(j_now, tl.int64)
        o_row = (((b * frames + o_k) * positions + j) * heads + h)[:, None] * head_dim + o_d[None, :]
        if FROM_L:
            rk = 0.0
            c_l = 0.0
        else:
            rk = tl.load(p_rk + o_row, mask=m_k, other=0.0)
            c_l = tl.load(p_c + ((b * heads + h) * frames + o_k) * positions + j, mask=o_k < frames, other=0.0)
        p_q_j = p_q + j * s_qp
        p_l_j = p_l + ((b * positions + j) * heads + h) * frames * frames
        acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        c_r = tl.zeros([BLOCK_K], tl.float32)
        if ONE_TILE:
            acc, c_r = _beta_tile(
                p_q_j, s_qt, rk, c_l, p_exact_lse, p_row_lse, p_l_j, b, j, h, 0, o_k, o_d, acc, c_r, qk_scale,
                frames, positions, heads, head_dim, band, width,
                BLOCK_L, HAS_EXACT, BANDED, FIRST_FRAME, FROM_L, WHOLE_ROWS, PRECISION,
            )  # fmt: skip
        else:
            for l_first in tl.range(0, frames, BLOCK_L, num_stages=STAGES):
                acc, c_r = _beta_tile(
                    p_q_j, s_qt, rk, c_l, p_exact_lse, p_row_lse, p_l_j, b, j, h, l_first, o_k, o_d, acc, c_r, qk_scale,
                    frames, positions, heads, head_dim, band, width,
                    BLOCK_L, HAS_EXACT, BANDED, FIRST_FRAME, FROM_L, WHOLE_ROWS, PRECISION,
                )  # fmt: skip
        beta = (acc / tl.maximum(c_r, c_floor)[:, None]).to(p_beta.dtype.element_ty)
        tl.store(p_beta + o_row, beta, mask=m_k)
