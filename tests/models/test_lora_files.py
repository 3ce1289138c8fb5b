"""Where a LoRA is found, which transformer it is for, and what its header says, without torch."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_cache import cache_repository
from safetensors.torch import save_file

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.lora_facts import describe, distilled_word
from vmonarch_cli.models.lora_files import Lora, expert_by_name, lora_files, parse_lora
from vmonarch_cli.models.wan import WAN21_1_3B, WAN22_A14B
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

WIDE, RANK = 1536, 4


def content(prefix: str = "transformer.", width: int = WIDE, alpha: float | None = None) -> dict[str, torch.Tensor]:
    layer = f"{prefix}blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(RANK, width), f"{layer}.lora_B.weight": torch.ones(width, RANK)}
    return tensors if alpha is None else tensors | {f"{layer}.alpha": torch.tensor(alpha, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step.safetensors", "high"),
        ("Wan22_A14B_T2V_LOW_Lightning_4steps_lora_rank64.safetensors", "low"),
        ("HighNoise.safetensors", "high"),
        ("x_LOW_rank64.safetensors", "low"),
        ("low_noise_model.safetensors", "low"),
        ("a-low-rank-lora.safetensors", None),
        ("highway.safetensors", None),
        ("flow.safetensors", None),
        ("high_and_low.safetensors", None),
        ("pytorch_lora_weights.safetensors", None),
    ],
)
def test_a_name_may_say_the_transformer(name: str, expert: str | None) -> None:
    assert expert_by_name(name) == expert


def test_a_place_is_read_off_the_text(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(content(), file)
    assert parse_lora(f"low:{file}:0.5") == Lora(str(file), 0.5, "low")
    assert parse_lora("high:owner/name/sub/file.safetensors") == Lora("owner/name/sub/file.safetensors", 1.0, "high")
    for text in ("owner/file.safetensors", "./owner/name", "a//b", f"{tmp_path}/missing/b/c", "a/../b/c.safetensors"):
        with pytest.raises(InputError, match="there is no LoRA"):
            parse_lora(text)
    with pytest.raises(InputError, match="takes a scale from -10 to 10, got 11"):
        parse_lora(f"{file}:11")


def test_a_file_inside_a_repository_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = tmp_path / "source"
    for folder in ("", "both"):
        (source / folder).mkdir(exist_ok=True)
        for name in ("a_high_noise", "a_low_noise"):
            save_file(content(), source / folder / f"{name}.safetensors")
    save_file(content(), source / "third.safetensors")
    cache_repository(tmp_path, "someone/loras", source)

    def found(text: str, transformers: int = 1) -> list[tuple[str, str | None]]:
        files = lora_files(parse_lora(text), transformers)
        return [(file.path.relative_to(file.path.parents[1]).as_posix(), file.expert) for file in files]

    assert found("someone/loras/both/a_low_noise.safetensors") == [("both/a_low_noise.safetensors", "low")]
    assert lora_files(parse_lora("someone/loras/third.safetensors"), 1)[0].path.name == "third.safetensors"
    assert found("someone/loras/both", 2) == [
        ("both/a_high_noise.safetensors", "high"),
        ("both/a_low_noise.safetensors", "low"),
    ]
    with pytest.raises(ModelError, match=r"has 3 \.safetensors files \(a_high_noise\.safetensors, a_low_noise"):
        found("someone/loras", 2)
    with pytest.raises(ModelError, match=r"someone/loras/b\.safetensors is not in its repository, which has a_high"):
        found("someone/loras/b.safetensors")


def test_the_header_says_format_rank_alpha_and_place(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file(content("diffusion_model.", alpha=2.0), file)
    (facts,) = describe(parse_lora(f"{file}:0.5"), WAN21_1_3B)
    assert facts.words() == f"{file}: ComfyUI, rank 4, alpha 2, 1 layers, scale 0.5"
    wide = tmp_path / "wide.safetensors"
    save_file(content(width=5120) | {"transformer.blocks.0.diff_m": torch.ones(1, 6, 5120)}, wide)
    (facts,) = describe(parse_lora(str(wide)), WAN22_A14B)
    assert facts.words().endswith(
        "diffusers, rank 4, alpha 4, 1 layers, 1 parameter changed outright, scale 1, both transformers"
    )
    (facts,) = describe(parse_lora(f"low:{wide}"), WAN22_A14B)
    assert facts.words().endswith("scale 1, low-noise transformer")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors", "lightx2v"),
        ("Wan2.2-Lightning/high_noise_model.safetensors", "lightning"),
        ("Wan21_CausVid_14B_T2V_lora_rank32.safetensors", "causvid"),
        ("Wan2.1_T2V_14B_FusionX_LoRA.safetensors", "fusionx"),
        ("my-4step.safetensors", "4step"),
        ("model-14steps.safetensors", None),
        ("a-style.safetensors", None),
        ("hyperrealism.safetensors", None),
    ],
)
def test_a_name_may_say_that_a_lora_is_for_few_steps(name: str, word: str | None) -> None:
    assert distilled_word(name) == word


def test_a_distillation_lora_with_guidance_left_on_gets_advice(tmp_path: Path) -> None:
    plain, named = tmp_path / "plain.safetensors", tmp_path / "wan-lightx2v.safetensors"
    save_file(content(), plain)
    save_file(content(), named)

    def advice(lora: Path, **flags: float) -> list[str]:
        request = GenerateRequest(model="wan2.1-1.3b", prompt="a cat", loras=(str(lora),), **flags)  # type: ignore[arg-type]
        return [sentence for sentence in resolve(request).warnings if "few steps" in sentence]

    assert advice(plain) == []
    assert advice(named, guidance_scale=1.0) == []
    (sentence,) = advice(named)
    assert "'lightx2v' in its name or metadata" in sentence
    assert "--guidance-scale 1" in sentence
    save_file(content(), plain, {"ss_output_name": "my distilled thing"})
    assert "'distill'" in advice(plain)[0]
