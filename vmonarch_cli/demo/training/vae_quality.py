"""What the autoencoder is trained to lose little of, and how well it does: losses, PSNR, statistics of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_cli.demo.clips import NUM_FRAMES, SIZE, frame_times, render
from vmonarch_cli.demo.specs import sample_spec
from vmonarch_cli.families.wan_vae import decode_raw, encode_mean


def losses(
    recon: Tensor, video: Tensor, mean: Tensor, logvar: Tensor, *, kl_weight: float, polish: bool
) -> dict[str, Tensor]:
    """Training losses of a reconstruction; all tensors float32, videos (B, 3, F, H, W) in [-1, 1].

    Early on a robust error with image gradients, and squared error weighted up where a pixel differs from its frame's
    mean or from its own mean over time: objects cover little of a frame, and fast ones are the hardest to keep. In the
    polish phase plain squared error dominates, since PSNR is the bar.
    """
    squared = (recon - video).square()
    mse = squared.mean()
    robust = F.smooth_l1_loss(recon, video, beta=0.05)
    edges = (recon.diff(dim=-1) - video.diff(dim=-1)).abs().mean() + (
        recon.diff(dim=-2) - video.diff(dim=-2)
    ).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    if polish:
        loss = 25.0 * mse + 0.1 * robust + 0.1 * edges + kl_weight * kl
    else:
        away = (video - video.mean(dim=(-2, -1), keepdim=True)).abs().amax(dim=1, keepdim=True)
        moves = (video - video.mean(dim=2, keepdim=True)).abs().amax(dim=1, keepdim=True)
        loss = robust + 0.5 * edges + 2.0 * (squared * (1.0 + 2.0 * away + 2.0 * moves)).mean() + kl_weight * kl
    return {"loss": loss, "mse": mse, "psnr": -10.0 * torch.log10(mse / 4.0), "kl": kl, "scale": mean.std()}


@torch.no_grad()
def score_vae(
    vae: Any, device: torch.device, *, count: int = 16, size: int = SIZE, frames: int = NUM_FRAMES
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Reconstruction quality on the first `count` held-out clips of so many frames, in float32.

    Returns:
        PSNR in dB (mean over clips, and of the first, middle and last frame, with peak 1 for values in [0, 1]), the
        clips and their reconstructions (count, 3, frames, H, W) in [-1, 1] on the CPU.

    """
    originals, recons, per_clip = [], [], []
    for start in range(0, count, 4):
        specs = [sample_spec("heldout", 0, i, frames) for i in range(start, min(start + 4, count))]
        video = render(specs, frame_times(frames), size=size, device=device)
        recon = decode_raw(vae, encode_mean(vae, video)).clamp(-1, 1)
        mse = ((recon - video) / 2).square().mean(dim=(1, 3, 4))
        per_clip.append(mse)
        originals.append(video.cpu())
        recons.append(recon.cpu())
    mse = torch.cat(per_clip).double()

    def decibel(values: Tensor) -> float:
        return float((-10 * torch.log10(values.clamp(min=1e-12))).mean())

    report = {
        "psnr": decibel(mse.mean(dim=1)),
        "psnr_worst_clip": float(-10 * torch.log10(mse.mean(dim=1).max())),
        "psnr_first": decibel(mse[:, 0]),
        "psnr_middle": decibel(mse[:, mse.shape[1] // 2]),
        "psnr_last": decibel(mse[:, -1]),
        "clips": count,
    }
    return report, torch.cat(originals), torch.cat(recons)


@torch.no_grad()
def measure_latents(vae: Any, device: torch.device, *, count: int = 128, size: int = SIZE) -> tuple[list[float], ...]:
    """Mean and standard deviation of every latent channel over training clips."""
    total = squares = torch.zeros(1, dtype=torch.float64, device=device)
    number = 0
    for start in range(0, count, 8):
        specs = [sample_spec("train", 1, i) for i in range(start, min(start + 8, count))]
        latents = encode_mean(vae, render(specs, size=size, device=device)).double()
        total = total + latents.sum(dim=(0, 2, 3, 4))
        squares = squares + latents.square().sum(dim=(0, 2, 3, 4))
        number += latents.numel() // latents.shape[1]
    mean = total / number
    std = (squares / number - mean.square()).clamp(min=1e-12).sqrt()
    return [round(v, 6) for v in mean.tolist()], [round(v, 6) for v in std.tolist()]


def exported(directory: Path, device: torch.device) -> Any:
    """The autoencoder as a user loads it, in float32."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(directory).float().to(device).eval()
