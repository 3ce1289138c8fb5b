"""Tuned adapters of random weights for tiny checkpoints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vmonarch_cli.models.tuned import TunedAdapter, fingerprint
from vmonarch_cli.pipeline.tuned import write_adapter
from vmonarch_cli.pipeline.tuned_weights import write_weights
from vmonarch_cli.presets import Preset

LAYERS = r"blocks\.\d+\.(attn[12]\.to_[qkv]|attn[12]\.to_out\.0|ffn\.net\.(0\.proj|2))"
"""What `vmonarch tune` trains of a Wan transformer."""


def adapter_of(folder: Path, preset: Preset, **facts: Any) -> TunedAdapter:
    """What an adapter of a checkpoint says of itself; `facts` replace what it would say."""
    given: dict[str, Any] = {
        "model": str(folder),
        "fingerprint": fingerprint(folder),
        "preset_name": preset.name,
        "preset": preset.model_dump(),
        "steps": 2,
        "guidance_scale": 3.0,
        "size": "48x32",
        "num_frames": 9,
        "training": {"rank": 4, "alpha": 4, "lr": 1e-3, "steps": 10, "seconds": 1.0, "batch": 1, "seed": 0},
        "evaluation": {"prompts": 2, "before": {"latent_error_mean": 0.4}, "after": {"latent_error_mean": 0.25}},
    }
    return TunedAdapter.model_validate(given | facts)


def student_of(folder: Path, path: Path) -> Path:
    """A checkpoint of the same shapes and other weights, as a distilled student has them."""
    shutil.copytree(folder, path)
    for file in (path / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, {"format": "pt"})
    return path


def weights(transformer: torch.nn.Module, part: str = "transformer", rank: int = 4, seed: int = 0) -> dict[str, Any]:
    """Random A and B of every layer that is trained, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in transformer.named_modules():
        if re.fullmatch(LAYERS, name) and isinstance(module, torch.nn.Linear):
            for half, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                found[f"{part}.{name}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * 0.2
    return found


def write(
    folder: Path,
    path: Path,
    preset: Preset,
    *,
    change: Callable[[dict[str, Any]], object] = lambda state: None,
    alpha: float | None = None,
    seed: int = 0,
    **facts: Any,
) -> Path:
    """An adapter's file for a checkpoint of one transformer or two; `change` may damage its tensors."""
    import diffusers

    state: dict[str, Any] = {}
    for part in ("transformer", "transformer_2"):
        if (folder / part).is_dir():
            state |= weights(diffusers.WanTransformer3DModel.from_pretrained(folder / part), part, seed=seed)
    change(state)
    write_adapter(path, state, adapter_of(folder, preset, **facts), alpha=alpha)
    return path


def write_whole(
    folder: Path,
    path: Path,
    preset: Preset,
    *,
    change: Callable[[dict[str, Any]], object] = lambda state: None,
    seed: int = 0,
    **facts: Any,
) -> Path:
    """An adapter of whole weights for a checkpoint: its own, moved at random; `change` may damage its tensors."""
    import diffusers

    generator, state = torch.Generator().manual_seed(seed), {}
    for part in ("transformer", "transformer_2"):
        if (folder / part).is_dir():
            transformer = diffusers.WanTransformer3DModel.from_pretrained(folder / part)
            for name, value in transformer.named_parameters():
                state[f"{part}.{name}"] = value.detach() + 0.05 * torch.randn(value.shape, generator=generator)
    change(state)
    write_weights(path, state, adapter_of(folder, preset, kind="weights", **facts))
    return path
