"""The sound of a clip: 16-bit samples, in an .mp4 as AAC, in a .webm as Opus, beside all else as .wav. No torch."""

from __future__ import annotations

import hashlib
import io
import subprocess
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.ffmpeg import reading
from vmonarch_cli.untrusted.files import require_regular

_BYTES = 2


@dataclass(frozen=True)
class Sound:
    """Samples (N, channels), int16, and how many of them a second has."""

    samples: NDArray[np.int16]
    rate: int

    @classmethod
    def of(cls, values: NDArray[np.floating], rate: int) -> Sound:
        """From values (N, channels) within -1 and 1; what is beyond is cut off."""
        scaled = np.clip(values.astype(np.float64), -1.0, 1.0) * 32767.0
        return cls(np.ascontiguousarray(scaled.round().astype(np.int16)), rate)

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    @property
    def channels(self) -> int:
        return int(self.samples.shape[1])

    def until(self, seconds: float) -> Sound:
        """The sound as far as a clip of so many seconds goes; a shorter one is as it was."""
        return Sound(self.samples[: round(seconds * self.rate)], self.rate)

    def pcm(self) -> bytes:
        """The samples as little-endian 16-bit numbers, channels interleaved."""
        return self.samples.astype("<i2").tobytes()

    def sha256(self) -> str:
        """Hash of every sample, before any lossy file."""
        return hashlib.sha256(self.pcm()).hexdigest()

    def wav_bytes(self) -> bytes:
        """A .wav file of exactly these samples."""
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setnchannels(self.channels)
            file.setsampwidth(_BYTES)
            file.setframerate(self.rate)
            file.writeframes(self.pcm())
        return stream.getvalue()


def read_sound(file: Path, rate: int = 48000, channels: int = 2) -> Sound | None:
    """The sound of an .mp4 or .webm, decoded at a rate, or of a .wav, as it is; None for a clip that has none.

    InputError for a .wav that cannot be read, DeviceError for others without an ffmpeg that runs.
    """
    if not file.is_file():
        return None
    require_regular(file, f"sound {file}")
    if file.suffix.lower() == ".wav":
        return _read_wav(file)
    command = [*reading(file), "-vn", "-ar", str(rate), "-ac", str(channels), "-f", "s16le", "-"]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - ffmpeg
    samples = np.frombuffer(done.stdout, "<i2").reshape(-1, channels) if done.returncode == 0 else ()
    return Sound(np.asarray(samples, np.int16), rate) if len(samples) else None


def _read_wav(file: Path) -> Sound:
    try:
        with wave.open(str(file), "rb") as stream:
            if stream.getsampwidth() != _BYTES:
                raise InputError(f"sound {file} has {8 * stream.getsampwidth()} bits a sample: 16 can be read")
            content = stream.readframes(stream.getnframes())
            samples = np.frombuffer(content, "<i2").reshape(-1, stream.getnchannels())
            return Sound(samples.astype(np.int16), stream.getframerate())
    except (wave.Error, EOFError, OSError, ValueError):
        raise InputError(f"sound {file} cannot be read: it is damaged or no .wav file") from None
