"""The ways in which LoRAs of one training are written: each gives the same latents, or one sentence says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_cache import cache_repository
from loading import CLOSE, load
from safetensors.torch import load_file, save_file
from tiny_families import TINY, latents_of

from vmonarch_cli.errors import ModelError, VmonarchError
from vmonarch_cli.models.lora_files import lora_file
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import Setup

pytestmark = pytest.mark.usefixtures("one_thread")
Tensors = dict[str, torch.Tensor]
_NATIVE = (("attn1.", "self_attn."), ("attn2.", "cross_attn."), (".to_q", ".q"), (".to_v", ".v"))


def bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def native(tensors: Tensors, prefix: str = "diffusion_model.") -> Tensors:
    """Named as Wan's own code names its layers."""
    found = {}
    for name, tensor in bare(tensors).items():
        for ours, theirs in _NATIVE:
            name = name.replace(ours, theirs)
        found[prefix + name] = tensor
    return found


def diffsynth(tensors: Tensors) -> Tensors:
    named = native(tensors, "").items()
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in named}


def kohya(tensors: Tensors, alpha: float = 4.0) -> Tensors:
    """Layers with underscores for dots, A and B as down and up, and an alpha for each; rank 4."""
    found = {}
    for name, tensor in native(tensors, "").items():
        layer, _, part = name.partition(".lora_")
        layer = "lora_unet_" + layer.replace(".", "_")
        found[f"{layer}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        found[f"{layer}.alpha"] = torch.tensor(alpha)
    return found


def with_alpha(tensors: Tensors, alpha: float) -> Tensors:
    layers = {name.partition(".lora_")[0] for name in tensors}
    return tensors | {f"{layer}.alpha": torch.tensor(alpha) for layer in layers}


@pytest.fixture(scope="module")
def tensors(lora: Path) -> Tensors:
    return load_file(lora)


def made(folder: Path, path: Path, name: str = "wan", scale: str = "") -> torch.Tensor:
    pipeline = load(folder, setup=Setup(offload="none", loras=(f"{path}{scale}",)))
    return latents_of(pipeline, TINY[name])


@pytest.mark.parametrize("write", [bare, native, diffsynth, kohya])
def test_every_way_to_write_a_lora_gives_the_same_latents(
    folders: dict[str, Path], lora: Path, tensors: Tensors, tmp_path: Path, write: Callable[[Tensors], Tensors]
) -> None:
    save_file(write(tensors), tmp_path / "other.safetensors")
    torch.testing.assert_close(made(folders["wan"], tmp_path / "other.safetensors"), made(folders["wan"], lora))


def test_alpha_and_rank_are_applied(folders: dict[str, Path], lora: Path, tensors: Tensors, tmp_path: Path) -> None:
    half = made(folders["wan"], lora, scale=":0.5")
    settings = {"transformer.r": 4, "transformer.lora_alpha": 2}
    for number, (content, metadata) in enumerate(
        (
            (with_alpha(tensors, 2.0), {}),
            (kohya(tensors, 2.0), {}),
            (tensors, {"lora_adapter_metadata": json.dumps(settings)}),
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(content, path, metadata)
        torch.testing.assert_close(made(folders["wan"], path), half, **CLOSE)


def test_a_lora_of_the_second_transformer_goes_there(
    folders: dict[str, Path], lora: Path, tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "second.safetensors"
    save_file({name.replace("transformer.", "transformer_2.", 1): tensor for name, tensor in tensors.items()}, path)
    folder = folders["wan-two-stage"]
    plain, first = latents_of(load(folder), TINY["wan-two-stage"]), made(folder, lora, "wan-two-stage")
    second = made(folder, path, "wan-two-stage")
    assert not torch.allclose(second, plain, **CLOSE)
    assert not torch.allclose(second, first, **CLOSE)
    with pytest.raises(ModelError, match="is for the second of two transformers, and this model has one"):
        made(folders["wan"], path)
    both = tmp_path / "both.safetensors"
    save_file(load_file(path) | tensors, both)
    torch.testing.assert_close(made(folder, both, "wan-two-stage"), made(folder, lora, "wan-two-stage"))


def test_one_of_two_transformers_is_chosen_by_a_word_or_a_name(
    folders: dict[str, Path], lora: Path, tensors: Tensors, tmp_path: Path
) -> None:
    """Without a word a file of one transformer's keys goes to both."""
    folder = folders["wan-two-stage"]

    def with_loras(*texts: str) -> torch.Tensor:
        return latents_of(load(folder, setup=Setup(offload="none", loras=texts)), TINY["wan-two-stage"])

    high, low, both = with_loras(f"high:{lora}"), with_loras(f"low:{lora}"), with_loras(str(lora))
    assert not torch.allclose(high, low, **CLOSE)
    assert not torch.allclose(high, both, **CLOSE)
    torch.testing.assert_close(with_loras(f"high:{lora}", f"low:{lora}:1"), both)
    second = tmp_path / "second.safetensors"
    save_file({name.replace("transformer.", "transformer_2.", 1): tensor for name, tensor in tensors.items()}, second)
    torch.testing.assert_close(with_loras(str(second)), low)
    pair = tmp_path / "pair"
    pair.mkdir()
    for name in ("x_HIGH_rank4", "x_LOW_rank4"):
        save_file(native(tensors), pair / f"{name}.safetensors")
    torch.testing.assert_close(with_loras(str(pair)), both)
    torch.testing.assert_close(with_loras(str(pair / "x_LOW_rank4.safetensors")), low)
    torch.testing.assert_close(with_loras(f"low:{pair}"), low)
    for text, sentence in (
        (f"high:{second}", "is for the low-noise transformer by its tensors"),
        (f"low:{pair / 'x_HIGH_rank4.safetensors'}", "is for the high-noise transformer by its name, and low: was"),
    ):
        with pytest.raises(VmonarchError, match=sentence):
            with_loras(text)
    with pytest.raises(VmonarchError, match="for models with two transformers, and this one has one"):
        load(folders["wan"], setup=Setup(loras=(f"high:{lora}",)))
    with pytest.raises(VmonarchError, match=r"has 2 \.safetensors files \(x_HIGH_rank4.safetensors, x_LOW"):
        load(folders["wan"], setup=Setup(loras=(str(pair),)))


def test_changes_of_nothing_are_no_changes(
    folders: dict[str, Path], lora: Path, tensors: Tensors, tmp_path: Path
) -> None:
    """Files often hold differences of norms that training left at zero."""
    path = tmp_path / "zeros.safetensors"
    save_file(native(tensors) | {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(32)}, path)
    torch.testing.assert_close(made(folders["wan"], path), made(folders["wan"], lora))


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("diffusion_model.blocks.0.self_attn.norm_q.diff_b", torch.ones(32), r"attn1\.norm_q has no bias"),
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", torch.ones(1, 32), "is a DoRA with norms of its inputs"),
        ("diffusion_model.blocks.0.self_attn.norm_q.diff", torch.ones(31), r"of shape \[32\], and the file \[31\]"),
        ("diffusion_model.blocks.0.self_attn.norm_q.diff", torch.full((32,), torch.nan), "values that are not finite"),
        ("diffusion_model.blocks.9.diff_m", torch.ones(1, 6, 32), r"no layer blocks\.9\.modulation; 8 of its 9 layers"),
        ("diffusion_model.blocks.0.self_attn.q.hada_w1_a", torch.ones(4, 4), "is a LoHa"),
        ("diffusion_model.blocks.0.self_attn.q.lokr_w1", torch.ones(4, 4), "is a LoKr"),
        ("diffusion_model.blocks.0.self_attn.q.alpha", torch.ones(3), "has an alpha of 3 numbers, and one is valid"),
        ("text_encoder.layers.0.q_proj.lora_A.weight", torch.ones(4, 32), "also changes a text encoder"),
        ("lora_te_layers_0_q.lora_down.weight", torch.ones(4, 32), "also changes a text encoder"),
        ("diffusion_model.blocks.0.cross_attn.o.lora_B.weight", torch.ones(32, 4), "cross_attn.o has no lora_A"),
        ("diffusion_model.blocks.0.cross_attn.o.lora_A.weight", torch.ones(4, 32), "cross_attn.o has no lora_B"),
        ("diffusion_model.blocks.0.self_attn.q.alpha", torch.tensor(float("inf")), "an alpha that is not a finite"),
        ("something.else", torch.ones(1), "is no LoRA of a video transformer"),
    ],
)
def test_what_is_not_supported_is_named(
    folders: dict[str, Path], tensors: Tensors, tmp_path: Path, name: str, tensor: torch.Tensor, sentence: str
) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(native(tensors) | {name: tensor}, path)
    with pytest.raises(ModelError, match=sentence) as caught:
        made(folders["wan"], path)
    assert "\n" not in caught.value.message


def test_what_a_header_shows_is_refused_before_the_model_is_loaded(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    request = GenerateRequest(model="wan2.1-14b", prompt="a cat", loras=(f"{path}:0.5",))
    deep = {name.replace("blocks.1.", "blocks.41."): tensor for name, tensor in tensors.items() if "attn2" in name}
    wide = {name: torch.ones((4, 5120) if "lora_A" in name else (5120, 4)) for name in tensors if "attn" in name}
    last = max(name for name in wide if "lora_B" in name)
    for content, sentence in (
        (
            tensors,
            r"small\.safetensors belongs to another model: its self-attention is 32 wide, and that of",
        ),
        (deep, "1 of its 2 blocks are beyond the 40 of wan2.1-14b"),
        (tensors | {"text_encoder.q.lora_A.weight": torch.ones(4, 4)}, r"a text encoder \(1 of its \d+ tensors"),
        ({name: t[:2] if "lora_A" in name else t for name, t in tensors.items()}, "an A of rank 2 and a B of rank 4"),
        (wide | {last: wide[last] * torch.nan}, r"small\.safetensors holds values that are not finite, in .*lora_B"),
    ):
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
        with pytest.raises(ModelError, match=sentence):
            resolve(request)
    path.write_bytes(b"\x00" * 4 + b"no weights at all")
    with pytest.raises(ModelError, match=r"small\.safetensors is damaged: it is not a safetensors file"):
        resolve(request)


def test_a_rank_that_the_settings_contradict_is_refused(
    folders: dict[str, Path], tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.lora_alpha": 8})})
    with pytest.raises(ModelError, match=r"contradicts itself: its settings say rank 8 and .* has 4"):
        resolve(GenerateRequest(model=str(folders["wan"]), prompt="a cat", loras=(str(path),)))
    with pytest.raises(ModelError, match="its settings say rank 8"):
        made(folders["wan"], path)


def test_metadata_that_does_not_parse_is_one_sentence(
    folders: dict[str, Path], tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "odd.safetensors"
    for text in ("[" * 9000, "[1]", '{"transformer.lora_alpha": []}'):
        save_file(tensors, path, {"lora_adapter_metadata": text})
        with pytest.raises(ModelError, match="has settings in its metadata that do not parse"):
            made(folders["wan"], path)


def test_a_lora_of_the_hub_is_found_in_the_cache(
    folders: dict[str, Path], lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match="someone/a-lora is not complete in the local cache and HF_HUB_OFFLINE is set"):
        made(folders["wan"], Path("someone/a-lora"))
    cache_repository(tmp_path, "someone/a-lora", lora.parent)
    assert lora_file("someone/a-lora").read_bytes() == lora.read_bytes()
    torch.testing.assert_close(made(folders["wan"], Path("someone/a-lora")), made(folders["wan"], lora))


def test_a_folder_with_several_loras_is_ambiguous(lora: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(lora.read_bytes())
    with pytest.raises(ModelError, match=r"has 2 \.safetensors files \(a\.safetensors, b\.safetensors\): name one"):
        lora_file(str(tmp_path))
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(lora.read_bytes())
    assert lora_file(str(tmp_path)).name == "pytorch_lora_weights.safetensors"
