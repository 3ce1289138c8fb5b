"""Runs the autoencoder on single images with two-dimensional convolutions.

For a clip of one frame every causal convolution sees zeros in all but its newest tap, so its other taps need not be
computed at all, and the resampling blocks skip their time convolutions. This equals the whole-clip forward of one frame
(see the tests) at a third of the work, which matters for the first phase of training.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def encode_moments(vae: Any, images: Tensor) -> Tensor:
    """Mean and log-variance (B, 2 z, h, w) of the latents of images (B, 3, H, W) in [-1, 1]."""
    encoder = vae.encoder
    x = _conv(encoder.conv_in, images)
    for layer in encoder.down_blocks:
        x = layer.resample(x) if hasattr(layer, "resample") else _residual(layer, x)
    x = _middle(encoder.mid_block, x)
    x = _conv(encoder.conv_out, encoder.nonlinearity(_norm(encoder.norm_out, x)))
    return _conv(vae.quant_conv, x)


def decode_raw(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) from latents (B, z, h, w), without the final clamp."""
    decoder = vae.decoder
    x = _middle(decoder.mid_block, _conv(decoder.conv_in, _conv(vae.post_quant_conv, latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x)
        if block.upsamplers is not None:
            x = block.upsamplers[0].resample(x)
    return _conv(decoder.conv_out, decoder.nonlinearity(_norm(decoder.norm_out, x)))


def _conv(conv: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[1] // 2)


def _norm(norm: Any, x: Tensor) -> Tensor:
    out: Tensor = F.normalize(x.float(), dim=1).to(x.dtype) * norm.scale * norm.gamma.view(-1, 1, 1)
    return out


def _residual(block: Any, x: Tensor) -> Tensor:
    h = _conv(block.conv_shortcut, x) if hasattr(block.conv_shortcut, "weight") else x
    x = _conv(block.conv1, block.nonlinearity(_norm(block.norm1, x)))
    return _conv(block.conv2, block.nonlinearity(_norm(block.norm2, x))) + h


def _middle(block: Any, x: Tensor) -> Tensor:
    x = _residual(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(resnet, attention(x[:, :, None])[:, :, 0])
    return x
