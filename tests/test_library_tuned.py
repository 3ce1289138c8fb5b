"""`monarch(..., tuned=FILE)`: an adapter of `vmonarch tune`, on where attention is structured, gone afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write, write_whole
from loading import CLOSE, load, write_lora
from tiny_families import TINY, latents_of, wan

from vmonarch_cli import ModelError, Preset, disable_monarch, enable_monarch, load_preset, monarch
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.plan.tuned import read

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = load_preset("fast")
TINY_WAN = TINY["wan"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "wan"
    wan().save_pretrained(found, safe_serialization=True)
    return found


@pytest.fixture(params=["lora", "weights"])
def adapter(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    make = write if request.param == "lora" else write_whole
    return make(folder, tmp_path / "fast.safetensors", FAST)


def own(folder: Path) -> Any:
    """The pipeline as a script loads it."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def modules(pipeline: Any) -> list[str]:
    return [f"{name} {type(module).__name__}" for name, module in pipeline.transformer.named_modules()]


def test_it_does_what_a_run_does_and_leaves_nothing(folder: Path, adapter: Path) -> None:
    file = read(adapter)
    planned = load(folder, setup=Setup(offload="none", tuned=(file,)))
    with swapped(planned, FAST, adapter=file.layer_name):
        expected = latents_of(planned, TINY_WAN)
    pipeline = own(folder)
    stock, before = latents_of(pipeline, TINY_WAN), modules(pipeline)
    names = [*pipeline.transformer.state_dict()]
    with monarch(pipeline, "fast") as session:
        plain = latents_of(pipeline, TINY_WAN)
    with monarch(pipeline, "fast", tuned=adapter) as session:
        tuned = latents_of(pipeline, TINY_WAN)
    assert session.coverage.structured == 2 * 2 * 2
    torch.testing.assert_close(tuned, expected, **CLOSE)
    assert not torch.allclose(tuned, plain, **CLOSE)
    assert torch.equal(latents_of(pipeline, TINY_WAN), stock)
    assert (modules(pipeline), [*pipeline.transformer.state_dict()]) == (before, names)
    enable_monarch(pipeline, FAST, tuned=str(adapter))
    assert torch.equal(latents_of(pipeline, TINY_WAN), tuned)
    disable_monarch(pipeline)
    assert torch.equal(latents_of(pipeline, TINY_WAN), stock)


def test_a_lora_of_the_scripts_own_stays(folder: Path, adapter: Path, tmp_path: Path) -> None:
    lora = write_lora(folder, tmp_path)
    pipeline = own(folder)
    pipeline.load_lora_weights(str(lora))
    with_lora = latents_of(pipeline, TINY_WAN)
    with monarch(pipeline, "fast", tuned=adapter):
        assert not torch.allclose(latents_of(pipeline, TINY_WAN), with_lora, **CLOSE)
    assert torch.equal(latents_of(pipeline, TINY_WAN), with_lora)


def test_what_does_not_fit_is_one_sentence_and_changes_nothing(folder: Path, adapter: Path, tmp_path: Path) -> None:
    pipeline = own(folder)
    stock, before = latents_of(pipeline, TINY_WAN), modules(pipeline)

    def refused(*arguments: Any, of: Any = pipeline, **options: Any) -> str:
        with pytest.raises(ModelError) as caught:
            enable_monarch(of, *arguments, **options)
        return caught.value.message

    assert refused("paper", tuned=adapter).startswith(
        f"adapter {adapter} was tuned with preset fast and cannot run with paper: "
    )
    assert "cannot run with fast: band is 0 there and 1 here" in refused("fast", tuned=adapter, band=1)
    assert "is for structured attention, and preset dense is dense" in refused("dense", tuned=adapter)
    assert refused("fast", tuned=3) == "tuned takes the path of an adapter's file, got int"
    assert "none.safetensors does not exist" in refused("fast", tuned=tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "text.safetensors" in refused("fast", tuned=tmp_path / "text.safetensors")
    assert "which this WanPipeline has is not known: load all of it with from_pretrained" in refused(
        "fast", of=wan(), tuned=adapter
    )
    other = wan()
    with torch.no_grad():
        other.transformer.patch_embedding.weight.add_(1)
    other.save_pretrained(tmp_path / "other", safe_serialization=True)
    assert "was tuned on other weights: those of " in refused("fast", of=own(tmp_path / "other"), tuned=adapter)
    assert modules(pipeline) == before
    assert torch.equal(latents_of(pipeline, TINY_WAN), stock)


def test_whole_weights_go_with_no_offload_that_moves_parts(folder: Path, tmp_path: Path) -> None:
    whole = write_whole(folder, tmp_path / "fast.safetensors", FAST)
    pipeline = own(folder)
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    with pytest.raises(ModelError, match="a WanPipeline that is offloaded by groups or by layers cannot have it"):
        enable_monarch(pipeline, "fast", tuned=whole)


def test_a_preset_of_ones_own_fits_by_its_fields(folder: Path, tmp_path: Path) -> None:
    mine = Preset(name="mine", band=0, warm_start=True)
    adapter = write(folder, tmp_path / "mine.safetensors", mine)
    with monarch(own(folder), mine.model_copy(update={"name": "other"}), tuned=adapter) as session:
        assert session.preset.name == "other"
