"""How far one clip, or one tensor, is from another: PSNR, SSIM and relative error, in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SSIM_SIGMA = 1.5
_SSIM_RADIUS = 5


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of one shape; `inf` if they are equal.

    Args:
        a: any shape, values in a range of width `peak`.
        b: the same shape.
        peak: 1 for values in [0, 1], 2 for [-1, 1].

    """
    import math

    _same_shape(a, b)
    mse = float((a.double() - b.double()).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(peak * peak / mse)


SSIM_WINDOW = 11
"""Pixels of a side that `ssim` needs."""


def ssim(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Structural similarity (Wang et al. 2004), mean over frames, channels and valid windows; 1 if equal.

    The window is the usual Gaussian of 11 x 11 pixels with a deviation of 1.5, without padding.

    Args:
        a: frames (..., H, W) with H, W of 11 or more, values in a range of width `peak`.
        b: the same shape.
        peak: 1 for values in [0, 1], 2 for [-1, 1].

    """
    import torch
    from torch.nn.functional import conv2d

    _same_shape(a, b)
    if min(a.shape[-2:]) < 2 * _SSIM_RADIUS + 1:
        raise ValueError(f"a: got frames of {tuple(a.shape[-2:])} pixels, valid are 11 x 11 and larger")
    x = a.reshape(-1, 1, *a.shape[-2:]).double()
    y = b.reshape(-1, 1, *b.shape[-2:]).double()
    steps = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, device=a.device, dtype=torch.float64)
    window = torch.exp(-(steps**2) / (2 * _SSIM_SIGMA**2))
    window = window / window.sum()

    def blur(t: Tensor) -> Tensor:
        return conv2d(conv2d(t, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))

    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x * mean_x
    var_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return float((structure * luminance).mean())


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Euclidean norm, computed in float64; 0 if both are zero."""
    _same_shape(a, b)
    reference = float(b.double().norm())
    difference = float((a.double() - b.double()).norm())
    if reference == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / reference


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"b: got shape {tuple(b.shape)}, valid is that of a, {tuple(a.shape)}")
