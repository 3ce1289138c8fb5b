"""Tile sizes of the backward kernels: a table as in `configs.py`."""

from dataclasses import dataclass
from functools import cache

import torch

from vmonarch_kernels.configs import AttendConfig, Chip, LStepConfig, power_of_2


@dataclass(frozen=True)
class Parts:
    """What a kernel goes back through: R K (``k``), R V or the output (``v``); the last R-step has both."""

    k: bool
    v: bool

    @property
    def tensors(self) -> int:
        """Gradients, or keys and values, that it reads beside the queries."""
        return int(self.k) + int(self.v)


_SMALLEST = AttendConfig(16, 16, 4, 1)
"""Narrower tiles the tensor cores do not multiply; this one fits 99 KB at any head dimension."""


def _row_bytes(block_d: int, dtype: torch.dtype) -> int:
    """Shared memory of a row. A float32 product is three of tf32: the tensor cores of a warp group, which tiles of 64
    rows use, read both parts of its rows there; smaller tiles take five eighths more at a head dimension of 128, a
    quarter above it (as Triton compiles them).
    """
    row = block_d * dtype.itemsize
    if dtype == torch.float32:
        return row * 2 if block_d < 128 else row * 13 // 8 if block_d == 128 else row * 5 // 4
    return row


def tile_memory(chip: Chip) -> int:
    """Shared memory that tiles of rows may take. On compute capability 10 the weights of a tile go through it, too,
    because the tensor cores take no operand from registers there.
    """
    return chip.shared_memory - (64 * 1024 if chip.capability[0] == 10 else 0)


def product_precision(chip: Chip, block_d: int, parts: Parts) -> str:
    """Of float32 products. Where even the smallest tile's parts in tf32 do not fit, they are plain multiply-adds."""
    crowded = block_d > 128 and parts.tensors == 2 and tile_memory(chip) < 114 * 1024
    return "ieee" if crowded else chip.float32_precision


def _queries_memory(config: AttendConfig, row_bytes: int, parts: Parts) -> int:
    """Shared memory of ``grad_queries_kernel``: queries and gradients once, keys and values once per stage."""
    fixed = (1 + parts.tensors) * config.block_m
    return (fixed + config.num_stages * (1 + int(parts.v)) * config.block_n) * row_bytes


def _keys_memory(config: AttendConfig, row_bytes: int, parts: Parts) -> int:
    """Shared memory of ``grad_keys_kernel``: keys and values once, queries and gradients once per stage."""
    fixed = (1 + int(parts.v)) * config.block_n
    return (fixed + config.num_stages * (1 + parts.tensors) * config.block_m) * row_bytes


@cache
def grad_queries_config(block_d: int, dtype: torch.dtype, limit: int, parts: Parts) -> AttendConfig:
    """Tile of the kernel that goes over keys for a block of queries."""
    if dtype == torch.float32:
        config = AttendConfig(32, 32, 8 if block_d > 128 else 4, 2) if block_d >= 128 else AttendConfig(64, 32, 4, 2)
    elif block_d <= 64:
        config = AttendConfig(128, 64, 8, 3)
    elif block_d == 128:
        config = AttendConfig(128, 64, 8, 3) if parts.v else AttendConfig(64, 64, 4, 3)
    else:
        config = AttendConfig(64, 32, 8, 2)
    while _queries_memory(config, _row_bytes(block_d, dtype), parts) + 2048 > limit and config != _SMALLEST:
        config = _smaller(config, narrow_queries=False)
    return config


@cache
def grad_keys_config(block_d: int, dtype: torch.dtype, limit: int, parts: Parts) -> AttendConfig:
    """Tile of the kernel that goes over queries for a block of keys."""
    if dtype == torch.float32:
        config = AttendConfig(32, 32, 8 if block_d > 128 else 4, 2) if block_d >= 128 else AttendConfig(32, 64, 4, 2)
    elif block_d <= 64:
        config = AttendConfig(64, 128, 8, 3)
    elif block_d == 128:
        config = AttendConfig(64, 128, 8, 3) if parts.k and parts.v else AttendConfig(32, 64, 4, 3)
    else:
        config = AttendConfig(32, 64, 8, 2)
    while _keys_memory(config, _row_bytes(block_d, dtype), parts) + 2048 > limit and config != _SMALLEST:
        config = _smaller(config, narrow_queries=True)
    return config


def _smaller(config: AttendConfig, *, narrow_queries: bool) -> AttendConfig:
    """Fewer rows in the loop, then fewer stages, then fewer rows that stay."""
    looped, kept = (config.block_m, config.block_n) if narrow_queries else (config.block_n, config.block_m)
    stages = config.num_stages
    if stages > 2 or (looped == 16 and stages > 1):
        stages -= 1
    elif looped > 16:
        looped //= 2
    else:
        kept //= 2
    block_m, block_n = (looped, kept) if narrow_queries else (kept, looped)
    return AttendConfig(block_m, block_n, 4 if kept == 16 else config.num_warps, stages)


HOPPER_QUERY_ROWS = 64
"""Query rows of ``grad_keys_hopper_kernel``'s tile."""


@dataclass(frozen=True)
class HopperGradConfig:
    """Tile of a Hopper kernel: stages of what comes in the loop, and tensors of the rows that stay in registers."""

    stages: int
    held: int


@cache
def grad_hopper_configs(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], parts: Parts
) -> tuple[HopperGradConfig, HopperGradConfig] | None:
    """Tiles of ``grad_queries_hopper_kernel`` and ``grad_keys_hopper_kernel``, or None where they do not run (as
    ``configs.hopper_config``).
    """
    if capability != (9, 0) or dtype not in (torch.bfloat16, torch.float16) or head_dim not in (64, 128):
        return None
    if parts.k and parts.v:
        return HopperGradConfig(3, 2), HopperGradConfig(3, 0)
    return HopperGradConfig(4, 2), HopperGradConfig(4, int(parts.k))


@cache
def l_backward_config(frames: int, block_d: int, dtype: torch.dtype, limit: int) -> LStepConfig:
    """Tile of an L-step's backward: all frames in one up to 32 (64 where registers allow), else tiles of 32 x 32."""
    padded = max(16, power_of_2(frames))
    narrow = block_d <= 128 and dtype != torch.float32
    if padded > (64 if narrow else 32):
        return LStepConfig(32, 32, 4, num_stages=1, strip=1)
    row_bytes = padded * block_d * dtype.itemsize
    stages = 2 if 8 * row_bytes * 2 <= limit // 2 else 1
    return LStepConfig(padded, padded, 4, stages, strip=8 if stages > 1 else 1)
