"""vmonarch: text-to-video diffusion with Monarch-structured attention (importing it imports no torch).

What is public, in a script; all else may change between versions:

- ``monarch``: a context in which a diffusers pipeline's self-attention runs as a preset says.
- ``enable_monarch``, ``disable_monarch``: the same without a block.
- ``MonarchSession``: what these return; the table of steps, times and coverage of the last call.
- ``Preset``, ``load_preset``: a preset, and a shipped one by its name or a TOML file by its path.
- ``PresetFields``: the types of the fields that ``monarch`` takes by name.
- ``StepAttention``, ``Coverage``: the figures of a step, and how the calls ran.
- ``VmonarchError``, ``ModelError``, ``PresetError``: the errors, each with one sentence.
- ``__version__``: the version of the package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmonarch_cli.errors import ModelError, PresetError, VmonarchError
    from vmonarch_cli.library import MonarchSession, PresetFields, disable_monarch, enable_monarch, monarch
    from vmonarch_cli.presets import Preset, load_preset
    from vmonarch_cli.timing import Coverage, StepAttention

__version__ = "0.1.0"

_HOMES = {
    "monarch": "library",
    "enable_monarch": "library",
    "disable_monarch": "library",
    "MonarchSession": "library",
    "PresetFields": "library",
    "Preset": "presets",
    "load_preset": "presets",
    "StepAttention": "timing",
    "Coverage": "timing",
    "VmonarchError": "errors",
    "ModelError": "errors",
    "PresetError": "errors",
}

__all__ = [
    "Coverage",
    "ModelError",
    "MonarchSession",
    "Preset",
    "PresetError",
    "PresetFields",
    "StepAttention",
    "VmonarchError",
    "__version__",
    "disable_monarch",
    "enable_monarch",
    "load_preset",
    "monarch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
