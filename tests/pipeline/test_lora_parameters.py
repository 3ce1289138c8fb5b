"""What LoRA files change beside their pairs of matrices: parameters outright, and the norms of a DoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from loading import CLOSE, load
from lora_formats import write
from safetensors.torch import load_file
from tiny_families import TINY, latents_of

from vmonarch_cli.errors import ModelError
from vmonarch_cli.plan.setup import Setup

pytestmark = pytest.mark.usefixtures("one_thread")
PARAMETERS = {
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.0.self_attn.v.diff": "blocks.0.attn1.to_v.weight",
    "blocks.0.cross_attn.o.diff_b": "blocks.0.attn2.to_out.0.bias",
    "blocks.1.diff_m": "blocks.1.scale_shift_table",
    "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
    "head.diff_m": "scale_shift_table",
    "head.head.diff": "proj_out.weight",
    "patch_embedding.diff": "patch_embedding.weight",
    "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
}
"""What a file of Wan's own names may change -> the parameter of diffusers."""


def made(folder: Path, *texts: str, **setup: Any) -> torch.Tensor:
    return latents_of(load(folder, setup=Setup(offload="none", loras=texts, **setup)), TINY["wan"])


@pytest.mark.parametrize("key", PARAMETERS)
def test_a_parameter_that_is_changed_outright(folders: dict[str, Path], tmp_path: Path, key: str) -> None:
    pipeline = load(folders["wan"])
    plain = latents_of(pipeline, TINY["wan"])
    parameter = dict(pipeline.transformer.named_parameters())[PARAMETERS[key]]
    torch.manual_seed(5)
    difference = torch.randn(parameter.shape)
    path = write({f"diffusion_model.{key}": difference}, tmp_path / "lora.safetensors")
    with torch.no_grad():
        parameter.add_(difference / 2)
    expected = latents_of(pipeline, TINY["wan"])
    torch.testing.assert_close(made(folders["wan"], f"{path}:0.5"), expected, **CLOSE)
    assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(made(folders["wan"], f"{path}:0"), plain)


def test_the_norms_of_wan_have_other_numbers_in_its_own_code() -> None:
    """diffusers counts them in the order of their use: the one before the cross-attention is norm3 in Wan's code."""
    from types import SimpleNamespace

    import diffusers

    from vmonarch_cli.pipeline.lora_names import LayerNames

    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2}
    transformer = diffusers.WanTransformer3DModel(**sizes, cross_attn_norm=True)
    names = LayerNames(SimpleNamespace(transformer=transformer))
    assert names.of(["blocks.1.norm3", "blocks.1.self_attn.q"])["blocks.1.norm3"].modules == ("blocks.1.norm2",)
    assert names.of(["blocks.1.norm2", "blocks.1.attn1.to_q"])["blocks.1.norm2"].modules == ("blocks.1.norm2",)


def test_parameters_and_pairs_of_two_files_add_up(folders: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    difference = {"diffusion_model.blocks.0.self_attn.v.diff_b": torch.ones(32)}
    pairs = {name.removeprefix("transformer."): tensor for name, tensor in load_file(lora).items()}
    extra = {"blocks.0.attn1.to_v.diff_b": torch.ones(32)}
    apart = write(difference, tmp_path / "apart.safetensors")
    together = write(pairs | extra, tmp_path / "together.safetensors")
    expected = made(folders["wan"], str(together))
    assert not torch.allclose(expected, made(folders["wan"], str(lora)), **CLOSE)
    for texts in ((str(lora), str(apart)), (str(apart), str(lora))):
        torch.testing.assert_close(made(folders["wan"], *texts), expected, **CLOSE)


@pytest.mark.parametrize("form", ["{}.lora_magnitude_vector.weight", "{}.lora_magnitude_vector", "{}.dora_scale"])
def test_a_dora_is_what_peft_makes_of_it(folders: dict[str, Path], tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    pipeline = load(folders["wan"])
    wanted = r".*attn1\.(to_q|to_v)"
    pipeline.transformer.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=wanted, init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    expected = latents_of(pipeline, TINY["wan"])
    tensors = {}
    for name, tensor in peft.get_peft_model_state_dict(pipeline.transformer).items():
        layer, mark, _ = name.partition(".lora_magnitude_vector")
        column = tensor[:, None] if "dora_scale" in form else tensor
        tensors |= {form.format(layer): column, f"{layer}.alpha": torch.tensor(8.0)} if mark else {name: tensor}
    path = write(tensors, tmp_path / "dora.safetensors")
    torch.testing.assert_close(made(folders["wan"], str(path)), expected, **CLOSE)
    assert not torch.allclose(expected, made(folders["wan"]), rtol=1e-2, atol=1e-2)


def test_parameters_in_8_bits_are_not_changed_outright(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write({"diffusion_model.blocks.0.self_attn.v.diff": torch.ones(32, 32)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=r"changes blocks\.0\.attn1\.to_v outright, which --quantize int8-storage"):
        made(folders["wan"], str(path), quantize="int8-storage")
    norm = write({"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(32)}, tmp_path / "norm.safetensors")
    assert torch.isfinite(made(folders["wan"], str(norm), quantize="int8-storage")).all()
    assert torch.isfinite(made(folders["wan"], str(path), quantize="fp8-storage")).all()
