"""Floating-point operations and memory of dense and structured attention; imports no torch.

A multiply-add counts as two operations. With N = T * P tokens the unit is N * P * D per head:
dense attention costs 4 T units, an R-step 4 (6 with V beside K), the exact band 4 (2w + 1), the
first frame and every other recomputed one 4, an L-step 4 T / P. The paper's own figures leave out
the first-frame recomputation.
"""

from fractions import Fraction

from vmonarch_kernels.spec import PAPER, Grid, Options

LARGEST_SMALL = 65536
"""Tokens times heads of a sample up to which a call is small. Six launches cost the host 0.4 ms or more; a call with
393,120 (Wan2.1-1.3B at 832x480, 81 frames) has 2 ms of work on a H200, and the copies of this many take 0.1 ms.
"""
L_ROW_ENTRIES = 8
"""Entries of L that the kernels read and write at a time: its rows begin on multiples of it."""


def window_frames(frames: int, band: int | None) -> int:
    """Number of key frames that every query frame sees exactly (0 without a band)."""
    return 0 if band is None else min(2 * band + 1, frames)


def is_exact(frames: int, band: int | None) -> bool:
    """Whether the structure degenerates to dense attention: one frame, or a band over all frames.

    ``band >= T - 1`` by definition; a clamped window also covers all frames once 2w + 1 >= T.
    """
    return frames == 1 or window_frames(frames, band) >= frames


def refresh_period(refresh: float) -> int:
    """Calls after which the number of recomputed frames repeats: 5 for 0.8, 1 for whole numbers; at most 8."""
    return Fraction(refresh).limit_denominator(8).denominator


def band_with_refresh(frames: int, band: int | None, refresh: float, *, first_frame: bool) -> int | None:
    """The band, or one over all frames where every frame would be recomputed in every call."""
    return frames if refresh and refresh + int(first_frame) >= frames else band


def dense_flops(grid: Grid, heads: int, head_dim: int, batch: int = 1, *, others: int = 0) -> int:
    """Operations of one dense self-attention call (two products, softmax not counted); ``others``: tokens beside those
    of the grid.
    """
    tokens = grid[0] * grid[1] * grid[2] + others
    return 4 * tokens * tokens * head_dim * heads * batch


def monarch_flops(
    grid: Grid,
    heads: int,
    head_dim: int,
    batch: int = 1,
    *,
    options: Options = PAPER,
    warm: bool = False,
    refresh: float = 0,
    others: int = 0,
) -> int:
    """Operations of one structured call with everything counted, L-steps and exact parts included.

    ``warm`` adds the product that turns the stored L into the first R-step's queries. ``refresh`` is the number of
    frames recomputed in a call; it may be the mean of several calls. ``others`` are tokens beside those of the grid:
    exact keys for all its queries, and exact queries of all keys.
    """
    frames, positions = grid[0], grid[1] * grid[2]
    num_steps, first_frame, band = options.num_steps, options.first_frame, options.band
    if is_exact(frames, band_with_refresh(frames, band, refresh, first_frame=first_frame)):
        return dense_flops(grid, heads, head_dim, batch, others=others)
    tokens = frames * positions
    beside = 4 * others * (2 * tokens + others) * head_dim * heads * batch
    unit = frames * positions * positions * head_dim * heads * batch
    r_steps = 4 * (num_steps - 1) + 6
    exact = 4 * window_frames(frames, band) + 4 * (int(first_frame) + refresh)
    l_products = 2 * num_steps + (1 if warm else 0)
    l_steps = l_products * 2 * frames * frames * positions * head_dim * heads * batch
    return round(unit * (r_steps + exact)) + l_steps + beside


def l_row_entries(frames: int) -> int:
    """Entries from one row of a stored L to the next."""
    return -(-frames // L_ROW_ENTRIES) * L_ROW_ENTRIES


def is_small(tokens: int, heads: int) -> bool:
    """Whether structured calls of so many tokens (of a sample) and heads are replayed as CUDA graphs."""
    return tokens * heads <= LARGEST_SMALL


def l_bytes(grid: Grid, heads: int, batch: int = 1) -> int:
    """Bytes of the L of one layer and guidance branch that a warm start keeps: one e4m3 byte per entry, rows padded."""
    frames, positions = grid[0], grid[1] * grid[2]
    return batch * heads * positions * frames * l_row_entries(frames)


def residual_bytes(grid: Grid, heads: int, head_dim: int, batch: int = 1) -> int:
    """Bytes of the residual that frame refresh keeps of one layer and guidance branch: e4m3, and a float32 scale for
    each token and head.
    """
    return batch * grid[0] * grid[1] * grid[2] * heads * (head_dim + 4)


def dense_bytes(grid: Grid, heads: int, head_dim: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes that one dense call must move: q, k, v and the output once."""
    return 4 * grid[0] * grid[1] * grid[2] * heads * head_dim * batch * itemsize


def monarch_bytes(
    grid: Grid,
    heads: int,
    head_dim: int,
    batch: int = 1,
    itemsize: int = 2,
    *,
    options: Options = PAPER,
    warm: bool = False,
    refresh: float = 0,
) -> int:
    """Bytes that one structured call must move when every step reads each input and writes each output once.

    In tensors of q's size: an R-step 3 (5 with V), an L-step 3 (the last 4, 5 with exact parts), the band 4, the
    first frame 2. A ``warm`` call adds 2 and the stored L, which it reads and writes again. Float32 statistics are
    left out.
    """
    frames, num_steps, first_frame, band = grid[0], options.num_steps, options.first_frame, options.band
    if is_exact(frames, band_with_refresh(frames, band, refresh, first_frame=first_frame)):
        return dense_bytes(grid, heads, head_dim, batch, itemsize)
    tensors = 3 * num_steps + 2 + 3 * (num_steps - 1) + 4 + (2 if first_frame else 0) + (2 if warm else 0)
    if band is not None:
        tensors += 4 + 1
    tensor = dense_bytes(grid, heads, head_dim, batch, itemsize) // 4
    total = tensors * tensor
    if warm:
        total += 2 * l_bytes(grid, heads, batch)
    if refresh:  # every recomputed frame reads all keys and values; the residual is read once
        total += round(2 * refresh * tensor) + residual_bytes(grid, heads, head_dim, batch)
    return total
