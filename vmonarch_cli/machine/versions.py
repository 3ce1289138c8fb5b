"""Versions of what computes, for records and captions."""

from __future__ import annotations

import platform
from importlib import metadata

from vmonarch_cli import __version__


def installed_versions() -> dict[str, str | None]:
    """Version of each package that a figure may depend on; None for what is not installed (imports torch)."""
    import torch

    found: dict[str, str | None] = {"vmonarch": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "diffusers", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    return found


def caption_versions(versions: dict[str, str | None]) -> str:
    """'vmonarch 0.1.0, torch 2.11.0, triton 3.6.0' of a record's versions, without what was not installed."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)
