"""The parts of the demo model, and the whole-clip forward of its autoencoder."""

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
    encode_prompts,
)
from vmonarch_cli.demo.training import still_image
from vmonarch_cli.families.wan_vae import decode_normalised, decode_raw, encode_moments
from vmonarch_cli.models.demo_vocabulary import MAX_TOKENS, unknown_words, vocabulary


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_whole_clip_forward_equals_the_chunked_one(frames: int) -> None:
    torch.manual_seed(0)
    vae = build_vae(VAE_PRESETS["tiny"]).eval()
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d):
                # The initial zeros would hide a wrong time axis.
                torch.nn.init.normal_(module.weight, std=0.05)
        video = torch.rand(1, 3, frames, 32, 32) * 2 - 1
        latents = torch.randn(1, 16, (frames - 1) // 4 + 1, 8, 8)
        chunked = vae.encode(video).latent_dist
        mean, logvar = encode_moments(vae, video).chunk(2, 1)
        torch.testing.assert_close(mean, chunked.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logvar, chunked.logvar, atol=1e-5, rtol=1e-5)
        raw = decode_raw(vae, latents)
        torch.testing.assert_close(raw.clamp(-1, 1), vae.decode(latents).sample, atol=1e-5, rtol=1e-5)


def test_single_images_equal_clips_of_one_frame() -> None:
    torch.manual_seed(0)
    vae = build_vae(VAE_PRESETS["tiny"]).eval()
    with torch.no_grad():
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        moments = still_image.encode_moments(vae, images)
        torch.testing.assert_close(moments, encode_moments(vae, images[:, :, None])[:, :, 0], atol=1e-5, rtol=1e-5)
        latents = torch.randn(2, 16, 8, 8)
        recon = still_image.decode_raw(vae, latents)
        torch.testing.assert_close(recon, decode_raw(vae, latents[:, :, None])[:, :, 0], atol=1e-5, rtol=1e-5)


def test_a_fresh_autoencoder_copies_the_newest_frame() -> None:
    torch.manual_seed(0)
    vae = build_vae(VAE_PRESETS["tiny"]).eval()
    still = (torch.rand(1, 3, 1, 32, 32) * 2 - 1).expand(-1, -1, 9, -1, -1)
    with torch.no_grad():
        moments = encode_moments(vae, still)
        assert torch.allclose(moments, moments[:, :, :1].expand_as(moments), atol=1e-5)
        recon = decode_raw(vae, moments[:, :16])
    assert torch.allclose(recon, recon[:, :, :1].expand_as(recon), atol=1e-5)


def test_the_default_sizes() -> None:
    dit, text = DIT_PRESETS["default"]
    sizes = [
        sum(p.numel() for p in module.parameters())
        for module in (build_transformer(dit), build_vae(VAE_PRESETS["base24"]), build_text_encoder(text))
    ]
    assert 8e6 < sizes[0] < 10e6
    assert sum(sizes) * 2 < 31e6


def test_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("A Red circle, zooming LEFT.").input_ids
    assert [vocabulary()[i] for i in ids] == ["a", "red", "circle", ",", "<unk>", "left", ".", "</s>"]
    assert unknown_words("A Red circle, zooming LEFT.") == ["zooming"]
    empty = tokenizer([""], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    assert empty.attention_mask.sum() == 1


def test_the_folder_loads_as_a_wan_pipeline_and_makes_a_clip(weights: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    assert not [p for p in weights.rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]
    pipeline = WanPipeline.from_pretrained(weights, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red circle rises", ""]

    def run(output_type: str) -> torch.Tensor:
        frames: torch.Tensor = pipeline(
            prompts, height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=4.0,
            max_sequence_length=MAX_TOKENS, output_type=output_type,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
        ).frames  # fmt: skip
        return frames

    video = run("pt")
    assert video.shape == (2, 5, 3, 32, 32)
    assert video.isfinite().all()
    with torch.no_grad():
        whole = decode_normalised(pipeline.vae, run("latent"))
    torch.testing.assert_close(whole.permute(0, 2, 1, 3, 4) / 2 + 0.5, video, atol=1e-4, rtol=1e-4)

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert run("pt").isfinite().all()


def test_prompts_are_embedded_as_the_pipeline_does(weights: Path) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(weights, dtype=torch.float32)
    prompts = ["a red circle rises on a white background.", ""]
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS)
        ours = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts)
    torch.testing.assert_close(ours, expected)
