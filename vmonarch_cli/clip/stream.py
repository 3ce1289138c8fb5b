"""From latents to a file: parts of the clip are written while later ones are decoded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.clip.stopwatch import Stopwatch
from vmonarch_cli.media.paths import DEFAULT_QUALITY
from vmonarch_cli.media.sound import Sound
from vmonarch_cli.media.write import Frames, Pixels, clip_writer
from vmonarch_cli.pipeline.call import decode_sound
from vmonarch_cli.pipeline.decode_retry import Retries, decode_with_retries

Tags = Callable[[Sound | None, Retries, Pixels], dict[str, str]]
"""What a clip's file says of itself, from its sound, what decoding it took and its pixels, which are known last."""


@dataclass(frozen=True)
class Target:
    """Where a clip goes; `shape`: frames, height, width. The rest as `media.write.clip_writer` takes it."""

    path: Path
    shape: tuple[int, int, int]
    fps: int
    overwrite: bool
    work: Path | None
    sound: torch.Tensor | None = None
    """Latents of the clip's sound."""
    quality: int = DEFAULT_QUALITY
    tags: Tags | None = None


@dataclass(frozen=True)
class WrittenClip:
    """A clip in its place, and the seconds that it took."""

    pixels: Pixels
    decode_s: float
    """Decoding, without the time that it waited for the encoder."""
    write_s: float
    """What writing took beside that."""
    hidden_s: float
    """What writing took while decoding went on."""
    sound: Sound | None
    """As far as the last frame is shown."""


def write_decoded(
    decode: Callable[[], Iterator[Frames]],
    target: Target,
    pipeline: Any,
    device: torch.device,
    *,
    on_part: Callable[[Frames], None] | None,
    on_retry: Callable[[str], None],
    on_count: Callable[[int], None] = lambda done: None,
    alone: bool = True,
) -> tuple[WrittenClip, Retries]:
    """Decode and write at the same time; when memory runs out, both begin anew with less (see `decode_with_retries`).

    `decode` gives the frames in parts each time that it is called; `on_part` gets them, from the first one on, and
    `on_count` how many frames there are so far. Unless it is `alone` on the machine, running out of memory is an error
    at once: with less memory means to move what others use.
    Raises as `decode` does, and OutputError when the clip cannot be written; then nothing is left of it.
    """

    def attempt(retries: Retries) -> WrittenClip:
        watch = Stopwatch(device)
        sound, done = None, 0
        if target.sound is not None:  # first, because an .mp4 begins with both
            sound = decode_sound(pipeline, target.sound).until(target.shape[0] / target.fps)
        where = (target.path, target.shape, target.fps, target.overwrite, target.work)
        tags = None if target.tags is None else functools.partial(target.tags, sound, retries)
        with clip_writer(*where, sound=sound, quality=target.quality, tags=tags) as writer:
            for part in decode():
                writer.add(part)
                if on_part is not None:
                    on_part(part)
                done += len(part)
                on_count(done)
            decode_s, hidden_s = watch.lap() - writer.waited_s, writer.busy_s - writer.waited_s
        write_s = watch.total() - decode_s
        return WrittenClip(writer.pixels, decode_s, write_s, max(0.0, hidden_s), sound)

    return decode_with_retries(attempt, pipeline, device, on_retry) if alone else (attempt(()), ())
