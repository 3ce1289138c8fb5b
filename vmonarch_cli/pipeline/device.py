"""Devices and dtypes by name: what "auto" is on this machine, and what people call it."""

from __future__ import annotations

import platform

import torch

from vmonarch_cli.errors import DeviceError, InputError
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.plan.plan import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one. DeviceError for one that this machine lacks."""
    if name == "auto":
        if read_rank().world > 1:
            return own_device()
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device '{name}' is unknown: valid are auto, cpu, cuda and cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
            raise DeviceError(f"device '{name}' cannot be used: {built}; --device cpu works everywhere")
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise DeviceError(f"device '{name}' does not exist: this machine has cuda:0 to cuda:{count - 1}")
    return device


def own_device() -> torch.device:
    """The GPU of this process, or the CPU on a machine without one."""
    return torch.device("cuda", read_rank().local) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bfloat16 on a GPU and float32 on a CPU, where narrow arithmetic is slow."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype '{name}' is unknown: valid are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_vae_dtype(plan: Plan, dtype: torch.dtype) -> torch.dtype:
    """What the VAE of a plan decodes in, the rest of it being in `dtype`.

    "auto" is float32 for the families whose pipelines need it (Wan, Allegro, Motif), whose VAEs nobody has measured in
    a narrow dtype here, and the transformer's dtype for all others. Of the demo's VAE, which is one of these, frames in
    bfloat16 are 56 dB from those in float32, 54 dB at the least (`tests/bench/vae_dtype.py`, 4 rendered clips, CPU);
    from 45 dB on nobody sees a difference.
    """
    if plan.setup.vae_dtype != "auto":
        return DTYPES[plan.setup.vae_dtype]
    return DTYPES.get(plan.vae_dtype_unasked, dtype)


def device_name(device: torch.device) -> str:
    """For people: "NVIDIA H100 80GB HBM3", "CPU (x86_64, 2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'' if threads == 1 else 's'})"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as flags and records spell it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
