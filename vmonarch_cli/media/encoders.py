"""Frames to a file, a few at a time: one class per ending. All errors are OSErrors; nothing here is atomic.

- `.mp4`: H.264 at the exact size. 8-bit 4:2:0 (`yuv420p`) plays everywhere but needs even sides; a clip with an odd
  side is written as 4:4:4 (`yuv444p`) instead of being padded, which browsers may refuse and mpv, VLC and ffmpeg play.
- `.webm`: VP9 at the exact size, 8-bit 4:2:0, sound as Opus.
- `.gif`: one palette for the clip; durations are whole hundredths of a second whose sum keeps the asked-for rate.
- `.webp`: animated, lossy; durations are whole milliseconds.
- `.png`: a folder of that name with one PNG per frame, `frame-0000.png` and on.

Quality is 1 to 10, and DEFAULT_QUALITY where nobody asks for another. It is the CRF 30 - 2q of H.264 (28 to 10), the
CRF 56 - 4q of VP9 (52 to 16), the quality 10q of WebP, and 32q of the 256 colours of a GIF; PNGs are lossless at any.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vmonarch_cli.media.ffmpeg import CODECS, frames_in
from vmonarch_cli.media.paths import DEFAULT_QUALITY
from vmonarch_cli.media.sound import Sound
from vmonarch_cli.text import first_line, shown

_SOUND_RATE = ["-b:a", "192k"]
# Tag and convert with the same matrix: untagged files change colour between players at 720 lines.
_TAGS = "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
_BT709 = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,setparams={_TAGS}"]

PNG_LEVEL = 1
"""zlib's level of PNG files.

One 832x480 frame of smooth colours with a little noise, one core: level 1 takes 78 ms for 412 kB, level 3 97 ms for
382 kB, level 6 (Pillow's default) 298 ms for 351 kB, level 9 1.8 s for 335 kB; with strong noise 117 ms for 845 kB
against 141 ms for 777 kB. Pixels are the same at every level.
"""
_PNG_THREADS = min(8, os.cpu_count() or 1)


class Encoder(Protocol):
    """Takes the frames of one clip in order; made of the file's path, frames per second and the number of frames."""

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Frames (f, H, W, 3), contiguous, all of one size."""

    def end(self) -> None:
        """Finish the file; all of it is there afterwards."""

    def drop(self) -> None:
        """Stop, as soon as may be: what was written is not wanted. May follow a failed `add` or `end`."""


class _FfmpegEncoder:
    """Frames go to ffmpeg through a pipe; it compresses in threads of its own."""

    ending: str

    def __init__(
        self, path: Path, fps: int, count: int, quality: int = DEFAULT_QUALITY, sound: Sound | None = None
    ) -> None:
        """`sound`: begins with the first frame."""
        self._path = path.absolute()  # ffmpeg takes the colon of a relative path for the end of a protocol's name
        self._fps = fps
        self._quality = quality
        self._sound = sound
        self._writer: Any = None
        self._count = 0

    def _pixel_format(self, height: int, width: int) -> str:
        raise NotImplementedError

    def _flags(self) -> list[str]:
        raise NotImplementedError

    def add(self, frames: NDArray[np.uint8]) -> None:
        if self._writer is None:
            self._writer = self._open(*frames.shape[1:3])
        try:
            for frame in frames:
                self._writer.append_data(frame)
        except OSError as error:  # imageio's has several lines, with the whole command
            raise OSError(f"ffmpeg ended before the clip did ({first_line(error)}); is the disk full?") from error
        self._count += len(frames)

    def end(self) -> None:
        self.drop()
        # imageio does not look at ffmpeg's exit code: a full disk shows only in what was written.
        written, fault = frames_in(self._path)
        if written != self._count:
            why = f" ({shown(fault)})" if fault else ""
            raise OSError(f"ffmpeg wrote {written} of {self._count} frames{why}; is the disk full?")

    def drop(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open(self, height: int, width: int) -> Any:
        import imageio.v2 as imageio

        codec, sound_codec = CODECS[self.ending]
        more: dict[str, Any] = {}
        if self._sound is not None:
            wav = self._path.with_name("sound.wav")  # in the folder of the draft, which goes with it
            wav.write_bytes(self._sound.wav_bytes())
            more = {"audio_path": str(wav), "audio_codec": sound_codec}
        return imageio.get_writer(
            self._path,
            format="FFMPEG",
            mode="I",
            fps=self._fps,
            codec=codec,
            quality=None,
            pixelformat=self._pixel_format(height, width),
            macro_block_size=1,
            ffmpeg_log_level="quiet",
            output_params=[*self._flags(), *_BT709, *(_SOUND_RATE if more else ())],
            **more,
        )


class Mp4Encoder(_FfmpegEncoder):
    """H.264, and AAC."""

    ending = ".mp4"

    def _pixel_format(self, height: int, width: int) -> str:
        return "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"

    def _flags(self) -> list[str]:
        # x264 holds back as many frames as it looks ahead and has threads: by default, on many cores, a whole clip,
        # whose encoding then begins when decoding ends. A fixed number of threads also makes the same file everywhere.
        early = ["-threads", "8", "-x264-params", "rc-lookahead=20"]
        return ["-crf", str(30 - 2 * self._quality), *early, "-movflags", "+faststart"]


class WebmEncoder(_FfmpegEncoder):
    """VP9, and Opus."""

    ending = ".webm"

    def _pixel_format(self, height: int, width: int) -> str:
        return "yuv420p"

    def _flags(self) -> list[str]:
        fast = ["-deadline", "good", "-cpu-used", "4", "-row-mt", "1"]
        # Bit-exact: else the file has a random number of its own, and the same clip is another file each time.
        return ["-crf", str(56 - 4 * self._quality), "-b:v", "0", *fast, "-fflags", "+bitexact"]


class GifEncoder:
    """Keeps all frames until the end, because the palette is made of frames spread over the clip."""

    def __init__(self, path: Path, fps: int, count: int, quality: int = DEFAULT_QUALITY) -> None:
        self._path = path
        self._fps = fps
        self._colours = min(256, 32 * quality)
        self._parts: list[NDArray[np.uint8]] = []

    def add(self, frames: NDArray[np.uint8]) -> None:
        self._parts.append(frames)

    def end(self) -> None:
        from PIL import Image

        frames = np.concatenate(self._parts)
        # One palette from frames spread over the clip: a palette per frame would make flat grounds flicker.
        sample = frames[np.linspace(0, len(frames) - 1, min(len(frames), 8)).astype(int)]
        median = Image.Quantize.MEDIANCUT
        palette = Image.fromarray(sample.reshape(-1, *frames.shape[2:])).quantize(self._colours, method=median)
        dither = Image.Dither.FLOYDSTEINBERG
        images = [Image.fromarray(frame).quantize(palette=palette, dither=dither) for frame in frames]
        ends = [round(100 * (i + 1) / self._fps) for i in range(len(frames))]
        durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
        images[0].save(self._path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)

    def drop(self) -> None:
        self._parts.clear()


class WebpEncoder:
    """Keeps all frames until the end, when Pillow takes them one after the other."""

    def __init__(self, path: Path, fps: int, count: int, quality: int = DEFAULT_QUALITY) -> None:
        self._path = path
        self._fps = fps
        self._quality = 10 * quality
        self._parts: list[NDArray[np.uint8]] = []

    def add(self, frames: NDArray[np.uint8]) -> None:
        self._parts.append(frames)

    def end(self) -> None:
        from PIL import Image

        images = [Image.fromarray(frame) for part in self._parts for frame in part]
        ends = [round(1000 * (i + 1) / self._fps) for i in range(len(images))]
        durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        how = {"quality": self._quality, "method": 4, "duration": durations, "loop": 0, "minimize_size": False}
        images[0].save(self._path, format="WEBP", save_all=True, append_images=images[1:], **how)

    def drop(self) -> None:
        self._parts.clear()


class PngEncoder:
    """One file a frame, several at a time: zlib works outside Python's lock."""

    def __init__(self, path: Path, fps: int, count: int, quality: int = DEFAULT_QUALITY) -> None:
        self._path = path
        self._digits = max(4, len(str(count - 1)))
        self._pool = ThreadPoolExecutor(_PNG_THREADS, "png")
        self._waiting: deque[Future[None]] = deque()
        self._count = 0

    def add(self, frames: NDArray[np.uint8]) -> None:
        self._path.mkdir(exist_ok=True)
        for frame in frames:
            if len(self._waiting) >= 2 * _PNG_THREADS:
                self._waiting.popleft().result()
            name = f"frame-{self._count:0{self._digits}d}.png"
            self._waiting.append(self._pool.submit(_write_png, frame, self._path / name))
            self._count += 1

    def end(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()
        self._pool.shutdown()

    def drop(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._waiting.clear()


def _write_png(frame: NDArray[np.uint8], path: Path) -> None:
    from PIL import Image

    with path.open("wb") as file:
        Image.fromarray(frame).save(file, format="PNG", compress_level=PNG_LEVEL)
        file.flush()
        # Publishing syncs every file, one after the other: here it is done meanwhile, and there nothing is left to do.
        os.fsync(file.fileno())


ENCODERS: dict[str, Callable[[Path, int, int, int], Encoder]] = {
    ".mp4": Mp4Encoder,
    ".webm": WebmEncoder,
    ".gif": GifEncoder,
    ".webp": WebpEncoder,
    ".png": PngEncoder,
}
"""By ending, in small letters: (file, frames per second, number of frames, quality) -> what encodes them."""
WITH_SOUND: dict[str, Callable[[Path, int, int, int, Sound], Encoder]] = {".mp4": Mp4Encoder, ".webm": WebmEncoder}
"""The same of the endings whose files hold sound, with the sound."""
