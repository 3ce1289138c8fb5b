"""What a run needs in memory at the very least, and what this machine has; only a hopeless run is refused."""

from __future__ import annotations

import os
from pathlib import Path

from vmonarch_cli.models.base import Grid, ModelEntry

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_bytes(model: ModelEntry, dtype: str) -> int:
    """Bytes of all weights: transformers and text encoder in `dtype`, the VAE in float32."""
    wide = model.transformer_params * model.transformers + model.text_encoder_params
    return wide * _BYTES[dtype] + model.vae_params * 4


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
