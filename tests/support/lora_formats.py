"""LoRAs of tiny checkpoints, and the ways in which trainers and tools write the same weights.

The names here are written down from the models' own code, apart from the tables of `pipeline/lora_names.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loading import load
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
RANK = 4
NAMES = (
    "wan",
    "wan-vace",
    "skyreels-v2",
    "hunyuan-video",
    "ltx-video",
    "ltx-2",
    "cogvideox-2b",
    "mochi-1",
    "kandinsky-5",
)
"""Families that are tried, by the names of their tiny checkpoints."""
_LAYERS = {
    "wan": r"blocks\.\d+\.(attn[12]\.to_[qkv]|attn[12]\.to_out\.0|ffn\.net\.(0\.proj|2))|condition_embedder\..*"
    r"(linear_[12]|time_proj)|proj_out",
    "hunyuan": r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff\.net\.(0\.proj|2)|"
    r"norm1\.linear)|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)|context_embedder\.proj_in",
    "ltx": r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))|proj_in|"
    r"time_embed\.emb\.timestep_embedder\.linear_1",
}
_FUSED = (
    (r"transformer_blocks\.(\d+)\.attn\.", ("to_q", "to_k", "to_v"), r"double_blocks.\1.img_attn_qkv"),
    (
        r"transformer_blocks\.(\d+)\.attn\.",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        r"double_blocks.\1.txt_attn_qkv",
    ),
    (
        r"single_transformer_blocks\.(\d+)\.",
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        r"single_blocks.\1.linear1",
    ),
)
_NATIVE = {
    "wan": (
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        (".to_out.0", ".o"),
        (".to_q", ".q"),
        (".to_k", ".k"),
        (".to_v", ".v"),
        (".ffn.net.0.proj", ".ffn.0"),
        (".ffn.net.2", ".ffn.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("proj_out", "head.head"),
    ),
    "hunyuan": (
        ("single_transformer_blocks", "single_blocks"),
        ("transformer_blocks", "double_blocks"),
        (".attn.to_out.0", ".img_attn_proj"),
        (".attn.to_add_out", ".txt_attn_proj"),
        (".ff.net.0.proj", ".img_mlp.fc1"),
        (".ff.net.2", ".img_mlp.fc2"),
        (".norm1.linear", ".img_mod.linear"),
        (".proj_out", ".linear2"),
        ("context_embedder.proj_in", "txt_in.input_embedder"),
    ),
    "ltx": (
        ("proj_in", "patchify_proj"),
        ("time_embed.emb", "adaln_single.emb"),
    ),
}


def kind_of(name: str) -> str:
    """The way of naming layers of a family's test name."""
    return next((kind for kind in _NATIVE if name.startswith(kind)), "wan" if name.startswith("skyreels") else "")


def random_lora(folder: Path, name: str, only: str = "") -> Tensors:
    """Random A and B of rank 4 for a checkpoint's layers, named as diffusers names them, without a prefix.

    Layers that the model's own code has as one share their A. `only`: a part of the names of the layers.
    """
    torch.manual_seed(0)
    wanted = _LAYERS.get(kind_of(name), r".*\.(to_q|to_v|to_query|to_value)")
    transformer = load(folder).transformer
    found: Tensors = {}
    shared: Tensors = {}
    for layer, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(wanted, layer) and only in layer:
            down = torch.randn(RANK, module.in_features) * 0.2
            if kind_of(name) == "hunyuan" and re.search(r"\.(to_[qkv]|add_[qkv]_proj|proj_mlp)$", layer):
                which = "added" if "add_" in layer else "own"
                down = shared.setdefault(f"{'.'.join(layer.split('.')[:2])} {which}", down)
            found[f"{layer}.lora_A.weight"] = down.clone()
            found[f"{layer}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.2
    return found


def _prefixed(prefix: str) -> Callable[[Tensors, str], Tensors]:
    return lambda tensors, name: {prefix + key: tensor for key, tensor in tensors.items()}


def native(tensors: Tensors, name: str, prefix: str = "") -> Tensors:
    """Under the names of the model's own code."""
    kind = kind_of(name)
    left, found = dict(tensors), {}
    for pattern, parts, whole in _FUSED if kind == "hunyuan" else ():
        for start in sorted({match[0] for key in tensors if (match := re.match(pattern, key))}):
            keys = [f"{start}{part}.lora_" for part in parts]
            if not all(f"{key}A.weight" in left for key in keys):
                continue
            layer = prefix + re.sub(pattern, whole, start)
            found[f"{layer}.lora_A.weight"] = left[f"{keys[0]}A.weight"].clone()
            found[f"{layer}.lora_B.weight"] = torch.cat([left[f"{key}B.weight"] for key in keys])
            for key in keys:
                del left[f"{key}A.weight"], left[f"{key}B.weight"]
    for key, tensor in left.items():
        for ours, theirs in _NATIVE[kind]:
            key = key.replace(ours, theirs)
        found[prefix + key] = tensor
    return found


def _comfy(tensors: Tensors, name: str) -> Tensors:
    return native(tensors, name, "diffusion_model.")


def _down_up(tensors: Tensors, name: str) -> Tensors:
    """As lightx2v writes: lora_down and lora_up, with an alpha that is the rank."""
    found = {}
    for key, tensor in _comfy(tensors, name).items():
        found[key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
        found[f"{key.partition('.lora_')[0]}.alpha"] = torch.tensor(float(RANK))
    return found


def _diffsynth(tensors: Tensors, name: str) -> Tensors:
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in native(tensors, name).items()}


def _kohya(prefix: str, alpha: float = 8.0) -> Callable[[Tensors, str], Tensors]:
    """Layers with underscores for dots, A and B as down and up, and an alpha of twice the rank for B of half."""

    def write(tensors: Tensors, name: str) -> Tensors:
        found = {}
        for key, tensor in (native(tensors, name) if kind_of(name) else tensors).items():
            layer, _, part = key.partition(".lora_")
            layer = prefix + layer.replace(".", "_")
            up = part.startswith("B")
            found[f"{layer}.lora_{'up' if up else 'down'}.weight"] = tensor * (RANK / alpha) if up else tensor
            found[f"{layer}.alpha"] = torch.tensor(alpha)
        return found

    return write


Writer = Callable[[Tensors, str], Tensors]
FORMATS: dict[str, Writer] = {
    "transformer.": _prefixed("transformer."),
    "bare": _prefixed(""),
    "PEFT base_model.model.": _prefixed("base_model.model."),
    "kohya lora_unet_": _kohya("lora_unet_"),
}
"""Formats of every family, by the name that the table has."""
OWN_NAMES: dict[str, Writer] = {
    "own names": native,
    "ComfyUI diffusion_model.": _comfy,
    "lightx2v lora_down, alpha": _down_up,
    "DiffSynth .default.": _diffsynth,
    "PEFT of own names": lambda tensors, name: native(tensors, name, "base_model.model."),
    "VideoX-Fun lora_unet__": _kohya("lora_unet__"),
}
"""Of the families whose own code names layers otherwise than diffusers."""


def formats_of(name: str) -> dict[str, Writer]:
    """What people have for a family."""
    return {**FORMATS, **(OWN_NAMES if kind_of(name) else {})}


def write(tensors: Tensors, path: Path, **metadata: Any) -> Path:
    """Save tensors that may share memory."""
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return path
