"""What decoding one clip takes at its peak, for the VAE of each family: the figures of `models/` (`DecoderPeak`).

    python tests/bench/decoder_memory.py [FAMILY ...]
    python tests/bench/decoder_memory.py --device cuda --json decoders.json [FAMILY ...]

Nothing is computed: the decoder of diffusers runs at its true size on torch's "meta" device, and the bytes of all
tensors that are alive are added up. Workspaces of convolutions and gaps of the allocator are not among them. Printed
are float32 channels of one full-size frame, at the shape of `models/` and, to see what grows with it, of fewer frames.

With a GPU the decoder runs there, with random weights in bfloat16, on clips of at most 33 frames, and what torch's
allocator had to give beyond the weights at the peak is measured, workspaces included.
"""

from __future__ import annotations

import argparse
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Family: (class of the VAE, its arguments where they are not the class's own, compression, latent channels, frames that
# are encoded alone, shape)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int], int, int, tuple[int, int, int]]] = {
    "wan2.1": ("AutoencoderKLWan", {}, (4, 8), 16, 1, (480, 832, 81)),
    "wan2.2": (
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
        (4, 16),
        48,
        1,
        (704, 1280, 121),
    ),
    "hunyuan": ("AutoencoderKLHunyuanVideo", {}, (4, 8), 16, 1, (720, 1280, 129)),
    "hunyuan1.5": ("AutoencoderKLHunyuanVideo15", {}, (4, 16), 32, 1, (480, 832, 121)),
    "cogvideox": ("AutoencoderKLCogVideoX", {}, (4, 8), 16, 1, (480, 720, 49)),
    "mochi": ("AutoencoderKLMochi", {}, (6, 8), 12, 1, (480, 848, 85)),
    "ltx": ("AutoencoderKLLTXVideo", {}, (8, 32), 128, 1, (512, 704, 161)),
    "ltx-2": ("AutoencoderKLLTX2Video", {}, (8, 32), 128, 1, (512, 768, 121)),
}


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators made and nobody has dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def channels(family: str, frames: int, tiled: bool) -> float:
    """The peak in float32 channels of one frame, of all tensors that are alive."""
    alive = Alive()
    run = decoding(family, frames, tiled, torch.device("meta"), torch.float32)
    with torch.no_grad(), alive:
        run()
    return alive.peak / (pixels(family) * 4)


def measured(family: str, frames: int, tiled: bool, device: torch.device) -> float:
    """The peak in bfloat16 channels of one frame, as torch's allocator on a GPU counts it, without the weights."""
    run = decoding(family, frames, tiled, device, torch.bfloat16)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / (pixels(family) * 2)


def pixels(family: str) -> int:
    height, width, _ = FAMILIES[family][-1]
    return height * width


def decoding(
    family: str, frames: int, tiled: bool, device: torch.device, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """What decodes one clip of the family's size with a decoder of random weights."""
    kind, arguments, (temporal, spatial), latent, alone, (height, width, _) = FAMILIES[family]
    with torch.device(device):
        vae = getattr(diffusers, kind)(**arguments).eval().to(dtype)
        shape = (1, latent, (frames - alone) // temporal + alone, height // spatial, width // spatial)
        z, timestep = torch.zeros(shape, dtype=dtype), torch.zeros(1, dtype=dtype)
    if tiled:
        vae.enable_tiling()
    others = (timestep,) if getattr(vae.config, "timestep_conditioning", False) else ()
    return lambda: vae.decode(z, *others, return_dict=False)[0]


def fewer(family: str, most: int) -> int:
    """The largest number of frames up to `most` that the family's decoder makes."""
    temporal, rest = FAMILIES[family][2][0], FAMILIES[family][-1][2] % FAMILIES[family][2][0]
    return (most - rest) // temporal * temporal + rest


def on_gpu(families: list[str], device: torch.device, target: Path | None) -> None:
    """What was measured of each family, written after each of them."""
    rows: list[dict[str, Any]] = []
    for family in families:
        frames = min(fewer(family, 33), FAMILIES[family][-1][2])
        for tiled in (False, True):
            row: dict[str, Any] = {"family": family, "frames": frames, "tiled": tiled}
            try:
                row["measured"] = measured(family, frames, tiled, device)
            except (RuntimeError, ValueError) as error:
                row["failure"] = str(error).splitlines()[0][:200]
            gc.collect()
            torch.cuda.empty_cache()
            rows.append(row)
            print(json.dumps(row), flush=True)
            if target is not None:
                facts = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "dtype": "bfloat16"}
                target.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--device", default="meta")
    parser.add_argument("--json", type=Path, help="write what a GPU took here")
    options = parser.parse_args()
    families = options.families or list(FAMILIES)
    if options.device != "meta":
        on_gpu(families, torch.device(options.device), options.json)
        return
    for family in families:
        shape = FAMILIES[family][-1]
        for frames in (shape[2], fewer(family, shape[2] // 2 + shape[2] % FAMILIES[family][2][0])):
            found = [channels(family, frames, tiled) for tiled in (False, True)]
            print(f"{family} {shape[1]}x{shape[0]} {frames} frames: untiled {found[0]:,.0f}, tiled {found[1]:,.0f}")


if __name__ == "__main__":
    main()
