"""Every way in which LoRAs of a family are written gives the latents of the same weights in diffusers' format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loading import load
from lora_formats import FORMATS, NAMES, Tensors, formats_of, native, random_lora, write
from tiny_families import TINY, latents_of

from vmonarch_cli.plan.setup import Setup

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [(name, form) for name in NAMES for form in formats_of(name)]


class Family:
    """A tiny checkpoint, random LoRA weights for it, and the latents that they give in diffusers' own format."""

    def __init__(self, folder: Path, name: str) -> None:
        TINY[name].build().save_pretrained(folder / name, safe_serialization=True)
        self.name, self.folder = name, folder / name
        self.tensors = random_lora(self.folder, name)
        diffusers = write(FORMATS["transformer."](self.tensors, name), folder / f"{name}-diffusers.safetensors")
        stock = load(self.folder)
        self.plain = self.latents(stock)
        stock.load_lora_weights(str(diffusers), adapter_name="stock")
        self.expected = self.latents(stock)

    def latents(self, pipeline: object) -> torch.Tensor:
        return latents_of(pipeline, TINY[self.name])

    def with_lora(self, path: Path, scale: str = "") -> torch.Tensor:
        return self.latents(load(self.folder, setup=Setup(offload="none", loras=(f"{path}{scale}",))))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    class Built(dict[str, Family]):
        def __missing__(self, name: str) -> Family:
            self[name] = Family(tmp_path_factory.mktemp("loras"), name)
            return self[name]

    return Built()


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_format_gives_what_diffusers_own_gives(
    families: dict[str, Family], tmp_path: Path, name: str, form: str
) -> None:
    family = families[name]
    assert not torch.allclose(family.expected, family.plain, rtol=1e-2, atol=1e-2)
    path = write(formats_of(name)[form](family.tensors, name), tmp_path / "lora.safetensors")
    torch.testing.assert_close(family.with_lora(path), family.expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_of_scale_0_is_none_to_the_bit(families: dict[str, Family], tmp_path: Path, name: str) -> None:
    family = families[name]
    path = write(FORMATS["bare"](family.tensors, name), tmp_path / "lora.safetensors")
    assert torch.equal(family.with_lora(path, ":0"), family.plain)


STOCK = [("wan", "kohya lora_unet_"), ("wan", "lightx2v lora_down, alpha"), ("wan", "ComfyUI diffusion_model.")]


@pytest.mark.parametrize(("name", "form"), [*STOCK, ("ltx-2", "ComfyUI diffusion_model.")])
def test_what_diffusers_converts_it_converts_to_the_same(
    families: dict[str, Family], tmp_path: Path, name: str, form: str
) -> None:
    family = families[name]
    # Its converters of Wan know an alpha in the blocks alone.
    tensors = {k: t for k, t in family.tensors.items() if name != "wan" or k.startswith("blocks.")}
    path = write(formats_of(name)[form](tensors, name), tmp_path / "lora.safetensors")
    stock = load(family.folder)
    stock.load_lora_weights(str(path), adapter_name="stock")
    torch.testing.assert_close(family.with_lora(path), family.latents(stock), rtol=2e-4, atol=2e-4)


def test_double_blocks_of_hunyuan_are_converted_as_diffusers_does(families: dict[str, Family], tmp_path: Path) -> None:
    """Its converter splits single blocks at the width of the published model, which the tiny one does not have."""
    family = families["hunyuan-video"]
    double: Tensors = {k: t for k, t in family.tensors.items() if k.startswith("transformer_blocks")}
    path = write(native(double, "hunyuan-video"), tmp_path / "lora.safetensors")
    stock = load(family.folder)
    stock.load_lora_weights(str(path), adapter_name="stock")
    torch.testing.assert_close(family.with_lora(path), family.latents(stock), rtol=2e-4, atol=2e-4)


def test_hunyuans_modulation_of_the_last_layer_changes_halves(families: dict[str, Family], tmp_path: Path) -> None:
    """HunyuanVideo's own code has shift before scale there, diffusers scale before shift."""
    family = families["hunyuan-video"]
    width = load(family.folder).transformer.norm_out.linear.in_features
    torch.manual_seed(3)
    down, shift, scale = torch.randn(4, width), torch.randn(width, 4), torch.randn(width, 4)
    made = []
    for layer, up in (
        ("transformer.norm_out.linear", torch.cat([scale, shift])),
        ("diffusion_model.final_layer.adaLN_modulation.1", torch.cat([shift, scale])),
    ):
        tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        made.append(family.with_lora(write(tensors, tmp_path / f"{len(made)}.safetensors")))
    torch.testing.assert_close(*made)
    assert not torch.allclose(made[0], family.plain, rtol=1e-2, atol=1e-2)


def test_peft_settings_beside_a_file_are_applied(families: dict[str, Family], tmp_path: Path) -> None:
    family = families["wan"]
    halved = {key: tensor / 2 if ".lora_B." in key else tensor for key, tensor in family.tensors.items()}
    write(FORMATS["PEFT base_model.model."](halved, "wan"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    torch.testing.assert_close(family.with_lora(tmp_path), family.expected, rtol=2e-4, atol=2e-4)
