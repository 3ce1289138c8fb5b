"""Where the weights are while a clip is made: the fastest of four ways whose estimated peak fits the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from vmonarch_cli.errors import ModelError
from vmonarch_cli.pipeline import modular
from vmonarch_cli.plan.memory import (
    OFFLOAD_WORDS,
    decoding_bytes,
    largest_peaks,
    lighter_peaks,
    shape_of,
    weight_bytes,
)
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.text import binary_size


class Placement(NamedTuple):
    """Where the weights will be, one line that says why, and whether frames are decoded in tiles so that they fit."""

    mode: str
    words: str
    tiles: bool = False
    free: int | None = None
    """Bytes that were free when this was decided, where anybody looked."""


def choose(
    wanted: str,
    peaks: dict[str, int],
    free: int,
    *,
    whole: Mapping[str, int] | None = None,
    lighter: Mapping[str, int] = MappingProxyType({}),
) -> Placement:
    """The placement on a GPU. "auto" takes the first mode that fits; a named one is never changed.

    peaks: estimated bytes of each mode, the fastest first, decoding in tiles where they need less. whole: the same for
    full frames; tiles are taken where these do not fit and tiles do. free: bytes. lighter: least peak of the same clip
    with a field of its preset changed, the better results first.
    Raises ModelError when "auto" finds no mode that fits.
    """
    whole = peaks if whole is None else whole

    def placed(mode: str, why: str) -> Placement:
        tiles = peaks[mode] <= free < whole[mode]
        peak = peaks[mode] if tiles else whole[mode]
        words = f"about {binary_size(peak)} of {binary_size(free)} free"
        saved = f", decoding in tiles (full frames: {binary_size(whole[mode])})" if tiles else ""
        return Placement(mode, f"offload {mode}{why}{words}{saved}", tiles)

    if wanted != "auto":
        return placed(wanted, ", as asked: ")
    for mode, peak in peaks.items():
        if peak <= free:
            return placed(mode, f": {OFFLOAD_WORDS[mode]}, ")
    least = min(peaks.values())
    fits = next((change for change, peak in lighter.items() if peak <= free), None)
    way_out = "" if fits is None else f"with --set {fits} it needs about {binary_size(lighter[fits])}, or "
    raise ModelError(
        f"this size does not fit the memory in any offload mode: it needs about {binary_size(least)} and "
        f"{binary_size(free)} are free; {way_out}choose a smaller size, fewer frames or "
        "--quantize fp8-storage"
    )


def mode_for(plans: Sequence[Plan], device: str, dtype: str) -> Placement:
    """Where the weights will be on a GPU while plans of one model take turns.

    Reads the free memory once. Raises ModelError when a clip fits it in no mode.
    """
    free = torch.cuda.mem_get_info(device)[0]
    lighter = lighter_peaks(plans, dtype)
    whole = largest_peaks(plans, dtype, tiled=False)
    placement = choose(plans[0].setup.offload, largest_peaks(plans, dtype), free, whole=whole, lighter=lighter)
    return placement._replace(free=free)


def tiles_to_decode(plan: Plan, device: str, dtype: str) -> bool:
    """Whether the decoder alone needs tiles to fit the free memory of a GPU, and fits it with them."""
    free = torch.cuda.mem_get_info(device)[0]
    weights = weight_bytes(plan.model, dtype, to_decode=True)
    whole, tiles = decoding_bytes(plan.model, shape_of(plan), dtype, plan.setup.vae_dtype)
    return weights + tiles <= free < weights + whole


def place(pipeline: Any, mode: str, device: torch.device) -> None:
    """Put the weights where the mode has them; ValueError for a mode that is still to be decided."""
    by_blocks = modular.is_modular(pipeline)
    if mode == "none":
        pipeline.to(device)
    elif mode == "model":
        modular.offload_models(pipeline, device) if by_blocks else pipeline.enable_model_cpu_offload(device=device)
    elif mode == "group":
        # The hooks that fetch weights fire in forward, and pipelines call a VAE's encode and decode: it stays.
        stay = [name for name in ("vae", "audio_vae") if hasattr(pipeline, name)]
        options: dict[str, Any] = {
            "onload_device": device,
            "offload_device": torch.device("cpu"),
            "offload_type": "block_level",
            "num_blocks_per_group": 1,
            "use_stream": device.type == "cuda",
        }
        if by_blocks:
            modular.offload_groups(pipeline, stay, **options)
        else:
            pipeline.enable_group_offload(**options, exclude_modules=stay)
    elif mode == "sequential":
        modular.offload_layers(pipeline, device) if by_blocks else pipeline.enable_sequential_cpu_offload(device=device)
    else:
        raise ValueError(f"offload mode {mode!r} says no place: valid are {', '.join(OFFLOAD_WORDS)}")
