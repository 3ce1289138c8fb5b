"""What Cosmos needs beside diffusers, in small: its safety checks, and what it calls of torchvision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

UNSAFE = "unsafe"


class SafetyChecks:
    """As CosmosSafetyChecker of the package cosmos_guardrail is called; a prompt with UNSAFE in it is refused."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.clips: list[Any] = []
        self.refuses_frames = False

    def to(self, device: Any = None, dtype: Any = None) -> None:
        pass

    def check_text_safety(self, prompt: str) -> bool:
        self.prompts.append(prompt)
        return UNSAFE not in prompt

    def check_video_safety(self, frames: Any) -> Any:
        """Frames (F, height, width, 3), uint8, with a grey corner; None where they are refused."""
        self.clips.append(frames)
        if self.refuses_frames:
            return None
        changed = frames.copy()
        changed[:, :2, :2] = changed[:, :2, :2] // 2
        return changed


def _resize(images: torch.Tensor, size: list[int], interpolation: Any = None) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, size, mode="nearest")


def _to_tensor(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def put_in_place() -> None:
    """Let diffusers' Cosmos pipeline find them."""
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict

    nearest = SimpleNamespace(NEAREST="nearest")
    transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=_resize, to_tensor=_to_tensor), InterpolationMode=nearest
    )
    transformer_cosmos.transforms = transforms
    pipeline_cosmos2_5_predict.torchvision = SimpleNamespace(transforms=transforms)
    pipeline_cosmos2_5_predict.CosmosSafetyChecker = SafetyChecks
