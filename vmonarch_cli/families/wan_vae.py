"""Runs Wan's autoencoder on a whole clip at once, or gives its chunks as they come.

`AutoencoderKLWan.encode` and `decode` walk through a clip in chunks of four frames with a cache of features. That
bounds memory, but nobody sees a frame before the last one is made, it is bound by launches where clips are small, and
`decode` clamps its output, which stops gradients where they matter.

`decode_chunks` walks in the same chunks and hands them out. The other functions run the same modules on all frames
together and equal the chunked ones (see the tests):

- causal convolutions pad with zeros in front, as the empty cache does;
- the first frame skips `time_conv` in every resampling block.

These cover only the plain (Wan 2.1) blocks, not the residual ones of Wan 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def by_chunks(vae: Any) -> bool:
    """Whether `decode_chunks` does what this autoencoder's `decode` would do as it is now: it decodes no tiles."""
    return type(vae).__name__ == "AutoencoderKLWan" and not vae.use_tiling and not vae.use_slicing


def is_plain(vae: Any) -> bool:
    """Whether an autoencoder that is not tiled has Wan 2.1's blocks, which the functions for whole clips run."""
    return vae.config.patch_size is None and not vae.config.is_residual


def decode_chunks(vae: Any, latents: Tensor, together: int = 1) -> Iterator[Tensor]:
    """What `vae.decode` makes of latents (B, z, T, h, w), to the bit, in T parts: (B, 3, 1, H, W), then (B, 3, 4, H, W)
    each. With more latent frames `together` (of the plain blocks alone) a part has as many times 4 frames, which differ
    by rounding.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

    features: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    latents = vae.post_quant_conv(latents)
    for begin in (0, *range(1, latents.shape[2], together)):
        chunk = latents[:, :, begin : begin + (together if begin else 1)]
        part = vae.decoder(chunk, feat_cache=features, feat_idx=[0], first_chunk=begin == 0)
        if vae.config.patch_size is not None:
            part = unpatchify(part, patch_size=vae.config.patch_size)
        yield part.clamp(-1, 1)


def encode_moments(vae: Any, video: Tensor) -> Tensor:
    """Mean and log-variance of the latents, before any normalisation.

    Args:
        vae: an `AutoencoderKLWan` without patchifying.
        video: (B, 3, F, H, W) in [-1, 1] with F = 4 n + 1.

    Returns:
        (B, 2 z, (F - 1) / 4 + 1, H / s, W / s): means in the first z channels.

    """
    encoder = vae.encoder
    x = encoder.conv_in(video)
    for layer in encoder.down_blocks:
        x = _down(layer, x)
    x = encoder.mid_block(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x)))
    moments: Tensor = vae.quant_conv(x)
    return moments


def encode_mean(vae: Any, video: Tensor) -> Tensor:
    """Mean latents (B, z, T, h, w), not normalised."""
    return encode_moments(vae, video).chunk(2, dim=1)[0]


def decode_raw(vae: Any, latents: Tensor) -> Tensor:
    """Frames (B, 3, F, H, W) from latents (B, z, T, h, w), without the final clamp to [-1, 1]."""
    decoder = vae.decoder
    x = decoder.conv_in(vae.post_quant_conv(latents))
    x = decoder.mid_block(x)
    for block in decoder.up_blocks:
        x = _up(block, x)
    video: Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return video


def decode_normalised(vae: Any, latents: Tensor) -> Tensor:
    """Frames (B, 3, F, H, W) in [-1, 1] from the latents that the denoising loop ends with.

    Equals what `WanPipeline` does after its loop: undo the normalisation by the config's statistics, decode, clamp.
    """
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=latents.device, dtype=latents.dtype).view(shape)
    std = torch.tensor(vae.config.latents_std, device=latents.device, dtype=latents.dtype).view(shape)
    return decode_raw(vae, latents * std + mean).clamp(-1, 1)


def _down(layer: Any, x: Tensor) -> Tensor:
    if hasattr(layer, "resample"):
        return _resample_down(layer, x)
    out: Tensor = layer(x)
    return out


def _up(block: Any, x: Tensor) -> Tensor:
    for resnet in block.resnets:
        x = resnet(x)
    if block.upsamplers is not None:
        x = _resample_up(block.upsamplers[0], x)
    return x


def _resample_down(layer: Any, x: Tensor) -> Tensor:
    x = _per_frame(layer.resample, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def _resample_up(layer: Any, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, x.shape[1]))
        later = torch.stack((later[:, 0], later[:, 1]), dim=3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], later], dim=2)
    return _per_frame(layer.resample, x)


def _per_frame(module: Any, x: Tensor) -> Tensor:
    """Apply a module of images to every frame."""
    batch, frames = x.shape[0], x.shape[2]
    images = x.permute(0, 2, 1, 3, 4).reshape(batch * frames, x.shape[1], x.shape[3], x.shape[4])
    out: Tensor = module(images).unflatten(0, (batch, frames)).permute(0, 2, 1, 3, 4)
    return out
