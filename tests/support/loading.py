"""Tiny checkpoints loaded on the CPU, and what the tests of a pipeline's setup compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.presets import Preset

CPU = torch.device("cpu")
EXACT = Preset(name="exact", band=1024)
PAPER = Preset(name="paper")
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}


def facts_of(folder: Path) -> PipelineFacts:
    """What is known of a folder's pipeline class."""
    return PIPELINES[find_model(str(folder))[0].pipeline]


def load(folder: Path, **options: Any) -> Any:
    return load_pipeline(str(folder), device=CPU, dtype=torch.float32, **options)


def write_lora(folder: Path, target: Path) -> Path:
    """A LoRA of random weights for a checkpoint, in the format of its own pipeline; the file."""
    import peft

    torch.manual_seed(0)
    pipeline = load(folder)
    wanted = r".*\.(to_q|to_v|to_query|to_value)"
    pipeline.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=wanted, init_lora_weights=False))
    type(pipeline).save_lora_weights(
        target, transformer_lora_layers=peft.get_peft_model_state_dict(pipeline.transformer)
    )
    return target / "pytorch_lora_weights.safetensors"
