"""What decoding one clip takes at its peak, for the VAE of each family: the figures of `models/` (`DecoderPeak`).

    python tests/bench/decoder_memory.py [FAMILY ...]

Nothing is computed: the decoder of diffusers runs at its true size on torch's "meta" device, and the bytes of all
tensors that are alive are added up. Workspaces of convolutions and gaps of the allocator are not among them. Printed
are float32 channels of one full-size frame, at the shape of `models/` and, to see what grows with it, of fewer frames.
"""

from __future__ import annotations

import sys
import weakref
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
    """The peak in float32 channels of one frame."""
    kind, arguments, (temporal, spatial), latent, alone, (height, width, _) = FAMILIES[family]
    with torch.device("meta"):
        vae = getattr(diffusers, kind)(**arguments).eval()
        z = torch.empty(1, latent, (frames - alone) // temporal + alone, height // spatial, width // spatial)
        timestep = torch.empty(1)
    if tiled:
        vae.enable_tiling()
    alive = Alive()
    with torch.no_grad(), alive:
        if getattr(vae.config, "timestep_conditioning", False):
            vae.decode(z, timestep, return_dict=False)
        else:
            vae.decode(z, return_dict=False)
    return alive.peak / (height * width * 4)


def main() -> None:
    for family in sys.argv[1:] or FAMILIES:
        shape = FAMILIES[family][-1]
        temporal = FAMILIES[family][2][0]
        fewer = (shape[2] // 2) // temporal * temporal + shape[2] % temporal
        for frames in (shape[2], fewer):
            found = [channels(family, frames, tiled) for tiled in (False, True)]
            print(f"{family} {shape[1]}x{shape[0]} {frames} frames: untiled {found[0]:,.0f}, tiled {found[1]:,.0f}")


if __name__ == "__main__":
    main()
