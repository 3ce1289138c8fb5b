"""PSNR, SSIM and relative error against values known by hand."""

from __future__ import annotations

import math

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


def test_relative_error() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0
    assert relative_error(a * 1.1, a) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(ValueError, match="shape"):
        relative_error(a, a[:1])
