"""Transformers in one file, as people share them: what a file is, by the names of its tensors, without torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.weights import read_header, refuse_scaled
from vmonarch_cli.text import printable, with_article
from vmonarch_cli.untrusted.files import known_sha256, require_regular, user_path

GGUF = ".gguf"
ENDINGS = (".safetensors", GGUF)
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_GGUF_MAGIC = b"GGUF"
_WAN = r"(blocks\.0\.self_attn\.q\.weight|condition_embedder\.time_proj\.weight)"
READABLE = frozenset(
    {
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "LTX2VideoTransformer3DModel",
        "MochiTransformer3DModel",
        "MotifVideoTransformer3DModel",
        "MiniMaxH3Transformer3DModel",
        "CosmosTransformer3DModel",
    }
)
"""Transformers that diffusers reads from one file, in the format of their authors."""
_NAMES = {
    "WanVACETransformer3DModel": r"vace_blocks\.0\.",
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "HunyuanVideoTransformer3DModel": r"(double_blocks\.0\.img_attn_qkv|context_embedder\.token_refiner)\.",
    "MiniMaxH3Transformer3DModel": r"token_refiner\.(refiner_)?blocks\.0\.",
    "CosmosTransformer3DModel": r"(net\.blocks\.|time_embed\.t_embedder\.linear_1\.)",
    "LTX2VideoTransformer3DModel": r"audio_(patchify_proj|proj_in)\.weight",
    "LTXVideoTransformer3DModel": r"(adaln_single\.emb\.|time_embed\.emb\.timestep)",
    "MochiTransformer3DModel": r"(blocks\.0\.attn\.qkv_x|time_embed\.pooler)\.",
}
"""Class of a transformer -> what is in its tensors' names, in the original format or in that of diffusers. Of a file
that fits several the first is meant."""


def check_single_file(text: str, flag: str, model: str, facts: PipelineFacts) -> Path:
    """The path of a transformer's file; ModelError unless diffusers can read it into a model's transformer.

    flag: what gave it; model: the name of the model that it is for. Of a safetensors file the header is read, of a GGUF
    the first bytes.
    """
    path = user_path(text, "transformer file", ModelError)
    ending = path.suffix.lower()
    if facts.transformer not in READABLE:
        raise ModelError(
            f"{flag}: diffusers reads no single file into {with_article(facts.transformer)}, which {model} has"
        )
    missing = f"there is no transformer file {printable(text)}: {flag} takes a .safetensors or a .gguf file"
    require_regular(path, f"transformer file {printable(text)}", ModelError, missing=missing)
    if ending in _PICKLES:
        raise ModelError(
            f"transformer file {printable(text)} is pickled, and pickles can run code when opened: give a .safetensors "
            "or a .gguf file"
        )
    if ending not in ENDINGS:
        raise ModelError(f"transformer file {printable(text)} ends in '{path.suffix}': valid are {', '.join(ENDINGS)}")
    if ending == GGUF:
        _check_gguf(path, flag)
        return path
    tensors = read_header(path)
    refuse_scaled(str(path), tensors)
    found = _kind_of(tensors, facts.transformer)
    if found != facts.transformer:
        what = "no video transformer that is known" if found is None else with_article(found)
        raise ModelError(
            f"{path} holds {what}, and {model} has {with_article(facts.transformer)}: give a file of that family"
        )
    return path


def _check_gguf(path: Path, flag: str) -> None:
    with path.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise ModelError(f"transformer file {path} is damaged: it is not a GGUF file; download it again")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'{flag} {path} needs the package gguf: pip install "vmonarch[gguf]"')


def _kind_of(names: Iterable[str], wanted: str) -> str | None:
    """The class of a transformer with tensors of these names: the wanted one where nothing says otherwise."""
    plain = [name.removeprefix("model.").removeprefix("diffusion_model.") for name in names]
    found = [kind for kind, pattern in _NAMES.items() if any(re.match(pattern, name) for name in plain)]
    if wanted not in _NAMES:
        return found[0] if found else wanted
    if found and _NAMES[found[0]] == _NAMES[wanted]:
        return wanted
    return found[0] if found else None


def weights_facts(files: Mapping[str, str]) -> tuple[dict[str, str], ...]:
    """What a record says of files, by component: "part", "file" and "sha256" of each."""
    return tuple({"part": part, "file": file, "sha256": known_sha256(Path(file))} for part, file in files.items())
