"""`_triton_backward.py`'s attention kernels for Hopper (compute capability 9.0), written in Gluon.

As in `_hopper.py` one warp brings tiles through the copy engine and two warp groups compute, here the gradients of 64
keys or queries each. For keys, scores are computed as keys by queries, so that the weights and their gradients go from
registers into the next product. The two groups wait for tiles alone, not for each other: one takes exponentials while
the other's products run.

Names as in `_triton_backward.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vmonarch_kernels._hopper import GROUP_ROWS, LOG2E, _key_range, _load_tile, _next, _tile_indices

# Rows of a tile that is brought for the two groups.
QUERY_ROWS = gl.constexpr(64)
KEY_ROWS = gl.constexpr(64)


# Gradients of keys and values


@gluon.jit
def _query_frames(frame, frames, band, width, whole_frame, BANDED: gl.constexpr, WHOLE: gl.constexpr):
    """The query frames that see a key frame: the band's first, how many of the band, how many in all (at least one)."""
    first = 0
    count = 0
    if BANDED:
        # Query frame l sees [start, start + width) with start = clamp(l - band, 0, frames - width).
        first = gl.where(frame < width, 0, frame - (width - 1 - band))
        end = gl.where(frame >= frames - width, frames, gl.minimum(frame + band + 1, frames))
        if WHOLE:
            first = gl.maximum(first, whole_frame + 1)
        count = gl.maximum(end - first, 0)
    total = count
    if WHOLE:
        total += 1
    return first, count, total


@gluon.jit
def _produce_queries(
    d_q, d_k, d_v, d_gk, d_gv, k_smem, v_smem, q_smem, gk_smem, gv_smem, keys_full, keys_empty, full, empty,
    tiles, frames, positions, heads, band, width, whole_frame,
    BLOCK_D: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr, BANDED: gl.constexpr, WHOLE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Bring every tile's keys and values, and the queries and gradients that belong to them."""
    stage = 0
    phase = 0
    keys_phase = 0
    blocks = gl.cdiv(positions, QUERY_ROWS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, frame, b, h = _tile_indices(tile, positions, frames, heads)
        first, count, total = _query_frames(frame, frames, band, width, whole_frame, BANDED, WHOLE)
        column = h * BLOCK_D
        row_b = b * frames * positions
        row_k = row_b + frame * positions + block * 2 * GROUP_ROWS
        for i in range(total):
            query_frame = gl.where(i < count, first + i, whole_frame)
            for query_block in range(blocks):
                row = row_b + query_frame * positions + query_block * QUERY_ROWS
                mbarrier.wait(empty.index(stage), phase ^ 1)
                mbarrier.expect(
                    full.index(stage), (1 + (1 if WITH_K else 0) + (1 if WITH_V else 0)) * d_q.block_type.nbytes
                )
                _load_tile(d_q, [row, column], full.index(stage), q_smem.index(stage))
                if WITH_V:
                    _load_tile(d_gv, [row, column], full.index(stage), gv_smem.index(stage))
                if WITH_K:
                    _load_tile(d_gk, [row, column], full.index(stage), gk_smem.index(stage))
                stage, phase = _next(stage, phase, STAGES)
                # Behind the first queries, which may come while the groups still store their last results.
                if (i == 0) & (query_block == 0):
                    for group in gl.static_range(2):
                        mbarrier.wait(keys_empty.index(group), keys_phase ^ 1)
                        mbarrier.expect(keys_full.index(group), (2 if WITH_V else 1) * d_k.block_type.nbytes)
                        row_g = row_k + group * GROUP_ROWS
                        _load_tile(d_k, [row_g, column], keys_full.index(group), k_smem.index(group))
                        if WITH_V:
                            _load_tile(d_v, [row_g, column], keys_full.index(group), v_smem.index(group))
        keys_phase ^= 1


@gluon.jit
def _start_scores(keys, q_smem, full, stage, phase, nothing):
    """Start the products of 64 keys with a tile of queries, once that is there."""
    mbarrier.wait(full.index(stage), phase)
    return warpgroup_mma(keys, q_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _add_queries(
    scores, keys, key_tile, value_tile, q_tile, gk_tile, gv_tile, p_lse, p_shift, nothing, acc_k, acc_v, qk_scale,
    WITH_K: gl.constexpr, WITH_V: gl.constexpr,
):  # fmt: skip
    """Start the sums of what a tile of queries gives 64 keys; the scores have been started. Returns the sums, and the
    weights and their gradients, which must live until the products have ended.
    """
    dtype: gl.constexpr = q_tile.dtype
    layout_s: gl.constexpr = nothing.type.layout
    layout_p: gl.constexpr = gl.DotOperandLayout(0, acc_k.type.layout, 2)
    running: gl.constexpr = 2 if WITH_K and WITH_V else 1
    o_row = gl.arange(0, QUERY_ROWS, gl.SliceLayout(0, layout_s))
    lse = gl.load(p_lse + o_row)
    if WITH_V:
        d_weights = warpgroup_mma(value_tile, gv_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if WITH_K:
            d_weights = warpgroup_mma(keys, gk_tile.permute((1, 0)), d_weights, is_async=True)
    else:
        d_weights = warpgroup_mma(keys, gk_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(running, deps=[scores])
    weights = gl.exp2(scores * (qk_scale * LOG2E) - lse[None, :])
    shift = gl.load(p_shift + o_row)
    rounded = gl.convert_layout(weights.to(dtype), layout_p)
    if WITH_V:
        acc_v = warpgroup_mma(rounded, gv_tile, acc_v, is_async=True)
    if WITH_K:
        acc_k = warpgroup_mma(rounded, gk_tile, acc_k, is_async=True)
    d_weights = warpgroup_mma_wait(running, deps=[d_weights])
    d_scores = weights * (d_weights * qk_scale + shift[None, :])
    d_scores = gl.convert_layout(d_scores.to(dtype), layout_p)
    acc_k = warpgroup_mma(d_scores, q_tile, acc_k, is_async=True)
    return acc_k, acc_v, rounded, d_scores


@gluon.jit
def _settle(acc_k, acc_v, rounded, d_scores, WITH_V: gl.constexpr):
    """Wait for the sums; the weights and their gradients must live until then."""
    if WITH_V:
        acc_k, acc_v, rounded, d_scores = warpgroup_mma_wait(0, deps=[acc_k, acc_v, rounded, d_scores])
    else:
        acc_k, rounded, d_scores = warpgroup_mma_wait(0, deps=[acc_k, rounded, d_scores])
    return acc_k, acc_v


@gluon.jit
def _store_sums(
    acc, smem, p_out, o_head, first_row, positions, s_row, BLOCK_D: gl.constexpr, ADD: gl.constexpr
):  # fmt: skip
    """Write 64 rows of sums through a tile of shared memory, so that whole lines are written; with ADD, add."""
    # 16 bytes a thread.
    layout_m: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    o_j = first_row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout_m))
    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout_m))
    p_rows = p_out + o_head + o_j[:, None].to(gl.int64) * s_row + o_d[None, :]
    mask = (o_j < positions)[:, None]
    if ADD:
        smem.store(gl.load(p_rows, mask=mask, other=0.0))
        acc += smem.load(acc.type.layout).to(gl.float32)
    smem.store(acc.to(smem.dtype))
    gl.store(p_rows, smem.load(layout_m), mask=mask)


@gluon.jit
def _consume_queries(
    k_smem, v_smem, q_smem, gk_smem, gv_smem, keys_full, keys_empty, full, empty,
    p_lse, p_shift, p_dk, p_dv,
    qk_scale, tiles, frames, positions, heads, band, width, whole_frame,
    BLOCK_D: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr, BANDED: gl.constexpr, WHOLE: gl.constexpr,
    ADD_K: gl.constexpr, ADD_V: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Compute and store the gradients of one group's 64 keys of every tile."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERY_ROWS, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    stage = 0
    phase = 0
    keys_phase = 0
    blocks = gl.cdiv(positions, QUERY_ROWS)
    nothing = gl.zeros([GROUP_ROWS, QUERY_ROWS], gl.float32, layout_s)
    key_tile = k_smem.index(GROUP)
    value_tile = v_smem.index(GROUP)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, frame, b, h = _tile_indices(tile, positions, frames, heads)
        first, count, total = _query_frames(frame, frames, band, width, whole_frame, BANDED, WHOLE)
        mbarrier.wait(keys_full.index(GROUP), keys_phase)
        keys_phase ^= 1
        first_row = (2 * block + GROUP) * GROUP_ROWS
        steps = total * blocks
        if first_row < positions:
            acc_k = gl.zeros([GROUP_ROWS, BLOCK_D], gl.float32, layout_o)
            acc_v = gl.zeros([GROUP_ROWS, BLOCK_D], gl.float32, layout_o)
            if HELD:
                keys = key_tile.load(gl.DotOperandLayout(0, layout_s, 2))
            else:
                keys = key_tile
            # Statistics have whole tiles for every frame.
            head_blocks = (b * heads + h) * frames * blocks
            at = gl.where(count > 0, first, whole_frame) * blocks
            left = gl.where(count > 0, count * blocks, blocks)  # tiles until the whole frame's turn
            for _ in range(steps):
                o_stats = (head_blocks + at) * QUERY_ROWS
                scores = _start_scores(keys, q_smem, full, stage, phase, nothing)
                acc_k, acc_v, rounded, d_scores = _add_queries(
                    scores, keys, key_tile, value_tile, q_smem.index(stage), gk_smem.index(stage),
                    gv_smem.index(stage), p_lse + o_stats, p_shift + o_stats, nothing, acc_k, acc_v, qk_scale,
                    WITH_K, WITH_V,
                )  # fmt: skip
                acc_k, acc_v = _settle(acc_k, acc_v, rounded, d_scores, WITH_V)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase, STAGES)
                left -= 1
                at = gl.where(left == 0, whole_frame * blocks, at + 1)
            o_head = ((b * frames + frame).to(gl.int64) * positions * heads + h) * BLOCK_D
            _store_sums(acc_k, key_tile, p_dk, o_head, first_row, positions, heads * BLOCK_D, BLOCK_D, ADD_K)
            if WITH_V:
                _store_sums(acc_v, value_tile, p_dv, o_head, first_row, positions, heads * BLOCK_D, BLOCK_D, ADD_V)
        else:
            # All of this group's keys lie past the frame: let the tiles go by.
            for _ in range(steps):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase, STAGES)
        fence_async_shared()
        mbarrier.arrive(keys_empty.index(GROUP), count=1)


@gluon.jit
def grad_keys_hopper_kernel(
    d_q, d_k, d_v, d_gk, d_gv,  # descriptors of (B * N, H * D) rows, tiles (64, BLOCK_D)
    p_lse, p_shift,  # (B, H, T, P rounded up to tiles) float32; past the frame infinity and 0
    p_dk, p_dv,  # (B, N, H, D) contiguous
    qk_scale,
    tiles, frames, positions, heads,
    band, width, whole_frame,  # as grad_keys_kernel's
    BLOCK_D: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr, BANDED: gl.constexpr, WHOLE: gl.constexpr,
    ADD_K: gl.constexpr, ADD_V: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """`grad_keys_kernel` on a persistent grid; ``p_shift`` is s (w - delta).

    HELD: keys stay in registers, too.
    """
    k_smem = gl.allocate_shared_memory(d_k.dtype, [2] + d_k.block_type.shape, d_k.layout)
    q_smem = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_q.block_type.shape, d_q.layout)
    if WITH_V:
        v_smem = gl.allocate_shared_memory(d_v.dtype, [2] + d_v.block_type.shape, d_v.layout)
        gv_smem = gl.allocate_shared_memory(d_gv.dtype, [STAGES] + d_gv.block_type.shape, d_gv.layout)
    else:
        v_smem = k_smem
        gv_smem = q_smem
    if WITH_K:
        gk_smem = gl.allocate_shared_memory(d_gk.dtype, [STAGES] + d_gk.block_type.shape, d_gk.layout)
    else:
        gk_smem = q_smem
    keys_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(keys_full.index(i), count=1)
        mbarrier.init(keys_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize([
        (_consume_queries, (
            k_smem, v_smem, q_smem, gk_smem, gv_smem, keys_full, keys_empty, full, empty, p_lse, p_shift, p_dk, p_dv,
            qk_scale, tiles, frames, positions, heads, band, width, whole_frame,
            BLOCK_D, WITH_K, WITH_V, BANDED, WHOLE, ADD_K, ADD_V, STAGES, HELD, 0,
        )),
        (_consume_queries, (
            k_smem, v_smem, q_smem, gk_smem, gv_smem, keys_full, keys_empty, full, empty, p_lse, p_shift, p_dk, p_dv,
            qk_scale, tiles, frames, positions, heads, band, width, whole_frame,
            BLOCK_D, WITH_K, WITH_V, BANDED, WHOLE, ADD_K, ADD_V, STAGES, HELD, 1,
        )),
        (_produce_queries, (
            d_q, d_k, d_v, d_gk, d_gv, k_smem, v_smem, q_smem, gk_smem, gv_smem, keys_full, keys_empty, full, empty,
            tiles, frames, positions, heads, band, width, whole_frame,
            BLOCK_D, WITH_K, WITH_V, BANDED, WHOLE, STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


# Gradients of queries


@gluon.jit
def _produce_keys(
    d_q, d_k, d_v, d_gk, d_gv, q_smem, gk_smem, gv_smem, k_smem, v_smem, rows_full, rows_empty, full, empty,
    tiles, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
    BLOCK_D: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring every tile's queries and gradients, and its window's keys and values, last key tile first."""
    stage = 0
    phase = 0
    rows_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, part, b, h = _tile_indices(tile, positions, parts, heads)
        key_first, key_end = _key_range(part, frames, positions, first_query_frame, band, width, split_keys, SPLIT)
        column = h * BLOCK_D
        row_b = b * frames * positions
        row_q = row_b + first_query_frame * positions + block * 2 * GROUP_ROWS
        if not SPLIT:
            row_q += part * positions
        count = gl.cdiv(key_end - key_first, KEY_ROWS)
        for i in range(count):
            row = row_b + key_first + (count - 1 - i) * KEY_ROWS
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), (2 if WITH_V else 1) * d_k.block_type.nbytes)
            _load_tile(d_k, [row, column], full.index(stage), k_smem.index(stage))
            if WITH_V:
                _load_tile(d_v, [row, column], full.index(stage), v_smem.index(stage))
            stage, phase = _next(stage, phase, STAGES)
            # Behind the first keys, which may come while the groups still store their last results.
            if i == 0:
                for group in gl.static_range(2):
                    mbarrier.wait(rows_empty.index(group), rows_phase ^ 1)
                    mbarrier.expect(
                        rows_full.index(group),
                        (1 + (1 if WITH_K else 0) + (1 if WITH_V else 0)) * d_q.block_type.nbytes,
                    )
                    row_g = row_q + group * GROUP_ROWS
                    _load_tile(d_q, [row_g, column], rows_full.index(group), q_smem.index(group))
                    if WITH_V:
                        _load_tile(d_gv, [row_g, column], rows_full.index(group), gv_smem.index(group))
                    if WITH_K:
                        _load_tile(d_gk, [row_g, column], rows_full.index(group), gk_smem.index(group))
        rows_phase ^= 1


@gluon.jit
def _start_tile(q, gk, gv, keys, values, nothing, WITH_K: gl.constexpr, WITH_V: gl.constexpr):
    """Start the products of 64 queries and their gradients with a tile of keys and values."""
    scores = warpgroup_mma(q, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if WITH_V:
        d_weights = warpgroup_mma(gv, values.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if WITH_K:
            d_weights = warpgroup_mma(gk, keys.permute((1, 0)), d_weights, is_async=True)
    else:
        d_weights = warpgroup_mma(gk, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
    return scores, d_weights


@gluon.jit
def _consume_keys(
    q_smem, gk_smem, gv_smem, k_smem, v_smem, rows_full, rows_empty, full, empty,
    p_lse, p_delta, p_dq, p_product,
    qk_scale, tiles, batch, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
    BLOCK_D: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr, SPLIT: gl.constexpr, ADD: gl.constexpr,
    WITH_PRODUCT: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Compute and store the gradients of one group's 64 queries of every tile."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEY_ROWS, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_o, 2)
    rows_s: gl.constexpr = gl.SliceLayout(1, layout_s)
    rows_o: gl.constexpr = gl.SliceLayout(1, layout_o)
    dtype: gl.constexpr = k_smem.dtype
    stage = 0
    phase = 0
    rows_phase = 0
    nothing = gl.zeros([GROUP_ROWS, KEY_ROWS], gl.float32, layout_s)
    q_tile = q_smem.index(GROUP)
    gk_tile = gk_smem.index(GROUP)
    gv_tile = gv_smem.index(GROUP)
    scale2 = qk_scale * LOG2E
    behind: gl.constexpr = 2 if WITH_K and WITH_V else 1  # products of the gradients, behind the scores
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, part, b, h = _tile_indices(tile, positions, parts, heads)
        key_first, key_end = _key_range(part, frames, positions, first_query_frame, band, width, split_keys, SPLIT)
        keys = key_end - key_first
        count = gl.cdiv(keys, KEY_ROWS)
        mbarrier.wait(rows_full.index(GROUP), rows_phase)
        rows_phase ^= 1
        first_row = (2 * block + GROUP) * GROUP_ROWS
        if first_row < positions:
            frame = first_query_frame
            if not SPLIT:
                frame += part
            o_j = first_row + gl.arange(0, GROUP_ROWS, rows_s)
            o_stats = ((b * heads + h) * frames + frame) * positions
            lse = gl.load(p_lse + o_stats + o_j, mask=o_j < positions, other=float("inf"))[:, None]
            shift = gl.load(p_delta + o_stats + o_j, mask=o_j < positions, other=0.0)[:, None] * qk_scale
            acc = gl.zeros([GROUP_ROWS, BLOCK_D], gl.float32, layout_o)
            q = q_tile
            gk = gk_tile
            gv = gv_tile
            if HELD > 0:
                q = q_tile.load(gl.DotOperandLayout(0, layout_s, 2))
            if HELD > 1:
                if WITH_K:
                    gk = gk_tile.load(gl.DotOperandLayout(0, layout_s, 2))
                else:
                    gv = gv_tile.load(gl.DotOperandLayout(0, layout_s, 2))
            # The one tile that can be partial comes first, so that the loop needs no mask.
            mbarrier.wait(full.index(stage), phase)
            scores, d_weights = _start_tile(
                q, gk, gv, k_smem.index(stage), v_smem.index(stage), nothing, WITH_K, WITH_V
            )  # fmt: skip
            scores, d_weights = warpgroup_mma_wait(0, deps=[scores, d_weights])
            o_key = (count - 1) * KEY_ROWS + gl.arange(0, KEY_ROWS, gl.SliceLayout(0, layout_s))
            weights = gl.where((o_key < keys)[None, :], gl.exp2(scores * scale2 - lse), 0.0)
            d_scores = weights * (d_weights * qk_scale - shift)
            d_scores = gl.convert_layout(d_scores.to(dtype), layout_p)
            for _ in range(count - 1):
                next_stage, next_phase = _next(stage, phase, STAGES)
                mbarrier.wait(full.index(next_stage), next_phase)
                scores, d_weights = _start_tile(
                    q, gk, gv, k_smem.index(next_stage), v_smem.index(next_stage), nothing, WITH_K, WITH_V
                )  # fmt: skip
                acc = warpgroup_mma(d_scores, k_smem.index(stage), acc, is_async=True)
                scores = warpgroup_mma_wait(behind + 1, deps=[scores])
                weights = gl.exp2(scores * scale2 - lse)
                d_weights = warpgroup_mma_wait(1, deps=[d_weights])
                next_scores = weights * (d_weights * qk_scale - shift)
                acc, d_scores = warpgroup_mma_wait(0, deps=[acc, d_scores])
                mbarrier.arrive(empty.index(stage), count=1)
                d_scores = gl.convert_layout(next_scores.to(dtype), layout_p)
                stage = next_stage
                phase = next_phase
            acc = warpgroup_mma(d_scores, k_smem.index(stage), acc, is_async=True)
            acc, d_scores = warpgroup_mma_wait(0, deps=[acc, d_scores])
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = _next(stage, phase, STAGES)

            o_row = first_row + gl.arange(0, GROUP_ROWS, rows_o)
            if WITH_PRODUCT:
                product = gl.sum(acc * q_tile.load(layout_o).to(gl.float32), 1)
                gl.store(p_product + o_stats + o_row, product, mask=o_row < positions)
            if SPLIT:
                o_head = ((part * batch + b).to(gl.int64) * positions * heads + h) * BLOCK_D
                o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout_o))
                p_rows = p_dq + o_head + o_row[:, None].to(gl.int64) * (heads * BLOCK_D) + o_d[None, :]
                gl.store(p_rows, acc, mask=(o_row < positions)[:, None])
            else:
                o_head = ((b * frames + frame).to(gl.int64) * positions * heads + h) * BLOCK_D
                _store_sums(acc, q_tile, p_dq, o_head, first_row, positions, heads * BLOCK_D, BLOCK_D, ADD)
        else:
            # All of this group's rows lie past the frame: let the tiles go by.
            for _ in range(count):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase, STAGES)
        fence_async_shared()
        mbarrier.arrive(rows_empty.index(GROUP), count=1)


@gluon.jit
def grad_queries_hopper_kernel(
    d_q, d_k, d_v, d_gk, d_gv,  # descriptors of (B * N, H * D) rows, tiles (64, BLOCK_D)
    p_lse, p_delta,  # (B, H, N) float32
    p_dq,  # (B, N, H, D) contiguous, or float32 partial sums (S, B, P, H, D)
    p_product,  # queries . their gradient, (B, H, N)
    qk_scale,
    tiles, batch, frames, positions, parts, heads,  # parts: query frames, or key splits of one
    first_query_frame, band, width, split_keys,
    BLOCK_D: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr, SPLIT: gl.constexpr, ADD: gl.constexpr,
    WITH_PRODUCT: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """`grad_queries_kernel` on a persistent grid. A tile's gradients are multiplied by its keys while the tensor cores
    have the next tile's scores in the queue. HELD: tensors of the rows that stay in registers, the queries first.
    """
    q_smem = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    k_smem = gl.allocate_shared_memory(d_k.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    if WITH_V:
        gv_smem = gl.allocate_shared_memory(d_gv.dtype, [2] + d_gv.block_type.shape, d_gv.layout)
        v_smem = gl.allocate_shared_memory(d_v.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    else:
        gv_smem = q_smem
        v_smem = k_smem
    if WITH_K:
        gk_smem = gl.allocate_shared_memory(d_gk.dtype, [2] + d_gk.block_type.shape, d_gk.layout)
    else:
        gk_smem = q_smem
    rows_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    rows_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(rows_full.index(i), count=1)
        mbarrier.init(rows_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize([
        (_consume_keys, (
            q_smem, gk_smem, gv_smem, k_smem, v_smem, rows_full, rows_empty, full, empty,
            p_lse, p_delta, p_dq, p_product,
            qk_scale, tiles, batch, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
            BLOCK_D, WITH_K, WITH_V, SPLIT, ADD, WITH_PRODUCT, STAGES, HELD, 0,
        )),
        (_consume_keys, (
            q_smem, gk_smem, gv_smem, k_smem, v_smem, rows_full, rows_empty, full, empty,
            p_lse, p_delta, p_dq, p_product,
            qk_scale, tiles, batch, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
            BLOCK_D, WITH_K, WITH_V, SPLIT, ADD, WITH_PRODUCT, STAGES, HELD, 1,
        )),
        (_produce_keys, (
            d_q, d_k, d_v, d_gk, d_gv, q_smem, gk_smem, gv_smem, k_smem, v_smem, rows_full, rows_empty, full, empty,
            tiles, frames, positions, parts, heads, first_query_frame, band, width, split_keys,
            BLOCK_D, WITH_K, WITH_V, SPLIT, STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
