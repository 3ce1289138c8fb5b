"""Read clips back: what `write_clip` wrote, as frames. No torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import ENDINGS


def read_clip(path: Path) -> NDArray[np.uint8]:
    """Frames (F, H, W, 3), uint8, of an .mp4, a .gif or a folder of PNGs; InputError when it cannot be read."""
    if not path.exists():
        raise InputError(f"there is no clip {path}")
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{path} is not a clip: valid endings are {', '.join(ENDINGS)}")
    try:
        frames = _read_folder(path) if path.is_dir() else _read_file(path)
    except (OSError, ValueError, RuntimeError, StopIteration, SyntaxError):
        raise InputError(f"clip {path} cannot be read: it is damaged or not what its name says") from None
    if not len(frames):
        raise InputError(f"clip {path} has no frames")
    return frames


def one_frame(path: Path, seconds: float) -> NDArray[np.uint8]:
    """The frame (H, W, 3) shown at a time; only a stretch of the file is decoded. InputError as read_clip."""
    if path.suffix.lower() != ".mp4":
        whole = read_clip(path)
        middle: NDArray[np.uint8] = whole[len(whole) // 2]
        return middle
    import imageio_ffmpeg

    try:
        with contextlib.closing(
            imageio_ffmpeg.read_frames(str(path.resolve()), input_params=["-ss", f"{max(0.0, seconds):.3f}"])
        ) as stream:
            width, height = next(stream)["size"]
            frame = np.frombuffer(next(stream), np.uint8).reshape(height, width, 3)
    except (OSError, ValueError, RuntimeError, StopIteration):
        raise InputError(f"clip {path} cannot be read: it is damaged or not what its name says") from None
    return frame


def _read_folder(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    frames = []
    for file in sorted(path.glob("*.png")):
        with Image.open(file) as image:
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def _read_file(path: Path) -> NDArray[np.uint8]:
    if path.suffix.lower() == ".gif":
        from PIL import Image, ImageSequence

        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    import imageio.v3 as imageio

    frames: NDArray[np.uint8] = imageio.imread(path.absolute(), plugin="FFMPEG")
    return frames
