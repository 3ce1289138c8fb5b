"""What this machine is, told without importing torch: enough to find the timings that were recorded on it."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_NVIDIA = Path("/proc/driver/nvidia/gpus")


def device_key(device: str) -> str:
    """A name for "auto", "cpu", "cuda" or "cuda:N" under which timings are kept.

    A GPU's is its product name as torch says it, a CPU's its product name and the number of CPUs of this process.
    """
    if device == "auto":
        device = "cuda" if can_use_gpu() else "cpu"
    if device.startswith("cuda"):
        names, number = gpu_names(), int(device.partition(":")[2] or 0)
        return names[number] if number < len(names) else device
    return f"{_cpu_name()} x {_cpus()}"


def uses_gpu(device: str) -> bool:
    """Whether "auto", "cpu", "cuda" or "cuda:N" will be a GPU."""
    return device.startswith("cuda") or (device == "auto" and can_use_gpu())


def can_use_gpu() -> bool:
    """Whether "auto" will be the GPU: there is one, and torch is not a CPU build."""
    try:
        cpu_only = metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        cpu_only = True
    return not cpu_only and bool(gpu_names())


@cache
def gpu_names() -> tuple[str, ...]:
    """Product names of the NVIDIA GPUs, from the driver's files, or from nvidia-smi where a container hides them."""
    try:
        files = [folder / "information" for folder in sorted(_NVIDIA.iterdir())]
        return tuple(_field(file.read_text(), "Model") for file in files)
    except OSError:
        pass
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],  # noqa: S607 - the driver's, wherever it is
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def _cpu_name() -> str:
    try:
        return _field(Path("/proc/cpuinfo").read_text(), "model name") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _field(text: str, name: str) -> str:
    """The value of the first 'name : value' line, or an empty string."""
    for line in text.splitlines():
        label, _, value = line.partition(":")
        if label.strip() == name:
            return value.strip()
    return ""
