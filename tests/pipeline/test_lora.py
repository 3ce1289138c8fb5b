"""LoRA weights: applied in full, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from loading import CLOSE, EXACT, facts_of, load, write_lora
from tiny_families import TINY, latents_of

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.setup import Setup, check_additions
from vmonarch_cli.text import with_article

Record = Callable[[str, object], None]
families = pytest.mark.parametrize("name", TINY)
pytestmark = pytest.mark.usefixtures("one_thread")


@families
def test_a_lora_changes_the_result_by_its_scale(
    folders: dict[str, Path], name: str, tmp_path: Path, record_property: Record
) -> None:
    tiny, facts = TINY[name], facts_of(folders[name])
    assert facts.lora == hasattr(getattr(diffusers, facts.name), "load_lora_weights")
    if not facts.lora:
        record_property("refused", True)
        with pytest.raises(InputError, match=f"--lora: diffusers loads no LoRA into {with_article(facts.name)}"):
            check_additions(Setup(loras=("any.safetensors",)), facts)
        return
    lora = write_lora(folders[name], tmp_path)

    def made(*texts: str) -> torch.Tensor:
        pipeline = load(folders[name], setup=Setup(offload="none", loras=texts))
        stock = latents_of(pipeline, tiny)
        with swapped(pipeline, EXACT):
            torch.testing.assert_close(latents_of(pipeline, tiny), stock, **CLOSE)
        return stock

    plain = made()
    full = made(str(lora))
    torch.testing.assert_close(made(f"{lora}:0"), plain, **CLOSE)
    torch.testing.assert_close(made(f"{lora}:0.5", f"{lora}:0.5"), full, **CLOSE)
    assert not torch.allclose(full, plain, **CLOSE)


def test_a_lora_of_another_model_is_refused(folders: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(lora)
    other = tmp_path / "other.safetensors"
    save_file({key.replace("blocks.1.", "blocks.31."): value for key, value in tensors.items()}, other)
    with pytest.raises(ModelError, match=r"belongs to another model: this one has no layer blocks\.31\.attn1\.to_q"):
        load(folders["wan"], setup=Setup(offload="none", loras=(str(other),)))
    wide = tmp_path / "wide.safetensors"
    save_file({k: torch.cat([v, v], dim=-1) if "lora_A" in k else v for k, v in tensors.items()}, wide)
    with pytest.raises(ModelError, match=r"LoRA .*wide\.safetensors does not fit this model"):
        load(folders["wan"], setup=Setup(offload="none", loras=(str(wide),)))
    nothing = tmp_path / "nothing.safetensors"
    save_file({"weight": torch.zeros(2)}, nothing)
    with pytest.raises(ModelError, match=r"nothing\.safetensors"):
        load(folders["wan"], setup=Setup(offload="none", loras=(str(nothing),)))
