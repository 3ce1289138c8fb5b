"""The one family of errors that a user is meant to read.

Each carries one sentence (what came, what is valid) and the exit code of the process. `app.py` is the only place that
turns one into a message and an exit; everything else raises.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_CLIP_FAILED = 1
EXIT_BAD_INPUT = 2


class VmonarchError(Exception):
    """A failure with one sentence for the user and an exit code (2: bad usage or input, 1: a clip failed)."""

    exit_code: int = EXIT_BAD_INPUT

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if exit_code is not None:
            self.exit_code = exit_code


class InputError(VmonarchError):
    """A flag or prompt that cannot be honoured."""


class InputErrors(InputError):
    """Everything that is wrong with a file, one sentence each."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("; ".join(sentences))
        self.sentences = tuple(sentences)


class PresetError(VmonarchError):
    """A preset, or a `--set` override, that does not validate."""


class ModelError(VmonarchError):
    """A model that is unknown, missing, corrupt or too large for the memory."""


class TooLargeError(ModelError):
    """A clip whose denoising ran out of memory."""


class OutputError(VmonarchError):
    """An output path that cannot be written or would be overwritten."""


class DeviceError(VmonarchError):
    """A device, dtype or implementation that this machine does not have."""


class RefusedError(VmonarchError):
    """Frames that a model's own safety checks refuse; nothing is written."""

    exit_code = EXIT_CLIP_FAILED


class NonFiniteError(VmonarchError):
    """Latents or frames that are not finite; the clip stops and nothing is written."""

    exit_code = EXIT_CLIP_FAILED
