"""Tile sizes by kind of kernel, head dimension, dtype and shared-memory limit: a table, no autotuning.

The first call compiles what the table names and nothing else. `kernels/bench/search.py` measures
the neighbours of an entry on the machine at hand and prints a better one where there is one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from vmonarch_kernels.structure import L_DTYPE


def power_of_2(x: int) -> int:
    """The least power of two from ``x`` up."""
    return 1 << (x - 1).bit_length()


@dataclass(frozen=True)
class Chip:
    """What of a device decides about tiles and launches."""

    capability: tuple[int, int]
    """NVIDIA's compute capability; (0, 0) for AMD's GPUs and for Triton's interpreter, whose other values are an
    H100's.
    """
    multiprocessors: int
    shared_memory: int
    """Bytes a block may opt in to (99 KB on consumer cards, 227 KB on an H100, 64 KB on AMD's)."""
    dtype_8bit: torch.dtype
    """Of L and the residual in the kernels. GPUs before compute capability 8.9 and the interpreter cannot convert
    e4m3; there, and on AMD's GPUs, the kernels read and write its bytes, uint8, and convert those.
    """
    float32_precision: str = "tf32x3"
    """How float32 products are taken: as three tf32 ones on NVIDIA's tensor cores, which keeps float32's accuracy;
    "ieee" on AMD's GPUs, most of which have no tf32.
    """


@cache
def chip(device: torch.device) -> Chip:
    """What is known of a device. Kept, because asking takes longer than a launch."""
    if device.type != "cuda":
        return Chip((0, 0), 132, 227 * 1024, torch.uint8)
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        # torch gives AMD's architectures capabilities that mean other things here: gfx90a has (9, 0), as an H100.
        return Chip((0, 0), properties.multi_processor_count, 64 * 1024, torch.uint8, "ieee")
    capability = torch.cuda.get_device_capability(device)
    dtype = L_DTYPE if capability >= (8, 9) else torch.uint8
    return Chip(capability, properties.multi_processor_count, properties.shared_memory_per_block_optin, dtype)


@dataclass(frozen=True)
class AttendConfig:
    """Tile of an attention kernel: query rows, key rows, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


HOPPER_ROWS = 128
"""Query rows of ``attend_hopper_kernel``'s tile: 64 for each of two warp groups."""


@dataclass(frozen=True)
class HopperConfig:
    """Tile of ``attend_hopper_kernel``: key rows, and stages of keys and of queries."""

    block_n: int
    stages: int
    query_stages: int


@dataclass(frozen=True)
class LStepConfig:
    """Tile of an L-step kernel: query frames, key frames, warps, pipeline stages, positions a program, and slices of
    the head dimension that it works through one after another (where all frames are in one tile).
    """

    block_l: int
    block_k: int
    num_warps: int
    num_stages: int
    strip: int
    parts: int = 1


def shared_memory_bytes(config: AttendConfig, head_dim: int, itemsize: int, value_tiles: int) -> int:
    """Shared memory of a tile: the queries once, keys and values once per pipeline stage."""
    query_tile = config.block_m * head_dim * itemsize
    key_tiles = config.num_stages * (1 + value_tiles) * config.block_n * head_dim * itemsize
    return query_tile + key_tiles


@cache
def attend_config(block_d: int, dtype: torch.dtype, limit: int, *, with_k: bool, with_v: bool) -> AttendConfig:
    """Tile of the R-step (``with_k``), of R-step with values (both) or of plain attention.

    Legal means: the accumulators stay in registers (block_m * block_d * accumulators <= 128
    float32 per thread) and the tile fits ``limit``; stages, then key rows, shrink until it does.
    """
    accumulators = int(with_k) + int(with_v)
    if dtype == torch.float32:
        config = AttendConfig(32, 32, 4, 2) if block_d >= 128 else AttendConfig(64, 32, 4, 2)
    elif block_d <= 64:
        config = AttendConfig(128, 64, 4, 3) if accumulators == 1 else AttendConfig(64, 64, 4, 3)
    elif block_d == 128:
        config = AttendConfig(64, 64, 4, 3)
    else:
        config = AttendConfig(64, 32, 4 if accumulators == 1 else 8, 2)
    value_tiles = int(with_v)
    while shared_memory_bytes(config, block_d, dtype.itemsize, value_tiles) > limit:
        stages, rows = config.num_stages, config.block_n
        stages, rows = (stages - 1, rows) if stages > 1 else (1, rows // 2)
        if rows < 16:
            raise ValueError(f"no tile of head dimension {block_d} fits {limit} bytes of shared memory.")
        config = AttendConfig(config.block_m, rows, config.num_warps, stages)
    return config


@cache
def hopper_config(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], *, with_k: bool, with_v: bool
) -> HopperConfig | None:
    """Tile of ``attend_hopper_kernel``, or None where that kernel does not run.

    It needs compute capability 9.0, a 16-bit dtype and a head dimension whose sums fit the registers
    of two warp groups.
    """
    if capability != (9, 0) or dtype not in (torch.bfloat16, torch.float16) or head_dim not in (64, 128):
        return None
    if with_k and with_v:
        return HopperConfig(64, 4, 2) if head_dim == 128 else HopperConfig(128, 4, 2)
    if with_v:
        return HopperConfig(128, 3, 1) if head_dim == 128 else HopperConfig(128, 4, 2)
    return HopperConfig(128, 4, 2)


@cache
def l_output_config(frames: int, block_d: int, dtype: torch.dtype, limit: int, *, exact: bool) -> LStepConfig:
    """Tile of the last L-step; ``exact``: it merges an exact part, for which fewer registers are left.

    One tile of all frames up to 32 (64 where registers allow); then all key frames beside 32 query frames up to 128
    (also where registers allow), so that rows of L are whole; else 32 x 32. As many stages as fit ``limit`` bytes of
    shared memory.
    """
    block_l, block_k = _l_tile(frames, block_d, dtype)
    rows = 2 * block_k + (2 if exact else 1) * block_l  # in flight for each stage
    stages = _fitting_stages(3 if frames <= block_k <= 32 else 2, rows, block_l, block_d, dtype, limit)
    if frames > block_k or stages == 1:
        return LStepConfig(block_l, block_k, 4, stages, strip=1)
    warps = 2 if exact and block_k == 64 else _warps(block_k, block_d, dtype)
    return LStepConfig(block_l, block_k, warps, stages, strip=8, parts=_parts(block_k, block_d, dtype))


@cache
def r_queries_config(frames: int, block_d: int, dtype: torch.dtype, limit: int, *, from_l: bool) -> LStepConfig:
    """Tile of the step from L to the next R-step's queries; ``from_l``: L is read, not computed.

    As ``l_output_config``, but a stored L needs no whole rows: then all query frames up to 128 beside 64 key frames.
    """
    block_l, block_k = _l_tile(frames, block_d, dtype)
    if from_l and block_k == 128:
        block_l, block_k = 128, 64
    one_tile = frames <= block_l
    if one_tile and block_k >= 64:
        return LStepConfig(block_l, block_k, 4, num_stages=1, strip=1)
    stages = _fitting_stages(3 if one_tile else 2, block_k + block_l, block_k, block_d, dtype, limit)
    if not one_tile or stages == 1:
        return LStepConfig(block_l, block_k, 4, stages, strip=1)
    warps = _warps(block_k, block_d, dtype)
    return LStepConfig(block_l, block_k, warps, stages, strip=8, parts=_parts(block_k, block_d, dtype))


def _l_tile(frames: int, block_d: int, dtype: torch.dtype) -> tuple[int, int]:
    """Query and key frames of an L-step's tile in which rows of L are whole, or 32 x 32."""
    narrow = block_d <= 128 and dtype != torch.float32
    padded = max(16, power_of_2(frames))
    if padded <= (64 if narrow else 32):
        return padded, padded
    return 32, (128 if narrow and padded == 128 else 32)


def _warps(block_k: int, block_d: int, dtype: torch.dtype) -> int:
    """Two for small tiles of whole rows: half the threads, each with more rows in flight."""
    return 2 if block_k <= 16 or (block_k == 32 and block_d <= 128 and dtype != torch.float32) else 4


def _parts(block_k: int, block_d: int, dtype: torch.dtype) -> int:
    """Slices of the head dimension: two where a tile of whole rows would leave no registers to prefetch the next."""
    return 2 if block_k >= 32 and block_d == 128 and dtype != torch.float32 else 1


def _fitting_stages(stages: int, rows: int, out_rows: int, block_d: int, dtype: torch.dtype, limit: int) -> int:
    """As many of ``stages``, each of so many rows, as fit ``limit`` bytes beside one tile of the output."""
    row_bytes = block_d * dtype.itemsize
    while stages > 1 and 1024 + (out_rows + stages * rows) * row_bytes > limit:
        stages -= 1
    return stages
