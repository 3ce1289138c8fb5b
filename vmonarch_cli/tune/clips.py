"""The user's clips to tune a model with: `NAME.mp4` with its caption in `NAME.txt` beside it, as trainers of LoRAs
(musubi-tuner, diffusion-pipe) expect them. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import ENDINGS
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.text import shown
from vmonarch_cli.untrusted.files import read_text, user_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_OTHER_CLIPS = (".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
_MAX_CAPTION = 1 << 16


@dataclass(frozen=True)
class CaptionedClip:
    """A clip and what it shows."""

    path: Path
    caption: str

    def stamp(self) -> tuple[str, int, int]:
        """Name, size and time of change, which are others when the clip is another."""
        facts = self.path.stat()
        return self.path.name, facts.st_size, facts.st_mtime_ns


def find_clips(given: str) -> tuple[CaptionedClip, ...]:
    """The clips of a folder with their captions, in the order of names; InputError for anything that is not usable.

    Files of other kinds are left alone, but for videos that are no .mp4: leaving those out would go unnoticed.
    """
    folder = user_path(given, "--videos")
    if not folder.is_dir():
        raise InputError(f"--videos takes a folder of clips, and {shown(given)} is none")
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in _OTHER_CLIPS:
            raise InputError(f"{path} cannot be read: --videos takes {', '.join(ENDINGS)}; ffmpeg converts others")
        if path.suffix.lower() in ENDINGS and (path.suffix.lower() != ".png" or path.is_dir()):
            found.append(CaptionedClip(path, _caption(path)))
    if not found:
        raise InputError(f"--videos: {folder} holds no clip: NAME.mp4 with its caption in NAME.txt beside it is one")
    return tuple(found)


def _caption(clip: Path) -> str:
    path = clip.with_suffix(".txt")
    missing = f"clip {clip} has no caption: {path} is missing, which says what it shows"
    text = " ".join(read_text(path, f"caption {path}", missing=missing, limit=_MAX_CAPTION).split())
    if not text:
        raise InputError(f"caption {path} is empty: it says what {clip.name} shows")
    return checks.prompt(text)


def check_clips(
    clips: Sequence[CaptionedClip], plan: Plan, on_clip: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Decode all that will be used of every clip; InputError for the first that is damaged or too short.

    on_clip: gets (how many are done, how many there are).
    """
    from vmonarch_cli.media.read import first_frames

    for done, clip in enumerate(clips):
        on_clip(done, len(clips))
        count = sum(1 for _ in first_frames(clip.path, plan.num_frames, plan.fps))
        if count < plan.num_frames:
            raise InputError(
                f"clip {clip.path} is too short: it has {count} frames at {plan.fps} frames per second, and a clip of "
                f"this run takes {plan.num_frames}; --num-frames takes fewer"
            )


def pixels(clip: CaptionedClip, plan: Plan) -> NDArray[np.uint8]:
    """Frames (F, height, width, 3) of the plan's shape: the first ones, their middle cut to its proportions."""
    import numpy as np
    from PIL import Image, ImageOps

    from vmonarch_cli.media.read import first_frames

    size = (plan.width, plan.height)

    def fitted() -> Iterator[NDArray[np.uint8]]:
        for frame in first_frames(clip.path, plan.num_frames, plan.fps):
            yield np.asarray(ImageOps.fit(Image.fromarray(frame), size, Image.Resampling.BICUBIC))

    return np.stack(list(fitted()))
