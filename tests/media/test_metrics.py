"""PSNR, SSIM and relative error against values known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vmonarch_cli.media.metrics import psnr, relative_error, ssim


def test_psnr() -> None:
    a = torch.zeros(3, 4, 16, 16)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 0.1) == pytest.approx(20)
    assert psnr(a, a + 0.1, peak=2.0) == pytest.approx(20 + 20 * math.log10(2))


def test_ssim() -> None:
    torch.manual_seed(0)
    a = torch.rand(3, 2, 24, 24)
    assert ssim(a, a) == pytest.approx(1)
    noisy = [ssim(a, a + s * torch.randn_like(a)) for s in (0.01, 0.1, 0.5)]
    assert noisy == sorted(noisy, reverse=True)
    # Constant frames: only the luminance term is left.
    x, y = torch.full((16, 16), 0.4), torch.full((16, 16), 0.6)
    assert ssim(x, y) == pytest.approx((2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(a[..., :8], a[..., :8])


def test_values_are_those_of_scikit_image() -> None:
    """scikit-image 0.26: gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1."""
    y, x = np.mgrid[:24, :32]
    a = np.stack([7 * x + 3 * y, 5 * x + 11 * y, x * y]) % 256 / 255
    b = np.stack([7 * x + 3 * y + 9, 5 * x + 12 * y, x * y + x]) % 256 / 255
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(0.7684478566182525, rel=1e-9)
    assert psnr(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(14.265219477116748, rel=1e-9)


def test_relative_error() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0
    assert relative_error(a * 1.1, a) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(ValueError, match="shape"):
        relative_error(a, a[:1])
