"""The blocks of Wan's autoencoder with fewer passes over their tensors.

Three things of diffusers' blocks cost as much as the convolutions on a GPU, and more on a CPU: every convolution pads a
copy of its input, channels lie apart where the convolution's kernels want them side by side, and a norm with its
activation makes five tensors. `lean` mends all three while it is open. The frames equal the stock ones but for rounding
(see the tests).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def lean(vae: Any) -> Iterator[None]:
    """Run the decoder of an `AutoencoderKLWan` in float32 or bfloat16 with fewer passes.

    A module whose forward was replaced already, as by a `lean` around this one, stays as it is.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResidualBlock, WanRMS_norm

    replacements = {WanCausalConv3d: _causal_conv, WanRMS_norm: _rms_norm}
    modules = list(vae.decoder.modules())
    changed = [module for module in modules if type(module) in replacements and "forward" not in vars(module)]
    activations = [block.nonlinearity for block in modules if isinstance(block, WanResidualBlock)]
    _arrange(modules, torch.channels_last, torch.channels_last_3d)
    for module in changed:
        module.forward = partial(replacements[type(module)], module)
    for activation in activations:  # of a norm's result, which nobody else reads
        activation.inplace = True
    try:
        yield
    finally:
        _arrange(modules, torch.contiguous_format, torch.contiguous_format)
        for module in changed:
            del module.forward
        for activation in activations:
            activation.inplace = False


def _arrange(modules: list[Any], images: torch.memory_format, videos: torch.memory_format) -> None:
    """Lay out the weights of the convolutions of images and of videos."""
    for module in modules:
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            layout = images if isinstance(module, torch.nn.Conv2d) else videos
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


def by_channels(latents: Tensor) -> Tensor:
    """Latents (B, z, T, h, w) with the channels of a position side by side, as all tensors after them then are."""
    return latents.contiguous(memory_format=torch.channels_last_3d)


def _causal_conv(module: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """`WanCausalConv3d.forward`: only zeros before the first frame are copied, the convolution pads each frame."""
    columns, _, rows, _, missing, _ = module._padding
    if cache_x is not None and missing > 0:
        x = torch.cat([cache_x, x], dim=2)
        missing -= cache_x.shape[2]
    if missing > 0:
        x = F.pad(x, (0, 0, 0, 0, missing, 0))
    padding = 0, rows, columns
    return F.conv3d(x, module.weight, module.bias, module.stride, padding, module.dilation, module.groups)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    """`WanRMS_norm.forward` in two tensors: the factor of each position, and the result."""
    dim = 1 if module.channel_first else -1
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    out: Tensor = (x * length.clamp_min_(1e-12).reciprocal_().mul_(module.scale)).mul_(module.gamma)
    return out.add_(module.bias) if isinstance(module.bias, Tensor) else out
