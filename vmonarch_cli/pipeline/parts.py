"""What a diffusers pipeline consists of."""

from __future__ import annotations

from typing import Any


def transformers_of(pipeline: Any) -> list[Any]:
    """The pipeline's one or two transformers."""
    found = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [transformer for transformer in found if transformer is not None]
