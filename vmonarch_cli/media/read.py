"""Read clips back: what `write_clip` wrote, as frames. No torch.

A clip may be a stranger's file: only regular files are opened, and only as what their ending says. Everything that
reads an .mp4 or a .webm raises DeviceError without an ffmpeg that runs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.ffmpeg import as_kind, reader_of
from vmonarch_cli.media.paths import ENDINGS
from vmonarch_cli.media.pictures import load_picture, to_rgb
from vmonarch_cli.untrusted.files import require_regular

Frames = NDArray[np.uint8]
_T = TypeVar("_T")
_PICTURES = {".gif": ("GIF", 100, 50), ".webp": ("WEBP", 1000, 240)}
"""Ending -> Pillow's name of the format, its ticks of a second, and the most frames that a second has."""
_MAX_PICTURES = 4096
_VIDEO_ENDINGS = (".mp4", ".webm", ".gif", ".webp")


def read_clip(path: Path, fps: int | None = None) -> Frames:
    """Frames (F, H, W, 3), uint8, of a clip of any ending (see `ENDINGS`); InputError when it cannot be read.

    fps: the rate that the clip was written with, if it is known; it tells how many frames a merged frame of a GIF was.
    """
    frames = _of_kind(path, _read_mp4, lambda pictures: _read_pictures(pictures, fps), _read_folder)
    if not len(frames):
        raise InputError(f"clip {path} has no frames")
    return frames


def first_frames(path: Path, count: int, fps: int) -> Iterator[Frames]:
    """The first `count` frames (H, W, 3), uint8, of a clip, one after the other; InputError when one cannot be read.

    fps: frames are those of this rate. An .mp4 of another one is brought to it: frames are repeated or left out. GIFs
    and folders are taken as they are. A clip that is shorter gives all that it has.
    """

    def of_mp4(file: Path) -> Iterator[Frames]:
        return _decoded(file, [], ["-vf", f"fps={fps}"])

    def read() -> Iterator[Frames]:
        frames = _of_kind(path, of_mp4, lambda pictures: iter(_read_pictures(pictures, fps)), _in_turn)
        yield from itertools.islice(frames, count)

    with _one_sentence(path):  # a generator does its work when it is asked for frames
        yield from read()


def read_frames(path: Path, count: int) -> Frames:
    """The first frames (count, H, W, 3), uint8, of a user's video file; of an .mp4 or a .webm no more are decoded.

    InputError when it cannot be read, or has fewer.
    """

    def of_mp4(file: Path) -> Frames:
        return np.stack(list(itertools.islice(_decoded(file, []), count)))

    frames = _of_user(path, of_mp4, lambda pictures: _read_pictures(pictures, None)[:count])
    if len(frames) < count:
        raise InputError(
            f"video {path} has {len(frames)} frames and the clip {count}: choose fewer frames with --num-frames, or a "
            "longer video"
        )
    return frames


def last_frames(path: Path, count: int) -> Frames:
    """The last frames (count, H, W, 3), uint8, of a user's video file; InputError when it cannot be read, or has
    fewer.
    """

    def of_mp4(file: Path) -> Frames:
        return np.stack(list(deque(_decoded(file, []), maxlen=count)))

    frames = _of_user(path, of_mp4, lambda pictures: _read_pictures(pictures, None)[-count:])
    if len(frames) < count:
        raise InputError(
            f"video {path} has {len(frames)} frames, and a clip goes on from the last {count}: give a longer video"
        )
    return frames


def _of_user(path: Path, mp4: Callable[[Path], Frames], pictures: Callable[[Path], Frames]) -> Frames:
    """What the reader of its kind makes of a video file; InputError where it is none."""
    if path.suffix.lower() not in _VIDEO_ENDINGS:
        raise InputError(f"video {path} cannot be read: valid are files that end in {', '.join(_VIDEO_ENDINGS)}")
    return _of_kind(path, mp4, pictures, _no_folder, "video")


def _no_folder(path: Path) -> Frames:
    raise InputError(f"video {path} is a folder, not a file")


def one_frame(path: Path, seconds: float) -> Frames:
    """The frame (H, W, 3) shown at a time, of a GIF, a WebP or a folder the middle one; InputError as read_clip."""

    def of_mp4(file: Path) -> Frames:
        return next(_decoded(file, ["-ss", f"{max(0.0, seconds):.3f}"]))

    def of_gif(file: Path) -> Frames:
        frames = _read_pictures(file, None)
        middle: Frames = frames[len(frames) // 2]
        return middle

    def of_folder(folder: Path) -> Frames:
        files = _pictures(folder)
        return _read_picture(files[len(files) // 2])

    return _of_kind(path, of_mp4, of_gif, of_folder)


def _of_kind(
    path: Path,
    mp4: Callable[[Path], _T],
    gif: Callable[[Path], _T],
    folder: Callable[[Path], _T],
    thing: str = "clip",
) -> _T:
    """What the reader of a clip's kind makes of it; `thing` names it in sentences."""
    if not path.exists():
        raise InputError(f"there is no {thing} {path}")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"{path} is not a clip: valid endings are {', '.join(ENDINGS)}")
    with _one_sentence(path, thing):
        if path.is_dir() or ending == ".png":
            return folder(path)
        require_regular(path, f"{thing} {path}")
        return gif(path) if ending in _PICTURES else mp4(path)


@contextlib.contextmanager
def _one_sentence(path: Path, thing: str = "clip") -> Iterator[None]:
    """Whatever the readers raise for a damaged file becomes an InputError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, StopIteration, SyntaxError, IndexError, EOFError):
        codec = thing == "video" and path.suffix.lower() not in _PICTURES
        more = ", or has no pictures of a codec that ffmpeg knows" if codec else ""
        raise InputError(f"{thing} {path} cannot be read: it is damaged or not what its name says{more}") from None


def _pictures(folder: Path) -> list[Path]:
    """The frames of a folder, or of a picture that is a clip of one frame."""
    return sorted(folder.glob("*.png")) if folder.is_dir() else [folder]


def _in_turn(folder: Path) -> Iterator[Frames]:
    return (_read_picture(file) for file in _pictures(folder))


def _read_folder(folder: Path) -> Frames:
    return np.stack([_read_picture(file) for file in _pictures(folder)])


def _read_picture(file: Path) -> Frames:
    return np.asarray(load_picture(file, f"frame {file}", formats=("PNG",), valid="it is not a PNG, or damaged"))


def _read_mp4(path: Path) -> Frames:
    return np.stack(list(_decoded(path, [])))


def _decoded(path: Path, flags: list[str], filters: Sequence[str] = ()) -> Iterator[Frames]:
    """Frames (H, W, 3) as ffmpeg decodes them."""
    import imageio_ffmpeg

    reader_of(path)  # a missing ffmpeg is no fault of the clip
    # An absolute path: a name with a colon would be an address.
    stream = imageio_ffmpeg.read_frames(
        str(path.resolve()), input_params=[*as_kind(path), *flags], output_params=list(filters)
    )
    with contextlib.closing(stream):
        width, height = next(stream)["size"]
        for content in stream:
            yield np.frombuffer(content, np.uint8).reshape(height, width, 3)


def _read_pictures(path: Path, fps: int | None) -> Frames:
    """Every frame of a GIF or WebP as often as it was written: Pillow, as others, merges frames that are equal."""
    from PIL import Image, ImageSequence

    frames: list[Frames] = []
    ends: list[int] = []
    kind, ticks, fastest = _PICTURES[path.suffix.lower()]
    with Image.open(path, formats=(kind,)) as image:
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(to_rgb(frame, f"clip {path}")))
            ends.append(round(frame.info.get("duration", 0) * ticks / 1000) + (ends[-1] if ends else 0))
    rates = [fps] if fps is not None else range(1, fastest + 1)
    numbers = next(filter(None, (_frame_numbers(ends, rate, ticks) for rate in rates)), list(range(1, len(ends) + 1)))
    if numbers[-1] > _MAX_PICTURES:
        raise InputError(f"clip {path} lasts for {numbers[-1]:,} frames: valid are up to {_MAX_PICTURES:,}")
    repeats = [after - before for before, after in itertools.pairwise([0, *numbers])]
    return np.repeat(np.stack(frames), repeats, axis=0)


def _frame_numbers(ends: Sequence[int], fps: int, ticks: int) -> list[int] | None:
    """How many frames of a rate are over at each end (`ticks` a second); None where the ends are of no such rate.

    `write_clip` ends frame n at round(ticks n / fps).
    """
    numbers: list[int] = []
    for end in ends:
        last = numbers[-1] if numbers else 0
        near = round(end * fps / ticks)
        number = next((n for n in (near - 1, near, near + 1) if n > last and round(ticks * n / fps) == end), None)
        if number is None:
            return None
        numbers.append(number)
    return numbers
