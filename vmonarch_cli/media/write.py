"""Clips and records written. Every write is atomic: a temporary name beside the target, then a rename.

Frames are encoded in a thread while whoever makes them goes on making more (see `ClipWriter`); `encoders.py` knows the
kinds of files.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmonarch_cli.errors import ModelError, OutputError
from vmonarch_cli.media.encoders import ENCODERS, WITH_SOUND, Encoder
from vmonarch_cli.media.paths import DEFAULT_QUALITY, check_frames_alone, sound_path
from vmonarch_cli.media.publish import Draft, atomic, named
from vmonarch_cli.media.sound import Sound
from vmonarch_cli.media.tags import TAGGED, write_tags

Frames = NDArray[np.uint8]
_WAITING = 4
"""Parts of a clip that may wait for the encoder; whoever makes more waits."""


@dataclass(frozen=True)
class Pixels:
    """The frames of a clip before any lossy file; `sha256` is of their shape and of every pixel."""

    count: int
    height: int
    width: int
    sha256: str


class ClipWriter:
    """Takes the frames of one clip, and hashes and encodes them in a thread of its own."""

    def __init__(self, path: Path, encoder: Encoder, shape: tuple[int, int, int]) -> None:
        """`path`: the clip, for errors. `shape`: frames, height and width of the whole clip."""
        self._shape = shape
        self.waited_s = 0.0
        """Seconds that `add` and `end` waited for the encoder."""
        self.busy_s = 0.0
        """Seconds that the encoder worked, while others did or not."""
        self._path = path
        self._encoder = encoder
        self._added = 0
        self._hash = _hash_of(shape)
        self._queue: queue.Queue[Frames | None] = queue.Queue(_WAITING)
        self._failure: BaseException | None = None
        self._dropped = False
        # A daemon: no interpreter waits at its end for a clip that nobody wants any more.
        self._thread = threading.Thread(target=self._work, name="clip-writer", daemon=True)
        self._thread.start()

    def add(self, frames: Frames) -> None:
        """Take frames (f, H, W, 3), uint8, which must not change afterwards; waits while too many are waiting.

        OutputError when frames before these could not be written, ModelError when they are no part of the clip.
        """
        if frames.shape[1:] != (*self._shape[1:], 3):
            raise self._misfit(f"frames of {frames.shape[2]}x{frames.shape[1]}")
        self._added += len(frames)
        began = time.perf_counter()
        self._put(np.ascontiguousarray(frames))
        self.waited_s += time.perf_counter() - began
        self._raise_failure()

    def end(self) -> None:
        """Wait until all frames are in the file; OutputError when they cannot be, ModelError when some are missing."""
        if self._added != self._shape[0]:
            raise self._misfit(f"{self._added} frames")
        began = time.perf_counter()
        self._put(None)
        self._thread.join()
        self.waited_s += time.perf_counter() - began
        self._raise_failure()

    def drop(self) -> None:
        """Stop encoding; what is written is not wanted."""
        self._dropped = True
        self._put(None)
        self._thread.join()

    @property
    def pixels(self) -> Pixels:
        """What was written; after `end`."""
        return Pixels(*self._shape, self._hash.hexdigest())

    def _put(self, frames: Frames | None) -> None:
        """Give the thread something to do, unless it has ended."""
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._queue.put(frames, timeout=0.1)
                return

    def _misfit(self, came: str) -> ModelError:
        count, height, width = self._shape
        return ModelError(
            f"the model's decoder does not fit its configuration: {count} frames of {width}x{height} were planned, and "
            f"{came} came"
        )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            with named(self._path):
                raise self._failure

    def _work(self) -> None:
        try:
            while (frames := self._queue.get()) is not None and not self._dropped:
                began = time.perf_counter()
                self._hash.update(frames)
                self._encoder.add(frames)
                self.busy_s += time.perf_counter() - began
            if not self._dropped:
                began = time.perf_counter()
                self._encoder.end()
                self.busy_s += time.perf_counter() - began
        except BaseException as error:  # whatever it is, the thread that makes the frames should hear of it
            self._failure = error
        finally:
            if self._dropped or self._failure is not None:
                with suppress(Exception):
                    self._encoder.drop()


@contextmanager
def clip_writer(
    path: Path,
    shape: tuple[int, int, int],
    fps: int,
    overwrite: bool = False,
    work: Path | None = None,
    *,
    sound: Sound | None = None,
    quality: int = DEFAULT_QUALITY,
    tags: Callable[[Pixels], Mapping[str, str]] | None = None,
) -> Iterator[ClipWriter]:
    """A writer of a clip of `shape` (frames, height, width) to `path` by its ending; the folder is made.

    At the end of the block the clip takes its place, whole; where the block raises, nothing is left. OutputError when
    the clip cannot be written. `work`: where the temporary file goes, a folder on the file system of `path`; beside
    `path` by default. `sound` begins with the first frame: in an .mp4 as AAC, in a .webm as Opus, otherwise
    exactly, in a .wav of the clip's name beside it. `quality`: see `encoders.py`. `tags`: what the file says of itself,
    where it can (see `tags.py`), from what is known once all frames are there.
    """
    ending = path.suffix.lower()
    encoder = ENCODERS.get(ending)
    if encoder is None:
        raise OutputError(f"output {path} ends in '{path.suffix}': valid endings are {', '.join(ENCODERS)}")
    draft = Draft(path, overwrite, work)
    try:
        about = (draft.temporary, fps, shape[0], quality)
        inside = None if sound is None or ending not in WITH_SOUND else WITH_SOUND[ending](*about, sound)
        writer = ClipWriter(path, inside or encoder(*about), shape)
        try:
            yield writer
            writer.end()
            if tags is not None and ending in TAGGED:
                with named(path):
                    write_tags(draft.temporary, tags(writer.pixels))
        except BaseException:
            writer.drop()
            raise
        if overwrite:
            check_frames_alone(path)  # once more: the run took its time
        draft.publish()
        if sound is not None and inside is None:
            with atomic(sound_path(path), overwrite, work) as temporary:
                temporary.write_bytes(sound.wav_bytes())
    finally:
        draft.discard()


def write_clip(
    frames: Frames,
    path: Path,
    fps: int,
    overwrite: bool = False,
    work: Path | None = None,
    *,
    sound: Sound | None = None,
    quality: int = DEFAULT_QUALITY,
) -> Path:
    """Write uint8 frames (F, H, W, 3) to `path`; see `clip_writer`."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 (F, H, W, 3), at least one, got {frames.dtype} {frames.shape}")
    with clip_writer(path, frames.shape[:3], fps, overwrite, work, sound=sound, quality=quality) as writer:
        writer.add(frames)
    return path


def write_record(path: Path, record: dict[str, Any], overwrite: bool = True, work: Path | None = None) -> Path:
    """Write a record as UTF-8 JSON; a value that is not finite becomes null, a path its text."""
    text = record_text(record)
    with atomic(path, overwrite, work) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def record_text(record: dict[str, Any], indent: int | None = 2) -> str:
    """A record as JSON; a value that is not finite becomes null, a path its text."""
    return json.dumps(_jsonable(record), indent=indent, ensure_ascii=indent is None, allow_nan=False)


def pixels_of(frames: Frames) -> Pixels:
    """The facts of frames (F, H, W, 3), uint8."""
    digest = _hash_of(frames.shape[:3])
    digest.update(np.ascontiguousarray(frames))
    count, height, width, _ = frames.shape
    return Pixels(count, height, width, digest.hexdigest())


def _hash_of(shape: tuple[int, ...]) -> Any:
    """A hash that has taken the shape (F, H, W) and waits for the pixels."""
    return hashlib.sha256("x".join(str(side) for side in (*shape, 3)).encode() + b"\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value
