"""What the profiles of a model have in common: the model, and the clips that it makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.plan.costs import branches_of


@dataclass(frozen=True)
class ProfiledClips:
    """A model where it runs, and the size of its clips in pixels and frames."""

    entry: ModelEntry
    source: str
    device: torch.device
    dtype: torch.dtype
    height: int
    width: int
    num_frames: int
    guidance_scale: float

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a clip's tokens."""
        return self.entry.grid(self.height, self.width, self.num_frames)

    @property
    def forwards(self) -> int:
        """Forwards of one denoising step."""
        return branches_of(self.entry, self.guidance_scale)
