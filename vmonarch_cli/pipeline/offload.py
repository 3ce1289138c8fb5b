"""Where the weights are while a clip is made: the fastest of four ways whose estimated peak fits the card."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from vmonarch_cli.errors import ModelError
from vmonarch_cli.pipeline.device import dtype_name
from vmonarch_cli.plan import memory
from vmonarch_cli.plan.resolve import Plan, kept_bytes
from vmonarch_cli.presets import apply_overrides, parse_assignment
from vmonarch_cli.text import binary_size

WORDS = {
    "none": "all weights stay on the device",
    "model": "one component at a time is on the device",
    "group": "the VAE and a few transformer blocks at a time are on the device",
    "sequential": "one layer at a time is on the device",
}


def choose(
    wanted: str,
    peaks: dict[str, int],
    free: int,
    device: torch.device,
    *,
    lighter: Mapping[str, int] = MappingProxyType({}),
) -> tuple[str, str]:
    """(mode, one line that says why). "auto" takes the first mode whose peak fits; a named mode is never changed.

    ``lighter``: least peak of the same clip with a field of its preset changed, the better results first.

    Raises ModelError when none fits, or the named one does not even by the lower bound of the estimate.
    """
    if device.type == "cpu":
        return "none", "on a CPU there is nothing to offload to"
    if wanted != "auto":
        return wanted, f"offload {wanted}, as asked: about {binary_size(peaks[wanted])} of {binary_size(free)} free"
    for mode, peak in peaks.items():
        if peak <= free:
            return mode, f"offload {mode}: {WORDS[mode]}, about {binary_size(peak)} of {binary_size(free)} free"
    least = min(peaks.values())
    fits = next((change for change, peak in lighter.items() if peak <= free), None)
    way_out = "" if fits is None else f"with --set {fits} it needs about {binary_size(lighter[fits])}, or "
    raise ModelError(
        f"this size does not fit the memory in any offload mode: it needs about {binary_size(least)} and "
        f"{binary_size(free)} are free; {way_out}choose a smaller size, fewer frames, --vae-tiling or "
        "--quantize fp8"
    )


def mode_for(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(mode, one line) of where the weights will be; ModelError when the clip fits the memory in none."""
    if device.type == "cpu":
        return choose(plan.setup.offload, {}, 0, device)
    free = torch.cuda.mem_get_info(device)[0]
    name = dtype_name(dtype)
    return choose(plan.setup.offload, peaks_of(plan, name), free, device, lighter=lighter_peaks(plan, name))


def peaks_of(plan: Plan, dtype: str) -> dict[str, int]:
    """Estimated peak of each mode for a plan, the fastest mode first."""
    return memory.peaks(
        plan.model,
        plan.grid,
        plan.height,
        plan.width,
        plan.num_frames,
        dtype,
        quantize=plan.setup.quantize,
        vae_tiling=plan.setup.vae_tiling,
        kept=kept_bytes(plan),
    )


def lighter_peaks(plan: Plan, dtype: str) -> dict[str, int]:
    """Least peak of a plan if its preset kept fewer corrections of frames, or none, by what `--set` takes for it."""

    def least(assignment: str) -> int:
        name, value = parse_assignment(assignment)
        preset = apply_overrides(plan.preset, {name: ("--set", value)})
        return min(peaks_of(plan.model_copy(update={"preset": preset}), dtype).values())

    return {words: least(words) for words in ("shared_refresh=true", "refresh=0")} if plan.preset.refresh else {}


def place(pipeline: Any, mode: str, device: torch.device) -> None:
    """Put the weights where the mode has them."""
    if mode == "none":
        pipeline.to(device)
    elif mode == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif mode == "group":
        pipeline.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
            # The hooks that fetch weights fire in forward, and pipelines call the VAE's encode and decode: it stays.
            exclude_modules="vae",
        )
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
