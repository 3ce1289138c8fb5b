"""A Wan transformer in the format of its authors: one file, with their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn2": "cross_attn",
    "attn1": "self_attn",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "proj_out": "head.head",
    "scale_shift_table": "modulation",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm-third",
    "norm3": "norm2",
    "norm-third": "norm3",
}


def original_weights(transformer: Any) -> dict[str, torch.Tensor]:
    """The weights of a WanTransformer3DModel by their original names."""
    found = {}
    for name, value in transformer.state_dict().items():
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        found["head.modulation" if name == "modulation" else name] = value.clone()
    return found


def write_original(transformer: Any, path: Path) -> Path:
    """A safetensors file of them."""
    from safetensors.torch import save_file

    save_file(original_weights(transformer), path)
    return path


def write_gguf(transformer: Any, path: Path) -> Path:
    """A GGUF of them: matrices of which a row fills whole blocks in 8 bits (Q8_0), all else in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "wan")
    for name, value in original_weights(transformer).items():
        content = value.float().numpy()
        if content.ndim == 2 and content.shape[1] % 32 == 0 and "modulation" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(content, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
