"""The attention loop of `_triton.attend_kernel` for Hopper (compute capability 9.0), written in Gluon.

One warp brings tiles through the copy engine (TMA) and two warp groups of 64 query rows each compute: while a
group's tensor cores multiply the weights of one key tile, its other units take the softmax of the next (the
schedule of FlashAttention-3, with a second product where the R-step wants RK and RV). Programs are persistent, so
that the next tile's queries and keys arrive while this one's results are written.

Names as in `_triton.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
GROUP_ROWS = gl.constexpr(64)
# Triton 3.7 renamed it.
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _tile_indices(tile, positions, parts, heads):
    """(block of query rows, query frame or key split, batch, head) of a tile number; blocks of a frame lie side by
    side, so that programs of the same time share its keys in the cache.
    """
    blocks = gl.cdiv(positions, 2 * GROUP_ROWS)
    rest = tile // blocks
    return tile % blocks, rest % parts, rest // (parts * heads), (rest // parts) % heads


@gluon.jit
def _key_range(part, frames, positions, first_query_frame, band, width, split_keys, SPLIT: gl.constexpr):
    """As `_triton._key_range`."""
    if SPLIT:
        key_first = part * split_keys
        key_end = gl.minimum(key_first + split_keys, width * positions)
    else:
        key_first = gl.minimum(gl.maximum(part + first_query_frame - band, 0), frames - width) * positions
        key_end = key_first + width * positions
    return key_first, key_end


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The ring position after this one."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _produce(
    d_q, d_k, d_v, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
    tiles, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, WITH_V: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Bring every tile's queries and its window's keys and values, last key tile first."""
    stage = 0
    phase = 0
    q_stage = 0
    q_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, part, b, h = _tile_indices(tile, positions, parts, heads)
        key_first, key_end = _key_range(part, frames, positions, first_query_frame, band, width, split_keys, SPLIT)
        row_b = b * frames * positions
        column = h * BLOCK_D
        row_q = row_b + block * 2 * GROUP_ROWS
        if not SPLIT:
            row_q += (part + first_query_frame) * positions
        mbarrier.wait(q_empty.index(q_stage), q_phase ^ 1)
        mbarrier.expect(q_full.index(q_stage), 2 * d_q.block_type.nbytes)
        for group in gl.static_range(2):
            _load_tile(
                d_q, [row_q + group * GROUP_ROWS, column], q_full.index(q_stage), q_smem.index(2 * q_stage + group)
            )
        q_stage, q_phase = _next(q_stage, q_phase, Q_STAGES)
        count = gl.cdiv(key_end - key_first, BLOCK_N)
        for i in range(count):
            row = row_b + key_first + (count - 1 - i) * BLOCK_N
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), (2 if WITH_V else 1) * d_k.block_type.nbytes)
            _load_tile(d_k, [row, column], full.index(stage), k_smem.index(stage))
            if WITH_V:
                _load_tile(d_v, [row, column], full.index(stage), v_smem.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _accumulate(weights, keys, values, acc_k, acc_v, WITH_K: gl.constexpr, WITH_V: gl.constexpr):
    """Start the products of the weights (64, n) with a tile's keys and values (n, D)."""
    if WITH_K:
        acc_k = warpgroup_mma(weights, keys, acc_k, is_async=True)
    if WITH_V:
        acc_v = warpgroup_mma(weights, values, acc_v, is_async=True)
    return acc_k, acc_v


@gluon.jit
def _settle(weights, acc_k, acc_v, WITH_K: gl.constexpr, WITH_V: gl.constexpr):
    """Wait for the products that `_accumulate` started; the weights must live until then."""
    if WITH_K and WITH_V:
        acc_k, acc_v, weights = warpgroup_mma_wait(0, deps=[acc_k, acc_v, weights])
    elif WITH_K:
        acc_k, weights = warpgroup_mma_wait(0, deps=[acc_k, weights])
    else:
        acc_v, weights = warpgroup_mma_wait(0, deps=[acc_v, weights])
    return acc_k, acc_v


@gluon.jit
def _softmax_step(scores, top, total, scale2):
    """Online softmax: unnormalised weights of a tile, and the running maximum, sum and the sums' decay."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale2)
    weights = gl.exp2(scores * scale2 - new_top[:, None])
    decay = gl.exp2(top - new_top)
    return weights, new_top, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _step(
    q, weights, keys, values, k_smem, full, empty, stage, phase, no_scores, acc_k, acc_v, top, total, scale2,
    WITH_K: gl.constexpr, WITH_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add a tile's weighted keys and values to the sums while the next tile's weights are computed; those weights, the
    sums, row maxima and totals, and the next tile's ring position.
    """
    dtype: gl.constexpr = k_smem.dtype
    layout_o: gl.constexpr = acc_k.type.layout
    running: gl.constexpr = 2 if WITH_K and WITH_V else 1  # products behind the scores in the queue
    next_stage, next_phase = _next(stage, phase, STAGES)
    mbarrier.wait(full.index(next_stage), next_phase)
    scores = warpgroup_mma(q, k_smem.index(next_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    acc_k, acc_v = _accumulate(weights, keys, values, acc_k, acc_v, WITH_K, WITH_V)
    scores = warpgroup_mma_wait(running, deps=[scores])
    next_weights, top, total, decay = _softmax_step(scores, top, total, scale2)
    acc_k, acc_v = _settle(weights, acc_k, acc_v, WITH_K, WITH_V)
    mbarrier.arrive(empty.index(stage), count=1)
    decay_o = gl.convert_layout(decay, gl.SliceLayout(1, layout_o))[:, None]
    acc_k *= decay_o
    acc_v *= decay_o
    next_weights = gl.convert_layout(next_weights.to(dtype), gl.DotOperandLayout(0, layout_o, 2))
    return next_weights, acc_k, acc_v, top, total, next_stage, next_phase


@gluon.jit
def _attend_tile(
    q, k_smem, v_smem, full, empty, stage, phase, keys, scale2,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, TAIL: gl.constexpr,
    WITH_K: gl.constexpr, WITH_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of 64 query rows over `keys` keys: sums of keys and values, row maxima and totals, ring position.

    The keys run backwards: only the first tile can be partial. It is computed TAIL keys wide, and the loop over the
    others needs no mask.
    """
    dtype: gl.constexpr = k_smem.dtype
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    layout_t: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_o, 2)
    rows_s: gl.constexpr = gl.SliceLayout(1, layout_s)

    count = gl.cdiv(keys, BLOCK_N)
    mbarrier.wait(full.index(stage), phase)
    tail_keys = k_smem.index(stage).slice(0, TAIL)
    tail_values = v_smem.index(stage).slice(0, TAIL)
    no_tail = gl.zeros([GROUP_ROWS, TAIL], gl.float32, layout_t)
    tail = warpgroup_mma(q, tail_keys.permute((1, 0)), no_tail, use_acc=False)
    o_key = (count - 1) * BLOCK_N + gl.arange(0, TAIL, gl.SliceLayout(0, layout_t))
    tail = gl.where((o_key < keys)[None, :], tail, float("-inf"))
    tail_top = gl.max(tail, 1) * scale2
    tail = gl.exp2(tail * scale2 - tail_top[:, None])
    top = gl.convert_layout(tail_top, rows_s)
    total = gl.convert_layout(gl.sum(tail, 1), rows_s)
    tail_weights = gl.convert_layout(tail.to(dtype), layout_p)
    acc_k = gl.zeros([GROUP_ROWS, BLOCK_D], gl.float32, layout_o)
    acc_v = gl.zeros([GROUP_ROWS, BLOCK_D], gl.float32, layout_o)

    no_scores = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, layout_s)
    weights, acc_k, acc_v, top, total, stage, phase = _step(
        q, tail_weights, tail_keys, tail_values, k_smem, full, empty, stage, phase, no_scores,
        acc_k, acc_v, top, total, scale2, WITH_K, WITH_V, STAGES,
    )  # fmt: skip
    for _ in range(count - 2):
        weights, acc_k, acc_v, top, total, stage, phase = _step(
            q, weights, k_smem.index(stage), v_smem.index(stage), k_smem, full, empty, stage, phase, no_scores,
            acc_k, acc_v, top, total, scale2, WITH_K, WITH_V, STAGES,
        )  # fmt: skip

    acc_k, acc_v = _accumulate(weights, k_smem.index(stage), v_smem.index(stage), acc_k, acc_v, WITH_K, WITH_V)
    acc_k, acc_v = _settle(weights, acc_k, acc_v, WITH_K, WITH_V)
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = _next(stage, phase, STAGES)
    return acc_k, acc_v, top, total, stage, phase


@gluon.jit
def _consume(
    q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
    p_rk, p_c, p_o, s_ob, s_ot, s_op, s_oh, p_lse, s_lb, s_lh, s_lt,
    qk_scale, tiles, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, TAIL: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr,
    WITH_LSE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Compute and store one group's 64 rows of every tile."""
    layout_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    # 16 bytes a thread: accumulators go through shared memory on their way out, so that whole lines are written.
    layout_m: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows_o: gl.constexpr = gl.SliceLayout(1, layout_o)
    rows_m: gl.constexpr = gl.SliceLayout(1, layout_m)
    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout_m))
    scale2 = qk_scale * LOG2E
    stage = 0
    phase = 0
    q_stage = 0
    q_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, part, b, h = _tile_indices(tile, positions, parts, heads)
        key_first, key_end = _key_range(part, frames, positions, first_query_frame, band, width, split_keys, SPLIT)
        mbarrier.wait(q_full.index(q_stage), q_phase)
        q = q_smem.index(2 * q_stage + GROUP)
        first_row = (2 * block + GROUP) * GROUP_ROWS
        if first_row < positions:
            acc_k, acc_v, top, total, stage, phase = _attend_tile(
                q, k_smem, v_smem, full, empty, stage, phase, key_end - key_first, scale2,
                BLOCK_N, BLOCK_D, TAIL, WITH_K, WITH_V, STAGES,
            )  # fmt: skip
            frame = part + first_query_frame
            o_j = first_row + gl.arange(0, GROUP_ROWS, rows_m)
            m_j = o_j < positions
            lse = gl.convert_layout((top + gl.log2(total)) * LN2, rows_m)
            inverse = gl.convert_layout(1.0 / total, rows_o)[:, None]
            if WITH_LSE:
                p_stat = p_lse + b.to(gl.int64) * s_lb + h.to(gl.int64) * s_lh + frame.to(gl.int64) * s_lt
                gl.store(p_stat + o_j, lse, mask=m_j)
            if WITH_K:
                queries = q.load(layout_m)
                q.store((acc_k * inverse).to(q.dtype))
                rk = q.load(layout_m)
                # From the rounded RK, the very values that the L-step multiplies, so that their rounding cancels in
                # its logits.
                c_l = gl.sum(queries.to(gl.float32) * rk.to(gl.float32), 1) * qk_scale - lse
                p_stat = p_c + ((b * heads + h) * frames + frame).to(gl.int64) * positions
                gl.store(p_stat + o_j, c_l, mask=m_j)
                p_rows = p_rk + ((b * frames + frame).to(gl.int64) * positions * heads + h) * BLOCK_D
                gl.store(p_rows + o_j[:, None].to(gl.int64) * (heads * BLOCK_D) + o_d[None, :], rk, mask=m_j[:, None])
            if WITH_V:
                p_rows = p_o + b.to(gl.int64) * s_ob + frame.to(gl.int64) * s_ot + h.to(gl.int64) * s_oh
                if SPLIT:
                    # float32 partials do not fit the queries' place.
                    o_row = first_row + gl.arange(0, GROUP_ROWS, rows_o)
                    o_column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout_o))
                    p_tile = p_rows + o_row[:, None].to(gl.int64) * s_op + o_column[None, :]
                    gl.store(p_tile, acc_v * inverse, mask=(o_row < positions)[:, None])
                else:
                    q.store((acc_v * inverse).to(q.dtype))
                    out = q.load(layout_m)
                    gl.store(p_rows + o_j[:, None].to(gl.int64) * s_op + o_d[None, :], out, mask=m_j[:, None])
        else:
            # All of this group's rows lie past the frame: let the tiles go by.
            for _ in range(gl.cdiv(key_end - key_first, BLOCK_N)):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase, STAGES)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(q_stage), count=1)
        q_stage, q_phase = _next(q_stage, q_phase, Q_STAGES)


@gluon.jit
def attend_hopper_kernel(
    d_q, d_k, d_v,  # descriptors of (B * N, H * D) rows, tiles (64 or BLOCK_N, BLOCK_D)
    p_rk, p_c, p_o, s_ob, s_ot, s_op, s_oh, p_lse, s_lb, s_lh, s_lt,  # as attend_kernel's
    qk_scale,
    tiles, frames, positions, parts, heads,  # parts: query frames, or key splits of frame 0
    first_query_frame, band, width, split_keys,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, TAIL: gl.constexpr,
    WITH_K: gl.constexpr, WITH_V: gl.constexpr, WITH_LSE: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """`attend_kernel` on a persistent grid; every window has more than BLOCK_N keys, its last tile at most TAIL."""
    q_smem = gl.allocate_shared_memory(d_q.dtype, [2 * Q_STAGES] + d_q.block_type.shape, d_q.layout)
    k_smem = gl.allocate_shared_memory(d_k.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    if WITH_V:
        v_smem = gl.allocate_shared_memory(d_v.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    else:
        v_smem = k_smem
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize([
        (_consume, (
            q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
            p_rk, p_c, p_o, s_ob, s_ot, s_op, s_oh, p_lse, s_lb, s_lh, s_lt,
            qk_scale, tiles, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
            BLOCK_N, BLOCK_D, TAIL, WITH_K, WITH_V, WITH_LSE, SPLIT, STAGES, Q_STAGES, 0,
        )),
        (_consume, (
            q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
            p_rk, p_c, p_o, s_ob, s_ot, s_op, s_oh, p_lse, s_lb, s_lh, s_lt,
            qk_scale, tiles, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
            BLOCK_N, BLOCK_D, TAIL, WITH_K, WITH_V, WITH_LSE, SPLIT, STAGES, Q_STAGES, 1,
        )),
        (_produce, (
            d_q, d_k, d_v, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
            tiles, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
            BLOCK_N, BLOCK_D, WITH_V, SPLIT, STAGES, Q_STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
