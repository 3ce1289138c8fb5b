"""The memory that this machine can give to a new process."""

from __future__ import annotations

import os
from pathlib import Path


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
