"""LoRA into a pipeline's transformers: every tensor of the file is applied, with its alpha and rank, or none is.

Files name layers as diffusers does, as the model's own code does ("blocks.0.self_attn.q"), or with underscores for dots
(kohya). Wan's own names are translated here; for other families diffusers' converters are asked.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.lora import LoraTensor, lora_file, lora_tensors
from vmonarch_cli.models.weights import read_header
from vmonarch_cli.plan.setup import parse_lora
from vmonarch_cli.text import innermost_line, printable

_WAN_NAMES = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_out\.0$", "_attn.o"),
    (r"_attn\.to_([qkv])$", r"_attn.\1"),
    (r"_attn\.add_([kv])_proj$", r"_attn.\1_img"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^proj_out$", "head.head"),
)
"""diffusers' names of Wan's layers -> those of Wan's own code."""


@dataclass(frozen=True)
class _Layer:
    """What a LoRA does to one layer: A (rank, in, ...), B (out, rank, ...), and a bias (out,) or None."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None


def load_loras(pipeline: Any, texts: tuple[str, ...]) -> None:
    """Load every LoRA ('path[:scale]') and set its scale; InputError or ModelError in one sentence."""
    if not texts:
        return
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"--lora: diffusers loads no LoRA into a {type(pipeline).__name__}")
    if importlib.util.find_spec("peft") is None:
        raise InputError('--lora needs peft: pip install "vmonarch[lora]"')
    chosen = [parse_lora(text) for text in texts]
    names = [f"lora_{index}" for index in range(len(chosen))]
    for name, lora in zip(names, chosen, strict=True):
        load_lora(pipeline, lora.source, name)
    pipeline.set_adapters(names, [lora.scale for lora in chosen])


def load_lora(pipeline: Any, source: str, adapter: str) -> None:
    """Load one LoRA, a path or a hub id, under a name of its own; ModelError when a tensor of it cannot be applied."""
    path = lora_file(source)
    lora_tensors(read_header(path), source)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        metadata = file.metadata() or {}
    by_expert = _layers(pipeline, tensors, _Alphas.of(metadata, source), source)
    try:
        for second, layers in by_expert.items():
            state = {key: tensor for name, layer in layers.items() for key, tensor in _state(name, layer)}
            where = {"load_into_transformer_2": True} if second else {}
            pipeline.load_lora_weights(state, adapter_name=adapter, **where)
            transformer = pipeline.transformer_2 if second else pipeline.transformer
            _check_loaded(transformer, layers, adapter, source)
    except ModelError:
        raise
    except Exception as error:
        # diffusers and peft raise what they like: ValueError, KeyError, RuntimeError for another shape, OSError.
        raise ModelError(
            f"LoRA {source} does not fit this model ({innermost_line(error).rstrip('.')[:200]}): "
            "it must have been trained on the same model"
        ) from error


def _state(name: str, layer: _Layer) -> list[tuple[str, torch.Tensor]]:
    found = [(f"transformer.{name}.lora_A.weight", layer.down), (f"transformer.{name}.lora_B.weight", layer.up)]
    return found if layer.bias is None else [*found, (f"transformer.{name}.lora_B.bias", layer.bias)]


def _layers(
    pipeline: Any, tensors: dict[str, torch.Tensor], alphas: _Alphas, source: str
) -> dict[bool, dict[str, _Layer]]:
    """Second transformer or not -> module name -> what is done to it. ModelError for what cannot be applied."""
    parts = lora_tensors(tensors, source)
    if any(part.second for part in parts) and getattr(pipeline, "transformer_2", None) is None:
        raise ModelError(f"LoRA {source} is for the second of two transformers, and this model has one")
    names = _module_names(pipeline.transformer)
    unknown = sorted({part.layer for part in parts if part.layer not in names and part.part != "difference"})
    if unknown and len(unknown) == len({part.layer for part in parts}):
        converted = _converted(pipeline, tensors)
        if converted is not None:
            return _layers_of(lora_tensors(converted, source), converted, names, _Alphas(), source)
    return _layers_of(parts, tensors, names, alphas, source)


def _converted(pipeline: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The tensors under diffusers' names, with alpha applied; None where its converter does not know the file."""
    try:
        state: dict[str, torch.Tensor] = type(pipeline).lora_state_dict(dict(tensors))
    except Exception:  # its converters fail in ways of their own on what they do not know
        return None
    return state if state.keys() != tensors.keys() else None


def _layers_of(
    parts: list[LoraTensor],
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    alphas: _Alphas,
    source: str,
) -> dict[bool, dict[str, _Layer]]:
    by_layer: dict[tuple[bool, str], dict[str, LoraTensor]] = {}
    for part in parts:
        by_layer.setdefault((part.second, part.layer), {})[part.part] = part
    _check_differences(by_layer, tensors, source)
    pairs = {key: found for key, found in by_layer.items() if "A" in found}
    missing = sorted({layer for _, layer in pairs if layer not in names})
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(
            f"LoRA {source} belongs to another model: this one has no layer {printable(missing[0])}{others}"
        )
    made: dict[bool, dict[str, _Layer]] = {}
    for (second, layer), found in pairs.items():
        down, up = tensors[found["A"].name], tensors[found["B"].name]
        own = float(tensors[found["alpha"].name]) if "alpha" in found else None
        scale = alphas.scale(names[layer], own, down.shape[0] if down.ndim else 0)
        if not math.isfinite(scale):
            raise ModelError(f"LoRA {source} has an alpha that is not a finite number, of {printable(layer)}")
        bias = tensors[found["bias"].name] if "bias" in found else None
        # Halves and wider: a product in float16 may round differently than alpha does in the network.
        up = up if scale == 1 else (up.float() * scale).to(up.dtype)
        made.setdefault(second, {})[names[layer]] = _Layer(down, up, bias)
    return made


def _check_differences(
    by_layer: Mapping[tuple[bool, str], Mapping[str, LoraTensor]], tensors: Mapping[str, torch.Tensor], source: str
) -> None:
    """ModelError for a parameter that is changed outright; files often hold such tensors with nothing but zeros."""
    for found in by_layer.values():
        loose = [found.get("difference"), None if "A" in found else found.get("bias")]
        for part in loose:
            if part is not None and torch.count_nonzero(tensors[part.name]):
                raise ModelError(
                    f"LoRA {source} also changes parameters outright ({printable(part.name)}), which diffusers does "
                    "not support: use one of lora_A and lora_B alone"
                )


def _module_names(transformer: Any) -> dict[str, str]:
    """Every name under which a LoRA may know a layer -> its name in diffusers."""
    known: dict[str, str] = {}
    for name, _ in transformer.named_modules():
        native = name
        for pattern, replacement in _WAN_NAMES if _is_wan(transformer) else ():
            native = re.sub(pattern, replacement, native)
        for alias in (name, native):
            known[alias] = known[alias.replace(".", "_")] = name
    return known


def _is_wan(transformer: Any) -> bool:
    return type(transformer).__name__.startswith(("Wan", "SkyReelsV2"))


@dataclass(frozen=True)
class _Alphas:
    """The alphas of a file's metadata, as diffusers writes peft's settings there; a layer's own alpha comes first."""

    alpha: float | None = None
    by_rank_root: bool = False
    patterns: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, metadata: Mapping[str, str], source: str) -> _Alphas:
        """From a safetensors file's metadata; ModelError when they do not parse or are those of a DoRA."""
        text = metadata.get("lora_adapter_metadata")
        if text is None:
            return cls()
        try:
            table = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
            alpha = table.get("lora_alpha")
            found = cls(
                None if alpha is None else float(alpha),
                bool(table.get("use_rslora")),
                tuple((str(name), float(value)) for name, value in (table.get("alpha_pattern") or {}).items()),
            )
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"LoRA {source} has settings in its metadata that do not parse") from None
        if table.get("use_dora"):
            raise ModelError(f"LoRA {source} is a DoRA, which diffusers does not support for video: use a plain LoRA")
        return found

    def scale(self, layer: str, own: float | None, rank: int) -> float:
        """What B A is multiplied by: alpha / rank, 1 without an alpha."""
        alpha = own
        if alpha is None:
            matching = (value for name, value in self.patterns if layer == name or layer.endswith(f".{name}"))
            alpha = next(matching, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(max(1, rank)) if self.by_rank_root and own is None else max(1, rank))


def _check_loaded(transformer: Any, layers: Mapping[str, _Layer], adapter: str, source: str) -> None:
    """ModelError when a layer did not get its part: the libraries leave out what they do not know."""
    modules = dict(transformer.named_modules())
    for name in layers:
        if adapter not in getattr(modules.get(name), "lora_A", {}):
            raise ModelError(f"LoRA {source} was loaded in part only: diffusers left out layer {name}")
