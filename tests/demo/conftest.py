"""What tests of the demo model share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vmonarch_cli.demo.model import (
    DIT_PRESETS,
    VAE_PRESETS,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    export_pipeline,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with random weights, on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    dit, text = DIT_PRESETS["tiny"]
    vae = build_vae(VAE_PRESETS["tiny"])
    vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    export_pipeline(folder, vae, build_transformer(dit), build_text_encoder(text), build_tokenizer())
    return folder
