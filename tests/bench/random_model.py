"""Write a Wan model of true size with random weights, as a folder that every command takes.

    python tests/bench/random_model.py --model wan2.1-1.3b --out /tmp/models/wan2.1-1.3b

Time and memory are those of the real weights; what they would show is noise. The text encoder is as large as the real
one, its words are those of the demo model.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.demo.model import build_tokenizer
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.profile.model import random_transformer

WAN = {entry.alias: entry for entry in ENTRIES if entry.pipeline == "WanPipeline"}
# The autoencoders of Wan 2.1 and of Wan 2.2 5B, by their number of latent channels.
VAES: dict[int, dict[str, Any]] = {
    16: {},
    48: {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2,
        "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
        "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    },
}  # fmt: skip
UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def write_model(entry: ModelEntry, folder: Path) -> None:
    """A diffusers folder of a Wan model with random bfloat16 weights, made on the GPU; nothing where it is there."""
    if (folder / "model_index.json").is_file():
        return
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    transformer = random_transformer(entry, torch.device("cuda"), torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        vae = AutoencoderKLWan(**VAES[entry.latent_channels])
        text_encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
    torch.set_default_dtype(torch.float32)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=entry.defaults.flow_shift
    )
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(), text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    del pipeline, transformer, vae, text_encoder
    torch.cuda.empty_cache()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WAN, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, which must hold its bytes")
    args = parser.parse_args()
    write_model(WAN[args.model], args.out)


if __name__ == "__main__":
    main()
