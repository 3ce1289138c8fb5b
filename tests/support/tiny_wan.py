"""A Wan pipeline of random weights, small enough for a test to run it dozens of times."""

from __future__ import annotations

from typing import Any

import torch

HEIGHT, WIDTH, FRAMES = 32, 48, 17
GRID = (5, 2, 3)
LAYERS = 3
LATENT_CHANNELS = 4


def tiny_transformer(seed: int = 0, layers: int = LAYERS) -> Any:
    """Two heads of 16, three layers; weights twice as wide as the default's, so that attention is not flat."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=64,
    ).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "attn1.norm" in name:
                parameter.mul_(3.0)
            elif "attn1" in name and name.endswith("weight"):
                parameter.mul_(2.0)
    return transformer


def tiny_pipeline(*, two_stages: bool = False) -> Any:
    """A WanPipeline on the CPU in float32: 32x48, 17 frames is a grid of 5 x 2 x 3 tokens."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    unknown, ends = {"unk_token": "<unk>"}, {"pad_token": "<pad>", "eos_token": "</s>"}
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, **unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(1)
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(words), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    ).eval()
    with torch.no_grad():  # UMT5 starts tiny; these prompts must make a difference
        text_encoder.shared.weight.normal_(std=3.0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.3, 1.0],
    ).eval()
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **unknown, **ends),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=tiny_transformer(),
        transformer_2=tiny_transformer(seed=7) if two_stages else None,
        boundary_ratio=0.7 if two_stages else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(
    pipeline: Any,
    prompt: str | list[str] = "a red circle moving left",
    *,
    seed: int | list[int] = 0,
    steps: int = 4,
    guidance_scale: float = 4.0,
    negative_prompt: str | list[str] | None = None,
    height: int = HEIGHT,
    width: int = WIDTH,
    num_frames: int = FRAMES,
) -> torch.Tensor:
    """The pipeline's own call, up to the latents (B, C, F, h, w)."""
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator("cpu").manual_seed(value) for value in seeds]
    result: torch.Tensor = pipeline(
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generators if isinstance(seed, list) else generators[0],
        max_sequence_length=16,
        output_type="latent",
    ).frames
    return result
