"""The paper's algorithm with several latent frames to a block, for its ablation: eager, for accuracy and not for speed.

Blocks of b frames turn the T x P structure into ceil(T / b) x b P: L picks a block of b frames, R a position in it.
Wan's first latent frame stands for one video frame and the others for four, so where b does not divide T the blocks
are counted from the end and the first one is short: with T = 13 and b = 2 the first frame is alone and (1, 2), (3, 4),
... are pairs. The places before the short block are masked: no key there is ever attended, and their rows of L enter no
mean. Each starts its row of R (which the later frames at that place in their block use) from frame 0's query of the
same position. The first-frame recomputation concerns frame 0 alone, as with b = 1. Where b divides T the result is that
of `monarch_attention` on the grid (T / b, b H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmonarch_cli.attention.structured import Attention, AttentionCall
from vmonarch_cli.presets import Preset
from vmonarch_kernels import dense_attention
from vmonarch_kernels.cost import monarch_flops
from vmonarch_kernels.spec import Options

Grid = tuple[int, int, int]
_SCORES = 1 << 26  # entries of R held at once: 256 MiB


def attention_in_blocks(preset: Preset, frames_per_block: int) -> Attention:
    """A session's attention: the preset's `num_steps`, `c_floor` and `first_frame` with several frames to a block.

    ValueError at a call with text: joint attention has no frame blocks here.
    """

    def attend(call: AttentionCall) -> Tensor:
        if call.text is not None:
            raise ValueError("joint text-video attention does not run with several frames to a block")
        return block_attention(
            call.q,
            call.k,
            call.v,
            call.grid,
            frames_per_block=frames_per_block,
            num_steps=preset.num_steps,
            c_floor=preset.c_floor,
            first_frame=preset.first_frame,
        )

    return attend


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    frames_per_block: int,
    num_steps: int = 2,
    c_floor: float = 0.1,
    first_frame: bool = True,
) -> Tensor:
    """q, k, v (B, N, heads, D) -> (B, N, heads, D) in q's dtype, computed in float32 (float64 for float64)."""
    frames, positions = grid[0], grid[1] * grid[2]
    batch, tokens, heads, dim = q.shape
    missing = -frames % frames_per_block * positions
    blocks, size = (tokens + missing) // (frames_per_block * positions), frames_per_block * positions
    wide = torch.promote_types(q.dtype, torch.float32)

    def by_block(x: Tensor, fill: Tensor) -> Tensor:
        """(B, N, H, D) -> (B * H, blocks, size, D), with `fill` in the places before the short block."""
        x_BHND = torch.cat([fill, x], dim=1).permute(0, 2, 1, 3).to(wide)
        return x_BHND.reshape(batch * heads, blocks, size, dim)

    repeats = missing // positions
    q_ZTPD = by_block(q, q[:, :positions].repeat(1, repeats, 1, 1))
    k_ZTPD, v_ZTPD = (by_block(x, x.new_zeros(batch, missing, heads, dim)) for x in (k, v))
    masked = (torch.arange(blocks * size, device=q.device) < missing).view(blocks, size)

    out = torch.empty_like(q_ZTPD)
    chunk = max(1, _SCORES // (blocks * size * size))
    for first in range(0, batch * heads, chunk):
        part = slice(first, first + chunk)
        out[part] = _monarch(q_ZTPD[part], k_ZTPD[part], v_ZTPD[part], masked, num_steps, c_floor)
    result: Tensor = out.flatten(1, 2)[:, missing:].unflatten(0, (batch, heads)).permute(0, 2, 1, 3).to(q.dtype)
    if first_frame:
        result = result.contiguous()
        result[:, :positions] = dense_attention(q[:, :positions], k, v)
    return result


def _monarch(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, num_steps: int, c_floor: float) -> Tensor:
    """Steps 1 to 4 of the algorithm on (Z, blocks, size, D), with masked places (blocks, size)."""
    scale = q.shape[-1] ** -0.5
    alpha_r, c_r = q, torch.ones_like(q[..., 0])
    R = L = q.new_empty(0)
    for _ in range(num_steps):
        beta = scale * alpha_r / c_r.clamp_min(c_floor)[..., None]
        R = torch.softmax((beta @ k.mT).masked_fill(masked[:, None], float("-inf")), dim=-1)
        alpha_l = scale * (R @ k)
        c_l = torch.special.xlogy(R, R).sum(-1)
        L = torch.softmax(torch.einsum("zljd,zkjd->zlkj", q, alpha_l) - c_l[:, None], dim=2)
        seen = L.masked_fill(masked[:, None], 0.0)  # rows of masked queries enter no mean
        alpha_r, c_r = torch.einsum("zlkj,zljd->zkjd", seen, q), seen.sum(dim=1)
    return torch.einsum("zlkj,zkjd->zljd", L, R @ v)


def block_flops(grid: Grid, heads: int, head_dim: int, preset: Preset, frames_per_block: int) -> int:
    """Operations of one call, masked places counted: they are computed."""
    frames, positions = grid[0], grid[1] * grid[2]
    blocks = -(-frames // frames_per_block)
    shape = (blocks, frames_per_block * positions, 1)
    work = monarch_flops(shape, heads, head_dim, options=Options(preset.num_steps, first_frame=False))
    return work + (4 * positions * frames * positions * head_dim * heads if preset.first_frame else 0)
