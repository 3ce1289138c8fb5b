"""What a run needs in memory at the very least, and what this machine has; only a hopeless run is refused."""

from __future__ import annotations

import os
from pathlib import Path

from vmonarch_cli.models.base import Grid, ModelEntry

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_RESERVE = 500_000_000  # the CUDA context's libraries and the allocator's gaps


def weight_bytes(model: ModelEntry, dtype: str, *, to_decode: bool = False) -> int:
    """Bytes of all weights, or of those that decoding needs: in `dtype`, but the VAE in float32 where the family needs
    it.
    """
    wide = 0 if to_decode else model.transformer_params * model.transformers + model.text_encoder_params
    return wide * _BYTES[dtype] + model.vae_params * (4 if model.vae_float32 else _BYTES[dtype])


def activation_bytes(model: ModelEntry, grid: Grid, dtype: str) -> int:
    """A lower bound of the transformer's working set: residual, q, k, v and output, and the feed-forward's middle."""
    tokens = grid[0] * grid[1] * grid[2]
    return tokens * (5 * model.hidden_dim + model.ffn_dim) * _BYTES[dtype]


def decode_bytes(height: int, width: int, num_frames: int) -> int:
    """A lower bound of decoding: the frames once in float32 and once in 8 bits."""
    return num_frames * height * width * 3 * (4 + 1)


def at_least(model: ModelEntry, grid: Grid, height: int, width: int, num_frames: int, dtype: str) -> int:
    """Bytes below which a run that keeps all weights in memory cannot succeed."""
    working = max(activation_bytes(model, grid, dtype), decode_bytes(height, width, num_frames))
    return weight_bytes(model, dtype) + working


def peaks(
    model: ModelEntry,
    grid: Grid,
    height: int,
    width: int,
    num_frames: int,
    dtype: str,
    *,
    quantize: str | None = None,
    vae_tiling: bool = False,
    kept: int = 0,
) -> dict[str, int]:
    """Estimated peak bytes on the device in each offload mode, the fastest mode first.

    A step's working set is taken as twice the lower bound of `activation_bytes`, decoding as 40 float32 channels of
    one group of frames at full size (a sixth of it in tiles) beside the frames. ``kept`` is what attention hands on
    from step to step.
    """
    width_of = _BYTES[dtype]
    transformer = model.transformer_params * (1 if quantize else width_of)
    text = model.text_encoder_params * width_of
    vae = model.vae_params * (4 if model.vae_float32 else width_of)
    working = kept + 2 * activation_bytes(model, grid, dtype) + model.transformer_params // model.layers * width_of
    group = model.vae_temporal * height * width * 40 * (4 if model.vae_float32 else width_of)
    decoding = decode_bytes(height, width, num_frames) + (group // 6 if vae_tiling else group)
    layer = 4 * (transformer // model.layers)
    return {
        "none": transformer * model.transformers + text + vae + max(working, decoding) + _RESERVE,
        "model": max(text, transformer + working, vae + decoding) + _RESERVE,
        "group": vae + max(text // 4, layer + working, decoding) + _RESERVE,
        "sequential": max(text // 12, layer // 4 + working, vae // 4 + decoding) + _RESERVE,
    }


def available_bytes() -> int:
    """Memory that a new process can use: free and reclaimable RAM plus free swap, within the container's limit."""
    return min(_machine_available(), _cgroup_available())


def _machine_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return table["MemAvailable"] + table.get("SwapFree", 0)
    except (OSError, KeyError, ValueError, IndexError):  # not Linux: the whole of the RAM is the best bound there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available() -> int:
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return 2**63 if limit == "max" else int(limit) - used + int(stat.get("file", 0))
    except (OSError, ValueError):
        return 2**63
