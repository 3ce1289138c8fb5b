"""Triton kernel bodies; `launch.py` holds their grids, `../README.md` the derivation.

Names: p_ pointer, s_ stride, o_ offset, m_ mask. Every statistic is kept in base 2 inside a
kernel (exp2 is one instruction) and in base e in memory.
"""

import triton
import triton.language as tl

from vmonarch_kernels import structure

L_SCALE = tl.constexpr(structure.L_SCALE)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def from_8bit(x):
    """float32 of e4m3, or of its bytes (uint8) where the chip does not convert it.

    Exponent and mantissa are float16's in other places: shifted there they are the value over 2 ** 8, subnormals too.
    """
    if x.dtype == tl.uint8:
        # The sign comes along twice, and the second one is masked out.
        bits = (x.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where(tl.abs(value) == 480.0, float("nan"), value)
    else:
        return x.to(tl.float32)


@triton.jit
def to_8bit(x, dtype: tl.constexpr):
    """The nearest e4m3 of float32, of two the even one, and 448 beyond it; its bytes where ``dtype`` is uint8."""
    if dtype == tl.uint8:
        bits = x.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        bits &= 0x7FFFFFFF
        # The exponent's offset is 120 less, and 20 bits of the mantissa are rounded off.
        normal = (bits + (0x7FFFF + ((bits >> 20) & 1)) - (120 << 23)) >> 20
        # Below 2 ** -6 an entry is a multiple of 2 ** -9, as the last bit of a float32 next to 2 ** 14.
        small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0x7F
        code = tl.where(bits < (121 << 23), small, tl.minimum(normal, 0x7E))
        return (sign | tl.where(bits > 0x7F800000, 0x7F, code)).to(tl.uint8)
    else:
        return x.to(dtype)


@triton.jit
def load_rows(p, o_row, s_row, o_d, row_end, d_end, MASK_ROWS: tl.constexpr, MASK_D: tl.constexpr):
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
def store_rows(p, o_row, s_row, o_d, rows, row_end, d_end, MASK_D: tl.constexpr):
    """[rows, BLOCK_D] to p + o_row * s_row, as far as row_end."""
    p_tile = p + o_row[:, None].to(tl.int64) * s_row + o_d[None, :]
    if MASK_D:
        tl.store(p_tile, rows.to(p.dtype.element_ty), mask=(o_row < row_end)[:, None] & (o_d < d_end)[None, :])
    else:
        tl.store(p_tile, rows.to(p.dtype.element_ty), mask=(o_row < row_end)[:, None])


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
    q = load_rows(p_q, o_j, s_qp, o_d, positions, head_dim, True, MASK_D)
    p_k += b * s_kb + h * s_kh
    p_v += b * s_vb + h * s_vh

    scale2 = qk_scale * LOG2E
    if EVEN_KEYS:
        full_end = key_end
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if WITH_K:
            acc_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if WITH_V:
            acc_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        # The partial tile, which has at least one key, comes first: behind the loop it would need registers that the
        # loop has not, and spill the sums.
        full_end = key_first + (key_end - key_first - 1) // BLOCK_N * BLOCK_N
        o_key = full_end + tl.arange(0, BLOCK_N)
        keys = load_rows(p_k, o_key, s_kn, o_d, key_end, head_dim, True, MASK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale2
        scores = tl.where((o_key < key_end)[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        weights = tl.math.exp2(scores - top[:, None])
        total = tl.sum(weights, 1)
        weights = weights.to(keys.dtype)
        if WITH_K:
            acc_k = tl.dot(weights, keys, input_precision=PRECISION)
        if WITH_V:
            values = load_rows(p_v, o_key, s_vn, o_d, key_end, head_dim, True, MASK_D)
            acc_v = tl.dot(weights, values, input_precision=PRECISION)
    for start in tl.range(key_first, full_end, BLOCK_N, num_stages=STAGES):
        o_key = start + tl.arange(0, BLOCK_N)
        keys = load_rows(p_k, o_key, s_kn, o_d, key_end, head_dim, False, MASK_D)
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
            values = load_rows(p_v, o_key, s_vn, o_d, key_end, head_dim, False, MASK_D)
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
def _keep_change(
    p_values, p_scale, change, share, frame, b, h, o_j, o_d, frames, positions, heads, head_dim,
    BLEND: tl.constexpr,
):  # fmt: skip
    """Make a frame's residual `change` [rows, BLOCK_D], or with BLEND a `share` of it and the rest what it was.

    Every row is scaled to the range of 8 bits by its largest entry.
    """
    m_j = o_j < positions
    m_tile = m_j[:, None] & (o_d < head_dim)[None, :]
    p_tile = p_values + (((b * frames + frame) * positions + o_j) * heads + h)[:, None] * head_dim + o_d[None, :]
    p_row = p_scale + ((b * positions + o_j) * heads + h) * frames + frame
    if BLEND:
        scale = tl.load(p_row, mask=m_j, other=0.0)
        before = from_8bit(tl.load(p_tile, mask=m_tile, other=0.0)) * scale[:, None]
        change = share * change + (1.0 - share) * before
    change = tl.where(m_tile, change, 0.0)
    scale = tl.maximum(tl.max(tl.abs(change), 1), 1e-30) / 448.0
    tl.store(p_tile, to_8bit(change / scale[:, None], p_values.dtype.element_ty), mask=m_tile)
    tl.store(p_row, scale, mask=m_j)


@triton.jit(do_not_specialize=["frame", "blend_before", "blend_after"])  # they change from call to call
def merge_splits_kernel(
    p_part, p_part_lse,  # float32 (S, B, H, P, D) and (S, B, H, P)
    p_extra, p_extra_lse,  # one more part: (B, T, P, H, D) and (B, H, T, P)
    p_o, s_ob, s_op, s_oh,  # the frame's output
    p_lse, s_lb, s_lh,  # the frame's log-sum-exp
    p_values, p_scale,  # residual: e4m3, or its bytes, (B, T, P, H, D) times float32 (B, P, H, T)
    share, blend_before, blend_after,
    p_turn, s_ot,  # int32: which frame, and whether its neighbours get a share; p_o is then frame 0's
    batch, frames, frame, positions, heads, head_dim, splits,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WITH_LSE: tl.constexpr, HAS_EXTRA: tl.constexpr, KEEP: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """Combine the key splits of one frame's exact attention by their log-sum-exps.

    With KEEP the change of the frame's output becomes its residual, and a ``share`` of it goes into its neighbours'
    (``blend_before``, ``blend_after``). With TURN memory says which frame that is, and a recorded launch serves all.
    """
    if TURN:
        frame, blend_before, blend_after = tl.load(p_turn), tl.load(p_turn + 1) != 0, tl.load(p_turn + 2) != 0
        p_o += frame.to(tl.int64) * s_ot
    o_j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    m_j = o_j < positions
    m_tile = m_j[:, None] & (o_d < head_dim)[None, :]
    if HAS_EXTRA:
        row = (bh * frames + frame) * positions + o_j
        top = tl.load(p_extra_lse + row, mask=m_j, other=0.0) * LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        row = ((b * frames + frame) * positions + o_j) * heads + h
        acc = tl.load(p_extra + row[:, None] * head_dim + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    else:
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
    o = acc / total[:, None]
    p_tile = p_o + b * s_ob + h * s_oh + o_j[:, None].to(tl.int64) * s_op + o_d[None, :]
    if KEEP:
        change = o - tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        _keep_change(
            p_values, p_scale, change, share, frame, b, h, o_j, o_d, frames, positions, heads, head_dim, False
        )  # fmt: skip
        if blend_before:
            _keep_change(
                p_values, p_scale, change, share, frame - 1, b, h, o_j, o_d, frames, positions, heads, head_dim, True
            )  # fmt: skip
        if blend_after:
            _keep_change(
                p_values, p_scale, change, share, frame + 1, b, h, o_j, o_d, frames, positions, heads, head_dim, True
            )  # fmt: skip
    tl.store(p_tile, o.to(p_o.dtype.element_ty), mask=m_tile)
    if WITH_LSE:
        lse = (top + tl.math.log2(total)) * LN2
        tl.store(p_lse + b * s_lb + h * s_lh + o_j, lse, mask=m_j)


@triton.jit
def merge_extra_kernel(
    p_o, s_ob, s_ot, s_op, s_oh,  # out (B, T, P, H, D) of the band, and of both afterwards
    p_lse,  # its log-sum-exp (B, H, T, P) float32, and that of both afterwards
    p_extra, s_eb, s_et, s_ep, s_eh,  # out (B, T, P, H, D) over the extra keys
    p_extra_lse,  # (B, H, T, P) float32
    frames, positions, heads, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Join the exact band with the attention over further keys, in place, by their log-sum-exps.

    Every query sees keys of the band, so that the sum is above zero where the extra part is empty.
    """
    o_j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    frame = tl.program_id(1).to(tl.int64)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    m_j = o_j < positions
    m_tile = m_j[:, None] & (o_d < head_dim)[None, :]
    row = (bh * frames + frame) * positions + o_j
    lse = tl.load(p_lse + row, mask=m_j, other=0.0)
    extra_lse = tl.load(p_extra_lse + row, mask=m_j, other=0.0)
    top = tl.maximum(lse, extra_lse)
    weight, extra_weight = tl.math.exp2((lse - top) * LOG2E), tl.math.exp2((extra_lse - top) * LOG2E)
    total = weight + extra_weight
    p_tile = p_o + b * s_ob + frame * s_ot + h * s_oh + o_j[:, None].to(tl.int64) * s_op + o_d[None, :]
    p_extra += b * s_eb + frame * s_et + h * s_eh
    o = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    extra = tl.load(p_extra + o_j[:, None].to(tl.int64) * s_ep + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    o = o * (weight / total)[:, None] + extra * (extra_weight / total)[:, None]
    tl.store(p_tile, o.to(p_o.dtype.element_ty), mask=m_tile)
    tl.store(p_lse + row, top + tl.math.log2(total) * LN2, mask=m_j)


@triton.jit
def _exact_mask(o_l, o_k, frames, band, width, FIRST_FRAME: tl.constexpr):
    """[l, k] bool: key frames that a query frame sees exactly (structure.exact_pairs)."""
    start = tl.minimum(tl.maximum(o_l - band, 0), frames - width)
    inside = (o_k[None, :] >= start[:, None]) & (o_k[None, :] < (start + width)[:, None])
    if FIRST_FRAME:
        inside = inside | (o_l == 0)[:, None]
    return inside


@triton.jit
def l_logits(
    product, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr
):  # fmt: skip
    """Base-2 L logits [BLOCK_L, BLOCK_K] of the product q RK: s q RK - c_l, minus infinity for exact pairs."""
    logits = product * qk_scale - c_l[None, :]
    valid = (o_k < frames)[None, :]
    if BANDED:
        valid = valid & ~_exact_mask(o_l, o_k, frames, band, width, FIRST_FRAME)
    return tl.where(valid, logits * LOG2E, float("-inf"))


@triton.jit
def _l_product(
    p_q, s_q, p_rk, s_row, o_l, o_k, frames, head_dim,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, MASK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q RK [BLOCK_L, BLOCK_K] of one position, PARTS slices of the head dimension after one another.

    Slices halve the registers of a tile, of which these kernels, with many tiles at a time, never have enough.
    """
    product = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    for part in tl.static_range(PARTS):
        o_d = part * (BLOCK_D // PARTS) + tl.arange(0, BLOCK_D // PARTS)
        q = load_rows(p_q, o_l, s_q, o_d, frames, head_dim, True, MASK_D)
        rk = load_rows(p_rk, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
        product = tl.dot(q, tl.trans(rk), product, input_precision=PRECISION)
    return product


@triton.jit
def _store_l(p_l, s_l, entries, o_l, o_k, frames):
    """Normalised entries of L, times L_SCALE, to rows of s_l bytes at p_l, zeros behind the last key frame."""
    m_lk = (o_l < frames)[:, None] & (o_k < s_l)[None, :]
    tl.store(p_l + o_l[:, None] * s_l + o_k[None, :], to_8bit(entries * L_SCALE, p_l.dtype.element_ty), mask=m_lk)


@triton.jit
def _finish_output(
    o, exact_weight, p_exact, p_residual, residual_scale, p_o, o_tokens, s_row, o_l, o_d, first_row, frames, head_dim,
    HAS_EXACT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    """Add the weighted exact part and the residual to the rows o (already normalised) and write them."""
    if HAS_EXACT:
        exact = load_rows(p_exact + o_tokens, o_l, s_row, o_d, frames, head_dim, True, MASK_D)
        o += exact_weight[:, None] * exact.to(tl.float32)
    if HAS_RESIDUAL:
        residual = load_rows(p_residual + o_tokens, o_l, s_row, o_d, frames, head_dim, True, MASK_D)
        o += residual_scale[:, None] * from_8bit(residual)
    # A row that another kernel owns is moved past the end.
    store_rows(p_o + o_tokens, tl.where(o_l >= first_row, o_l, frames), s_row, o_d, o, frames, head_dim, MASK_D)


@triton.jit
def l_output_kernel(
    p_q, s_qb, s_qt, s_qp, s_qh,  # queries (B, T, P, H, D)
    p_rk, p_c, p_y,  # RK and RV (B, T, P, H, D), c_l (B, H, T, P)
    p_exact, p_exact_lse,  # exact part (B, T, P, H, D) and its log-sum-exp (B, H, T, P)
    p_o,  # out (B, T, P, H, D)
    p_l, l_row_eighth,  # L, e4m3 or its bytes, (B, P, H, T, T), rows 8 * l_row_eighth entries apart
    p_residual, p_residual_scale,  # residual: e4m3, or its bytes, (B, T, P, H, D) times float32 (B, P, H, T)
    qk_scale,
    frames, positions, heads, head_dim, band, width, first_row,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    STRIP: tl.constexpr, STAGES: tl.constexpr, MASK_D: tl.constexpr,
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
    m_l = o_l < frames
    s_row = positions * heads * head_dim  # from frame to frame
    s_l = l_row_eighth * 8  # a visible multiple of 8 (cost.L_ROW_ENTRIES): the compiler writes eight bytes at a time
    p_q += b * s_qb + h * s_qh

    for j_now in tl.range(j_first, tl.minimum(j_first + STRIP, positions), num_stages=STAGES if ONE_TILE else 1):
        j = tl.cast(j_now, tl.int64)
        o_tokens = ((b * frames * positions + j) * heads + h) * head_dim
        o_stats = (b * heads + h) * frames * positions + j
        p_q_j = p_q + j * s_qp
        o_row = ((b * positions + j) * heads + h) * frames  # of L and of the residual's scales
        exact_top = tl.full([BLOCK_L], float("-inf"), tl.float32)
        if HAS_EXACT:
            exact_top = tl.load(p_exact_lse + o_stats + o_l * positions, mask=m_l, other=0.0) * LOG2E
        residual_scale = tl.zeros([BLOCK_L], tl.float32)
        if HAS_RESIDUAL:
            residual_scale = tl.load(p_residual_scale + o_row + o_l, mask=m_l, other=0.0)
        if ONE_TILE:
            o_k = tl.arange(0, BLOCK_K)
            product = _l_product(
                p_q_j, s_qt, p_rk + o_tokens, s_row, o_l, o_k, frames, head_dim,
                BLOCK_L, BLOCK_K, BLOCK_D, PARTS, MASK_D, PRECISION,
            )  # fmt: skip
            c_l = tl.load(p_c + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
            logits = l_logits(product, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME)
            top = tl.maximum(exact_top, tl.max(logits, 1))
            entries = tl.math.exp2(logits - top[:, None])
            exact_weight = tl.math.exp2(exact_top - top)
            inverse = 1.0 / (tl.sum(entries, 1) + exact_weight)
            entries *= inverse[:, None]
            if STORE_L:
                _store_l(p_l + o_row * s_l, s_l, entries, o_l, o_k, frames)
            weights = entries.to(p_y.dtype.element_ty)
            for part in tl.static_range(PARTS):
                o_d = part * (BLOCK_D // PARTS) + tl.arange(0, BLOCK_D // PARTS)
                y = load_rows(p_y + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
                o = tl.dot(weights, y, input_precision=PRECISION)
                _finish_output(
                    o, exact_weight * inverse, p_exact, p_residual, residual_scale, p_o, o_tokens, s_row,
                    o_l, o_d, first_row, frames, head_dim, HAS_EXACT, HAS_RESIDUAL, MASK_D,
                )  # fmt: skip
        else:
            o_d = tl.arange(0, BLOCK_D)
            top = exact_top
            total = tl.zeros([BLOCK_L], tl.float32)
            acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
            if HAS_EXACT:
                total += 1.0
            for k_first in tl.range(0, frames, BLOCK_K, num_stages=STAGES):
                o_k = k_first + tl.arange(0, BLOCK_K)
                product = _l_product(
                    p_q_j, s_qt, p_rk + o_tokens, s_row, o_l, o_k, frames, head_dim,
                    BLOCK_L, BLOCK_K, BLOCK_D, 1, MASK_D, PRECISION,
                )  # fmt: skip
                y = load_rows(p_y + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
                c_l = tl.load(p_c + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
                logits = l_logits(product, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME)
                new_top = tl.maximum(top, tl.max(logits, 1))
                decay = tl.math.exp2(top - new_top)
                entries = tl.math.exp2(logits - new_top[:, None])
                total = total * decay + tl.sum(entries, 1)
                acc = tl.dot(entries.to(y.dtype), y, acc * decay[:, None], input_precision=PRECISION)
                top = new_top
            inverse = 1.0 / total
            if STORE_L:
                for k_first in range(0, frames, BLOCK_K):
                    o_k = k_first + tl.arange(0, BLOCK_K)
                    product = _l_product(
                        p_q_j, s_qt, p_rk + o_tokens, s_row, o_l, o_k, frames, head_dim,
                        BLOCK_L, BLOCK_K, BLOCK_D, 1, MASK_D, PRECISION,
                    )  # fmt: skip
                    c_l = tl.load(p_c + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
                    logits = l_logits(product, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME)
                    entries = tl.math.exp2(logits - top[:, None]) * inverse[:, None]
                    _store_l(p_l + o_row * s_l, s_l, entries, o_l, o_k, frames)
            exact_weight = tl.math.exp2(exact_top - top) * inverse
            _finish_output(
                acc * inverse[:, None], exact_weight, p_exact, p_residual, residual_scale, p_o, o_tokens, s_row,
                o_l, o_d, first_row, frames, head_dim, HAS_EXACT, HAS_RESIDUAL, MASK_D,
            )  # fmt: skip


@triton.jit
def l_lse_kernel(
    p_q, s_qb, s_qt, s_qp, s_qh,
    p_rk, p_c, p_exact_lse,
    p_row_lse,  # base-2 log-sum-exp of every L row (B, H, T, P) float32
    qk_scale,
    frames, positions, heads, head_dim, band, width,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, MASK_D: tl.constexpr,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Normalisers of L, needed apart when the key frames do not fit one tile."""
    j = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    s_row = positions * heads * head_dim
    o_tokens = ((b * frames * positions + j) * heads + h) * head_dim
    o_stats = (b * heads + h) * frames * positions + j
    p_q += b * s_qb + j * s_qp + h * s_qh
    top = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    if HAS_EXACT:
        top = tl.load(p_exact_lse + o_stats + o_l * positions, mask=o_l < frames, other=0.0) * LOG2E
        total += 1.0
    for k_first in range(0, frames, BLOCK_K):
        o_k = k_first + tl.arange(0, BLOCK_K)
        product = _l_product(
            p_q, s_qt, p_rk + o_tokens, s_row, o_l, o_k, frames, head_dim,
            BLOCK_L, BLOCK_K, BLOCK_D, 1, MASK_D, PRECISION,
        )  # fmt: skip
        c_l = tl.load(p_c + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
        logits = l_logits(product, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME)
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.math.exp2(top - new_top)
        total += tl.sum(tl.math.exp2(logits - new_top[:, None]), 1)
        top = new_top
    tl.store(p_row_lse + o_stats + o_l * positions, top + tl.math.log2(total), mask=o_l < frames)


@triton.jit
def _l_entries(
    product, c_l, p_exact_lse, p_row_lse, o_stats, o_l, o_k, frames, positions, band, width, qk_scale,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Normalised entries of L [BLOCK_L, BLOCK_K]: whole rows as they are, parts of rows by their log-sum-exps."""
    logits = l_logits(product, c_l, o_l, o_k, frames, band, width, qk_scale, BANDED, FIRST_FRAME)
    if not WHOLE_ROWS:
        row_lse = tl.load(p_row_lse + o_stats + o_l * positions, mask=o_l < frames, other=0.0)
        return tl.math.exp2(logits - row_lse[:, None])
    elif HAS_EXACT:
        exact = tl.load(p_exact_lse + o_stats + o_l * positions, mask=o_l < frames, other=0.0) * LOG2E
        top = tl.maximum(tl.max(logits, 1), exact)
        entries = tl.math.exp2(logits - top[:, None])
        return entries / (tl.sum(entries, 1) + tl.math.exp2(exact - top))[:, None]
    else:
        entries = tl.math.exp2(logits - tl.max(logits, 1)[:, None])
        return entries / tl.sum(entries, 1)[:, None]


@triton.jit
def r_queries_kernel(
    p_q, s_qb, s_qt, s_qp, s_qh,  # queries (B, T, P, H, D)
    p_rk, p_c, p_exact_lse, p_row_lse,  # of the L-step; None with FROM_L
    p_l, l_row_eighth,  # L (B, P, H, T, T) of an earlier call, rows 8 * l_row_eighth apart; None without FROM_L
    p_q_r,  # (B, T, P, H, D)
    qk_scale, c_floor,
    frames, positions, heads, head_dim, band, width,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    STRIP: tl.constexpr, STAGES: tl.constexpr, MASK_D: tl.constexpr,
    HAS_EXACT: tl.constexpr, BANDED: tl.constexpr, FIRST_FRAME: tl.constexpr, FROM_L: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The next R-step's queries, sum_l L q[l, j] / max(sum_l L, c_floor), from an L-step or from a stored L.

    One program: one head, STRIP positions after one another, BLOCK_K key frames; query frames in tiles of BLOCK_L.
    With WHOLE_ROWS all key frames are in the tile and the rows of L are normalised here; with ONE_TILE all query frames
    are in one tile.
    """
    j_first = (tl.program_id(0) // heads) * STRIP
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    s_row = positions * heads * head_dim
    s_l = l_row_eighth * 8
    p_q += b * s_qb + h * s_qh

    for j_now in tl.range(j_first, tl.minimum(j_first + STRIP, positions), num_stages=STAGES if ONE_TILE else 1):
        j = tl.cast(j_now, tl.int64)
        o_tokens = ((b * frames * positions + j) * heads + h) * head_dim
        o_stats = (b * heads + h) * frames * positions + j
        p_q_j = p_q + j * s_qp
        if FROM_L:
            p_l_j = p_l + ((b * positions + j) * heads + h) * frames * s_l
        else:
            c_l = tl.load(p_c + o_stats + o_k * positions, mask=o_k < frames, other=0.0)
        if ONE_TILE:
            o_l = tl.arange(0, BLOCK_L)
            if FROM_L:
                entries = from_8bit(load_rows(p_l_j, o_l, s_l, o_k, frames, s_l, True, True))
            else:
                product = _l_product(
                    p_q_j, s_qt, p_rk + o_tokens, s_row, o_l, o_k, frames, head_dim,
                    BLOCK_L, BLOCK_K, BLOCK_D, PARTS, MASK_D, PRECISION,
                )  # fmt: skip
                entries = _l_entries(
                    product, c_l, p_exact_lse, p_row_lse, o_stats, o_l, o_k, frames, positions,
                    band, width, qk_scale, HAS_EXACT, BANDED, FIRST_FRAME, WHOLE_ROWS,
                )  # fmt: skip
                entries = tl.where((o_l < frames)[:, None], entries, 0.0)
            inverse = 1.0 / tl.maximum(tl.sum(entries, 0), c_floor)
            weights = tl.trans(entries).to(p_q_r.dtype.element_ty)
            for part in tl.static_range(PARTS):
                o_d = part * (BLOCK_D // PARTS) + tl.arange(0, BLOCK_D // PARTS)
                q = load_rows(p_q_j, o_l, s_qt, o_d, frames, head_dim, True, MASK_D)
                q_r = tl.dot(weights, q, input_precision=PRECISION) * inverse[:, None]
                store_rows(p_q_r + o_tokens, o_k, s_row, o_d, q_r, frames, head_dim, MASK_D)
        else:
            o_d = tl.arange(0, BLOCK_D)
            acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
            c_r = tl.zeros([BLOCK_K], tl.float32)
            if not FROM_L:
                rk = load_rows(p_rk + o_tokens, o_k, s_row, o_d, frames, head_dim, True, MASK_D)
            for l_first in tl.range(0, frames, BLOCK_L, num_stages=STAGES):
                o_l = l_first + tl.arange(0, BLOCK_L)
                q = load_rows(p_q_j, o_l, s_qt, o_d, frames, head_dim, True, MASK_D)
                if FROM_L:
                    entries = from_8bit(load_rows(p_l_j, o_l, s_l, o_k, frames, s_l, True, True))
                else:
                    product = tl.dot(q, tl.trans(rk), input_precision=PRECISION)
                    entries = _l_entries(
                        product, c_l, p_exact_lse, p_row_lse, o_stats, o_l, o_k, frames, positions,
                        band, width, qk_scale, HAS_EXACT, BANDED, FIRST_FRAME, WHOLE_ROWS,
                    )  # fmt: skip
                    entries = tl.where((o_l < frames)[:, None], entries, 0.0)
                acc = tl.dot(tl.trans(entries).to(q.dtype), q, acc, input_precision=PRECISION)
                c_r += tl.sum(entries, 0)
            q_r = acc / tl.maximum(c_r, c_floor)[:, None]
            store_rows(p_q_r + o_tokens, o_k, s_row, o_d, q_r, frames, head_dim, MASK_D)
