"""Builds the parts of the demo model and writes them as one diffusers folder (`WanPipeline`).

Token grid at the default size: 49 frames of 96 x 96 pixels -> latents 13 x 24 x 24 -> patches (1, 2, 2) -> tokens
13 x 12 x 12.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmonarch_cli.models.demo_vocabulary import EOS, MAX_TOKENS, PAD, UNKNOWN, vocabulary

WEIGHTS_DIR = Path(__file__).parent / "weights"
FLOW_SHIFT = 6.0
"""Shift of the noise levels, in training and in the exported scheduler.

A frame's latents here hold four times the values of Wan's at the same token grid, so noise hides their content later.
Shift 3, which suits Wan, leaves the noisiest levels, where position and motion are decided, nearly untrained: so
trained, this model got one motion in eight right, and with 6, for as long, one in two.
"""


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of the video autoencoder: 4x smaller in space and in time, `z_dim` channels."""

    base_dim: int = 24
    decoder_base_dim: int | None = None
    z_dim: int = 16
    num_res_blocks: int = 1


@dataclass(frozen=True)
class DitConfig:
    """Sizes of the diffusion transformer."""

    num_layers: int = 8
    num_heads: int = 4
    head_dim: int = 64
    ffn_dim: int = 1024
    z_dim: int = 16
    text_dim: int = 128


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder."""

    d_model: int = 128
    d_ff: int = 256
    num_layers: int = 2
    num_heads: int = 4


VAE_PRESETS: dict[str, VaeConfig] = {
    "base24": VaeConfig(),
    "wide": VaeConfig(decoder_base_dim=32),
    "base24z8": VaeConfig(z_dim=8),
    "tiny": VaeConfig(base_dim=4),
}
DIT_PRESETS: dict[str, tuple[DitConfig, TextConfig]] = {
    "default": (DitConfig(), TextConfig()),
    "tiny": (
        DitConfig(num_layers=2, num_heads=2, head_dim=24, ffn_dim=64, text_dim=32),
        TextConfig(d_model=32, d_ff=64, num_layers=1, num_heads=2),
    ),
}


def build_vae(config: VaeConfig) -> Any:
    """A fresh `AutoencoderKLWan` in float32 whose time axis starts as "copy the newest frame".

    Every causal convolution uses only its newest tap at first, so what single images teach holds for clips unchanged,
    and the strided and the interleaving time convolutions start as the identity on the newest frame.
    """
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=config.base_dim,
        decoder_base_dim=config.decoder_base_dim,
        z_dim=config.z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] > 1:
                module.weight[:, :, :-1] = 0
                if name.endswith("time_conv"):
                    repeats = module.out_channels // module.in_channels
                    identity = torch.eye(module.in_channels).repeat(repeats, 1)
                    module.weight[:, :, -1] = identity[:, :, None, None]
                    module.bias.zero_()  # type: ignore[union-attr]
    return vae


def build_transformer(config: DitConfig) -> Any:
    """A fresh `WanTransformer3DModel` in float32."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.z_dim,
        out_channels=config.z_dim,
        text_dim=config.text_dim,
        freq_dim=256,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )


def build_tokenizer() -> Any:
    """A word-level fast tokenizer over `vocabulary()`: lowercase, punctuation apart, an end token, unknown words kept
    as one token. An empty prompt is the end token alone.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_text_encoder(config: TextConfig) -> Any:
    """A fresh `UMT5EncoderModel` in float32 over the demo vocabulary."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(vocabulary()),
            d_model=config.d_model,
            d_kv=config.d_model // config.num_heads,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=MAX_TOKENS,
            dropout_rate=0.0,
            pad_token_id=vocabulary().index(PAD),
            eos_token_id=vocabulary().index(EOS),
            decoder_start_token_id=vocabulary().index(PAD),
        )
    )


def build_scheduler() -> Any:
    """The flow-matching sampler of Wan's own pipelines: multistep UniPC on shifted flow sigmas."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )


def encode_prompts(tokenizer: Any, text_encoder: Any, prompts: list[str]) -> Any:
    """Prompt embeddings (B, MAX_TOKENS, d_model) exactly as `WanPipeline` makes them: zero after the real tokens."""
    from vmonarch_cli.demo.transfer import to_device

    batch = tokenizer(
        prompts,
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    device = text_encoder.device
    mask = to_device(batch.attention_mask, device)
    hidden = text_encoder(to_device(batch.input_ids, device), mask).last_hidden_state
    return hidden * mask[..., None].to(hidden.dtype)


def latent_stats(vae: Any, device: Any) -> tuple[Any, Any]:
    """The config's latent mean and standard deviation as (1, z, 1, 1, 1) tensors."""
    import torch

    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=device, dtype=torch.float32).view(shape)
    std = torch.tensor(vae.config.latents_std, device=device, dtype=torch.float32).view(shape)
    return mean, std


def export_pipeline(directory: Path, vae: Any, transformer: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Write one diffusers folder, weights as float16 safetensors, no pickle.

    The modules are converted in place: give copies if they are still needed in float32.
    """
    import torch
    from diffusers import WanPipeline

    directory.mkdir(parents=True, exist_ok=True)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(torch.float16),
        vae=vae.to(torch.float16),
        scheduler=build_scheduler(),
        transformer=transformer.to(torch.float16),
        transformer_2=None,
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    _portable_index(directory / "model_index.json")
    _readable_by_all(directory)


def _portable_index(path: Path) -> None:
    """Name the tokenizer by the class that every transformers release knows."""
    index = json.loads(path.read_text())
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    index.pop("_name_or_path", None)
    _write_text(path, json.dumps(index, indent=2) + "\n")


def export_vae(directory: Path, vae: Any) -> None:
    """Write only the autoencoder (float16), in a folder that `AutoencoderKLWan.from_pretrained` reads."""
    import torch

    vae.to(torch.float16).save_pretrained(directory, safe_serialization=True)
    _readable_by_all(directory)


def config_dict(config: VaeConfig | DitConfig | TextConfig) -> dict[str, Any]:
    """The sizes as plain data, for checkpoints and logs."""
    return asdict(config)


def _readable_by_all(directory: Path) -> None:
    """Safetensors files are written for their owner alone; a package must not carry that on."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
