"""PSNR of a Wan VAE's frames in a narrow dtype against float32, on latents of rendered clips: whether `--vae-dtype`
may be narrow. From 45 dB on nobody sees a difference.

    python tests/bench/vae_dtype.py [--vae FOLDER] [--clips N] [--device cuda] [--dtype bfloat16]

Prints one line a clip, then the mean and the least; 8-bit frames, as they are written. The default is the demo's VAE.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from vmonarch_cli.demo.clips import render
from vmonarch_cli.demo.score import held_out_specs
from vmonarch_cli.families.wan_vae import decode_chunks
from vmonarch_cli.models.demo import WEIGHTS


def eight_bits(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Frames of latents (1, z, T, h, w) as pixels from 0 to 255."""
    parts = [part.float() for part in decode_chunks(vae, latents.to(vae.dtype))]
    return ((torch.cat(parts, dim=2) + 1) * 127.5).round()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, default=WEIGHTS / "vae")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    given = parser.parse_args()
    wide, narrow = (
        AutoencoderKLWan.from_pretrained(given.vae, torch_dtype=dtype).to(given.device).eval()
        for dtype in (torch.float32, getattr(torch, given.dtype))
    )
    found = []
    for spec in held_out_specs(given.clips):
        latents = wide.encode(render([spec], size=given.size, device=given.device)).latent_dist.mean
        error = (eight_bits(wide, latents) - eight_bits(narrow, latents)).square().mean()
        found.append(float(10 * torch.log10(255**2 / error.clamp(min=1e-9))))
        print(f"{found[-1]:.1f} dB", flush=True)
    print(f"{given.dtype} against float32: mean {sum(found) / len(found):.1f} dB, least {min(found):.1f} dB")


if __name__ == "__main__":
    main()
