"""Frames to a file, and the record beside it. Every write is atomic: a temporary name beside the target, then a rename.

- `.mp4`: H.264 at the exact size. 8-bit 4:2:0 (`yuv420p`) plays everywhere but needs even sides; a clip with an odd
  side is written as 4:4:4 (`yuv444p`) instead of being padded, which browsers may refuse and mpv, VLC and ffmpeg play.
- `.gif`: one palette for the clip; durations are whole hundredths of a second whose sum keeps the asked-for rate.
- `.png`: a folder of that name with one PNG per frame, `frame-0000.png` and on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmonarch_cli.errors import OutputError
from vmonarch_cli.media.ffmpeg import CODEC, SOUND_CODEC
from vmonarch_cli.media.paths import ENDINGS, sound_path
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.media.sound import Sound

# Constant quality, visually lossless for small clips; the size of a 96x96 clip stays below 100 KB.
_CRF = "14"
# Tag and convert with the same matrix: untagged files change colour between players at 720 lines.
_AAC = ["-b:a", "192k"]
_TAGS = "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
_BT709 = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,setparams={_TAGS}"]


def write_clip(
    frames: NDArray[np.uint8],
    path: Path,
    fps: int,
    overwrite: bool = False,
    work: Path | None = None,
    *,
    sound: Sound | None = None,
) -> Path:
    """Write uint8 frames (F, H, W, 3) to `path` by its ending; the folder is made. OutputError when it cannot be.

    `work`: where the temporary file goes, a folder on the file system of `path`; beside `path` by default. `sound`
    begins with the first frame: in an .mp4 as AAC, otherwise exactly, in a .wav of the clip's name beside it.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 (F, H, W, 3), at least one, got {frames.dtype} {frames.shape}")
    inside = sound if sound_path(path) == path else None
    writers: dict[str, Callable[[NDArray[np.uint8], Path, int], None]] = {
        ".mp4": functools.partial(_write_mp4, sound=inside),
        ".gif": _write_gif,
        ".png": _write_pngs,
    }
    write = writers.get(path.suffix.lower())
    if write is None:
        raise OutputError(f"output {path} ends in '{path.suffix}': valid endings are {', '.join(ENDINGS)}")
    with atomic(path, overwrite, work) as temporary:
        write(np.ascontiguousarray(frames), temporary, fps)
    if sound is not None and inside is None:
        with atomic(sound_path(path), overwrite, work) as temporary:
            temporary.write_bytes(sound.wav_bytes())
    return path


def write_record(path: Path, record: dict[str, Any], overwrite: bool = True, work: Path | None = None) -> Path:
    """Write a record as UTF-8 JSON; a value that is not finite becomes null, a path its text."""
    text = json.dumps(_jsonable(record), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic(path, overwrite, work) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def frames_hash(frames: NDArray[np.uint8]) -> str:
    """SHA-256 of the frames' shape and pixels, before any lossy file: equal only if every pixel is."""
    shape = "x".join(str(side) for side in frames.shape)
    return hashlib.sha256(shape.encode() + b"\n" + np.ascontiguousarray(frames).tobytes()).hexdigest()


def _write_mp4(frames: NDArray[np.uint8], path: Path, fps: int, sound: Sound | None) -> None:
    import imageio.v2 as imageio
    import imageio_ffmpeg

    path = path.absolute()  # ffmpeg takes the colon of a relative path for the end of a protocol's name
    height, width = frames.shape[1:3]
    even = height % 2 == 0 and width % 2 == 0
    more: dict[str, Any] = {}
    if sound is not None:
        wav = path.with_name("sound.wav")  # in the folder of the temporary file, which goes with it
        wav.write_bytes(sound.wav_bytes())
        more = {"audio_path": str(wav), "audio_codec": SOUND_CODEC}
    writer = imageio.get_writer(
        path,
        format="FFMPEG",
        mode="I",
        fps=fps,
        codec=CODEC,
        quality=None,
        pixelformat="yuv420p" if even else "yuv444p",
        macro_block_size=1,
        ffmpeg_log_level="quiet",
        output_params=["-crf", _CRF, *_BT709, "-movflags", "+faststart", *(_AAC if sound is not None else ())],
        **more,
    )
    with writer:
        for frame in frames:
            writer.append_data(frame)
    # imageio does not look at ffmpeg's exit code: a full disk shows only in what was written.
    try:
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except RuntimeError:
        written = 0
    if written != len(frames):
        raise OSError(f"ffmpeg wrote {written} of {len(frames)} frames; is the disk full?")


def _write_gif(frames: NDArray[np.uint8], path: Path, fps: int) -> None:
    from PIL import Image

    # One palette from frames spread over the clip: a palette per frame would make flat grounds flicker.
    sample = frames[np.linspace(0, len(frames) - 1, min(len(frames), 8)).astype(int)]
    palette = Image.fromarray(sample.reshape(-1, *frames.shape[2:])).quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    ends = [round(100 * (i + 1) / fps) for i in range(len(frames))]
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)


def _write_pngs(frames: NDArray[np.uint8], path: Path, fps: int) -> None:
    from PIL import Image

    path.mkdir()
    digits = max(4, len(str(len(frames) - 1)))
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame-{i:0{digits}d}.png")


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
