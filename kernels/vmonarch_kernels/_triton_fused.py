"""Triton kernel bodies of the operations between a block's products; `launch_fused.py` holds their grids.

Names as in `_triton.py`: p_ pointer, s_ stride, o_ offset, m_ mask. All arithmetic is in float32; an argument is None
for a tensor that a launch does not have. Rows are read once and kept in registers until they are written.
"""

import triton
import triton.language as tl

NO_NORM = tl.constexpr(0)
LAYER_NORM = tl.constexpr(1)
RMS_NORM = tl.constexpr(2)
SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)


@triton.jit
def _load_pairs(p, o_h, s_h, heads, half, other, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """The two elements of every pair that a rotation turns, [heads, HALF] each, in float32."""
    if INTERLEAVED:
        # Read as it lies, and parted in registers: every second element would be read in pieces.
        o = tl.arange(0, 2 * HALF)
        tile = tl.load(
            p + o_h[:, None] * s_h + o[None, :], (o_h < heads)[:, None] & (o < 2 * half)[None, :], other=other
        )
        first, second = tl.split(tl.reshape(tile, [o_h.shape[0], HALF, 2]))
    else:
        o = tl.arange(0, HALF)
        m_tile = (o_h < heads)[:, None] & (o < half)[None, :]
        p_tile = p + o_h[:, None] * s_h + o[None, :]
        first = tl.load(p_tile, m_tile, other=other)
        second = tl.load(p_tile + half, m_tile, other=other)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(p, first, second, o_h, s_h, heads, half, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """The same, back."""
    if INTERLEAVED:
        o = tl.arange(0, 2 * HALF)
        tile = tl.reshape(tl.join(first, second), [o_h.shape[0], 2 * HALF])
        m_tile = (o_h < heads)[:, None] & (o < 2 * half)[None, :]
        tl.store(p + o_h[:, None] * s_h + o[None, :], tile.to(p.dtype.element_ty), m_tile)
    else:
        o = tl.arange(0, HALF)
        m_tile = (o_h < heads)[:, None] & (o < half)[None, :]
        p_tile = p + o_h[:, None] * s_h + o[None, :]
        tl.store(p_tile, first.to(p.dtype.element_ty), m_tile)
        tl.store(p_tile + half, second.to(p.dtype.element_ty), m_tile)


@triton.jit
def _norm_rope_row(
    x1, x2, p_o, w1, w2, cos, sin, heads, half, eps, o_h,
    WEIGHT: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr, ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token of q or of k: all its heads."""
    if NORM:
        squares = tl.sum(x1 * x1 + x2 * x2, 1)
        if PER_HEAD:
            inverse = tl.rsqrt(squares / (2 * half) + eps)[:, None]
        else:
            inverse = tl.rsqrt(tl.sum(squares, 0) / (2 * half * heads) + eps)
        x1 = x1 * inverse
        x2 = x2 * inverse
        if WEIGHT:
            x1 = x1 * w1
            x2 = x2 * w2
    if ROTATED:
        turned = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = turned
    _store_pairs(p_o, x1, x2, o_h, 2 * half, heads, half, INTERLEAVED, HALF)


@triton.jit
def qk_norm_rope_kernel(
    p_q, s_qb, s_qn, p_k, s_kb, s_kn,  # (B, N, heads * D)
    p_oq, p_ok,  # (B, N, heads, D), contiguous
    p_wq, p_wk,  # (heads * D) or (D), or None
    p_cos, p_sin, s_tb, s_tn, s_th,  # tables (B, N', heads, D), every angle twice; stride 0 where all are the same
    eps, tokens, rotated, heads, half,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, TABLE_H: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, PER_HEAD: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """RMS norm and rotary embedding of q and of k where there is one. Tokens from ``rotated`` on are not turned."""
    b = tl.program_id(1).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    o_t = tl.arange(0, TABLE_H)
    o_w = tl.zeros([1], tl.int32) if PER_HEAD else o_h
    w1q, w2q, w1k, w2k = 1.0, 1.0, 1.0, 1.0
    if p_wq is not None:
        w1q, w2q = _load_pairs(p_wq, o_w, 2 * half, heads, half, 0.0, INTERLEAVED, HALF)
    if p_wk is not None:
        w1k, w2k = _load_pairs(p_wk, o_w, 2 * half, heads, half, 0.0, INTERLEAVED, HALF)
    width = 2 * half * heads
    first = tl.program_id(0) * ROWS
    for i in range(0, tl.minimum(ROWS, tokens - first)):
        token = first + i
        n = token.to(tl.int64)
        row = (b * tokens + n) * width
        # Everything is asked for before anything is worked on: what waits for memory is what limits this.
        q1, q2 = _load_pairs(p_q + b * s_qb + n * s_qn, o_h, 2 * half, heads, half, 0.0, INTERLEAVED, HALF)
        if p_k is not None:
            k1, k2 = _load_pairs(p_k + b * s_kb + n * s_kn, o_h, 2 * half, heads, half, 0.0, INTERLEAVED, HALF)
        cos, sin = 1.0, 0.0
        if p_cos is not None:
            at = b * s_tb + n * s_tn
            # No table for the rest: an angle of 0.
            there = tl.where(token < rotated, heads, 0)
            cos, _ = _load_pairs(p_cos + at, o_t, s_th, there, half, 1.0, INTERLEAVED, HALF)
            _, sin = _load_pairs(p_sin + at, o_t, s_th, there, half, 0.0, INTERLEAVED, HALF)
        _norm_rope_row(
            q1, q2, p_oq + row, w1q, w2q, cos, sin, heads, half, eps, o_h,
            p_wq is not None, NORM, PER_HEAD, p_cos is not None, INTERLEAVED, HALF,
        )  # fmt: skip
        if p_k is not None:
            _norm_rope_row(
                k1, k2, p_ok + row, w1k, w2k, cos, sin, heads, half, eps, o_h,
                p_wk is not None, NORM, PER_HEAD, p_cos is not None, INTERLEAVED, HALF,
            )  # fmt: skip


@triton.jit
def _term(p, p_table, o_c, m_c):
    """Values of a modulation with their table's row, float32."""
    values = tl.load(p + o_c, m_c, other=0.0).to(tl.float32)
    if p_table is not None:
        values += tl.load(p_table + o_c, m_c, other=0.0).to(tl.float32)
    return values


@triton.jit
def _store_e4m3(p_o, p_scale, x, o_c, m_c, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    """x / scale of one row, which brings its largest entry to LARGEST, rounded to o's dtype; entries outside are 0."""
    scale = tl.maximum(tl.max(tl.abs(x), 0) / LARGEST, LEAST)
    tl.store(p_o + o_c, (x / scale).to(p_o.dtype.element_ty), m_c)
    tl.store(p_scale, scale)


@triton.jit
def residual_norm_kernel(
    p_x, s_xb, s_xn, p_y, s_yb, s_yn,  # (B, N, C)
    p_h, p_o,  # (B, N, C), contiguous: the sum, and its norm
    p_gate, s_gb, s_gn, p_gate_table,  # (B or 1, N or 1, C) and (C)
    p_scale, s_sb, s_sn, p_scale_table,
    p_shift, s_hb, s_hn, p_shift_table,
    p_weight, p_bias,  # (C), or None
    p_e, p_e_scale,  # (B * N, C) and (B * N), contiguous: the norm's rows in e4m3, or None
    eps, tokens, channels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    TOKEN_GATE: tl.constexpr, TOKEN_MODULATION: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """h = x + y * gate, o = norm(h) * weight + bias, o * (1 + scale) + shift; each part where its tensor is there."""
    b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < channels
    # What all tokens of a sample share is read once for ROWS of them.
    if p_gate is not None and not TOKEN_GATE:
        gate = _term(p_gate + b * s_gb, p_gate_table, o_c, m_c)
    if p_scale is not None and not TOKEN_MODULATION:
        scale = 1.0 + _term(p_scale + b * s_sb, p_scale_table, o_c, m_c)
        shift = _term(p_shift + b * s_hb, p_shift_table, o_c, m_c)
    if p_weight is not None:
        weight = tl.load(p_weight + o_c, m_c, other=0.0).to(tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + o_c, m_c, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    for i in range(0, tl.minimum(ROWS, tokens - first)):
        n = (first + i).to(tl.int64)
        row = (b * tokens + n) * channels
        h = tl.load(p_x + b * s_xb + n * s_xn + o_c, m_c, other=0.0).to(tl.float32)
        if p_y is not None:
            y = tl.load(p_y + b * s_yb + n * s_yn + o_c, m_c, other=0.0).to(tl.float32)
            if p_gate is not None:
                if TOKEN_GATE:
                    gate = _term(p_gate + b * s_gb + n * s_gn, p_gate_table, o_c, m_c)
                y = y * gate
            rounded = (h + y).to(p_h.dtype.element_ty)
            tl.store(p_h + row + o_c, rounded, m_c)
            # The norm is that of what is kept.
            h = rounded.to(tl.float32)
        if NORM != NO_NORM:
            if NORM == LAYER_NORM:
                h = tl.where(m_c, h - tl.sum(h, 0) / channels, 0.0)
            o = h * tl.rsqrt(tl.sum(h * h, 0) / channels + eps)
            if p_weight is not None:
                o = o * weight
            if p_bias is not None:
                o = o + bias
            if p_scale is not None:
                if TOKEN_MODULATION:
                    scale = 1.0 + _term(p_scale + b * s_sb + n * s_sn, p_scale_table, o_c, m_c)
                    shift = _term(p_shift + b * s_hb + n * s_hn, p_shift_table, o_c, m_c)
                o = o * scale + shift
            o = o.to(p_o.dtype.element_ty)
            tl.store(p_o + row + o_c, o, m_c)
            if p_e is not None:
                # Of what is kept in 16 bits, too.
                _store_e4m3(p_e + row, p_e_scale + b * tokens + n, o.to(tl.float32), o_c, m_c, LARGEST, LEAST)


@triton.jit
def _activation(x, KIND: tl.constexpr):
    if KIND == SILU:
        return x * tl.sigmoid(x)
    elif KIND == GELU:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh u) is the sigmoid of 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3).
        return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def gelu_tanh_kernel(p_x, elements, BLOCK: tl.constexpr):
    """x = gelu(x), in place, of ``elements`` that lie side by side."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o, o < elements, other=0.0)
    tl.store(p_x + o, _activation(x.to(tl.float32), GELU_TANH).to(x.dtype), o < elements)


@triton.jit
def gated_activation_kernel(p_x, s_x, p_o, channels, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """o (rows, C) = x[:, :C] * activation(x[:, C:]) of x (rows, 2 C)."""
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    value = tl.load(p_x + row * s_x + o_c, m_c, other=0.0).to(tl.float32)
    gate = tl.load(p_x + row * s_x + channels + o_c, m_c, other=0.0).to(tl.float32)
    o = value * _activation(gate, KIND)
    tl.store(p_o + row * channels + o_c, o.to(p_o.dtype.element_ty), m_c)


@triton.jit
def quantize_rows_kernel(
    p_x, s_x, p_o, p_scale, channels,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, GELU_FIRST: tl.constexpr,
):  # fmt: skip
    """o (rows, C) = x / scale (rows), or the same of GELU of x in its tanh form; see `_store_e4m3`."""
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < channels
    x = tl.load(p_x + row * s_x + o_c, m_c, other=0.0).to(tl.float32)
    if GELU_FIRST:
        x = _activation(x, GELU_TANH)
    _store_e4m3(p_o + row * channels, p_scale + row, x, o_c, m_c, LARGEST, LEAST)
