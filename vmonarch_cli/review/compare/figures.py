"""Measure clips against each other, frame by frame."""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import warnings
from typing import Any

import numpy as np
import torch

from vmonarch_cli.media.metrics import SSIM_WINDOW, psnr, ssim
from vmonarch_cli.review.compare.results import Distance, Frames
from vmonarch_cli.text import first_line


def distance(frames: Frames, reference: Frames, lpips: Any = None) -> Distance:
    """How far `frames` (F, H, W, 3) are from a reference of the same shape; `lpips` as `load_lpips` gives it."""
    per_frame = [(_unit(a), _unit(b)) for a, b in zip(frames, reference, strict=True)]
    ssims = [ssim(a, b) for a, b in per_frame] if min(frames.shape[1:3]) >= SSIM_WINDOW else []
    lpipses: list[float] = []
    if lpips is not None:
        with torch.no_grad():
            lpipses = [float(lpips(2 * a[None] - 1, 2 * b[None] - 1)) for a, b in per_frame]
    return Distance(
        identical=bool(np.array_equal(frames, reference)),
        psnr=psnr(_unit(frames), _unit(reference)),
        ssim=statistics.fmean(ssims) if ssims else None,
        lpips=statistics.fmean(lpipses) if lpipses else None,
        psnr_frames=[psnr(a, b) for a, b in per_frame],
        ssim_frames=ssims,
        lpips_frames=lpipses,
    )


def changes(frames: Frames) -> list[float]:
    """Mean absolute change of a pixel from each frame to the next, in 8-bit levels."""
    return [float(np.abs(b.astype(np.int16) - a).mean()) for a, b in itertools.pairwise(frames)]


def flicker(frames: Frames) -> float | None:
    """Mean over pixels of the change from a frame to the next that the frame after takes back, in 8-bit levels.

    A pixel that goes up and then down by at least 3 counts 3; one that keeps going counts 0. Steady motion passes over
    a pixel once and adds nothing, a pixel that flickers adds in every frame. None for fewer than three frames.
    """
    if len(frames) < 3:
        return None
    values = []
    for before, here, after in zip(frames, frames[1:], frames[2:], strict=False):
        rise, fall = here.astype(np.int16) - before, here.astype(np.int16) - after
        back = np.minimum(np.abs(rise), np.abs(fall)) * (np.sign(rise) * np.sign(fall) > 0)
        values.append(float(back.mean()))
    return statistics.fmean(values)


def load_lpips() -> tuple[Any, str | None]:
    """(LPIPS with AlexNet, None), or (None, why it is left out)."""
    try:
        from lpips import LPIPS
    except ImportError:
        return None, "LPIPS is left out: the lpips package is not installed"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return LPIPS(net="alex", verbose=False).eval(), None
    except Exception as error:  # whatever its download of AlexNet raises
        return None, f"LPIPS is left out: its network cannot be loaded ({first_line(error)})"


def _unit(frames: Frames) -> torch.Tensor:
    """Frames (..., H, W, 3) as (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255
