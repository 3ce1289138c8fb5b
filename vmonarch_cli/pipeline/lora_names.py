"""Under which names LoRA files know the layers of a transformer: diffusers' own, and those of the model's own code.

Each family's table turns diffusers' name of a module or parameter into the other one. A layer of the model's own code
may be several of diffusers', whose outputs stand one after the other in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_Rules = tuple[tuple[str, str], ...]

_WAN: _Rules = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_out\.0$", "_attn.o"),
    (r"_attn\.to_([qkv])$", r"_attn.\1"),
    (r"_attn\.add_([kv])_proj$", r"_attn.\1_img"),
    (r"_attn\.norm_added_([qk])$", r"_attn.norm_\1_img"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"(blocks\.\d+)\.norm3$", r"\1.norm_between"),
    (r"(blocks\.\d+)\.norm2$", r"\1.norm3"),
    (r"(blocks\.\d+)\.norm_between$", r"\1.norm2"),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"(vace_blocks\.\d+)\.proj_in$", r"\1.before_proj"),
    (r"(vace_blocks\.\d+)\.proj_out$", r"\1.after_proj"),
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"^proj_out$", "head.head"),
)
_HUNYUAN: _Rules = (
    (r"^x_embedder\.proj$", "img_in.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_1$", "time_in.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2$", "time_in.mlp.2"),
    (r"^time_text_embed\.guidance_embedder\.linear_1$", "guidance_in.mlp.0"),
    (r"^time_text_embed\.guidance_embedder\.linear_2$", "guidance_in.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1$", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2$", "vector_in.out_layer"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_out\.0$", r"txt_in.r.\1.self_attn_proj"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.norm_out\.linear$", r"txt_in.r.\1.adaLN_modulation.1"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.0\.proj$", r"txt_in.r.\1.mlp.fc1"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.2$", r"txt_in.r.\1.mlp.fc2"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.r."),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1$", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2$", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder\.linear_([12])$", r"txt_in.c_embedder.linear_\1"),
    (r"^context_embedder\.proj_in$", "txt_in.input_embedder"),
    (r"^txt_in\.r\.", "txt_in.individual_token_refiner.blocks."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"(single_blocks\.\d+)\.attn\.norm_([qk])$", r"\1.\2_norm"),
    (r"(single_blocks\.\d+)\.norm\.linear$", r"\1.modulation.linear"),
    (r"(single_blocks\.\d+)\.proj_out$", r"\1.linear2"),
    (r"\.attn\.norm_([qk])$", r".img_attn_\1_norm"),
    (r"\.attn\.norm_added_([qk])$", r".txt_attn_\1_norm"),
    (r"\.attn\.to_out\.0$", ".img_attn_proj"),
    (r"\.attn\.to_add_out$", ".txt_attn_proj"),
    (r"(double_blocks\.\d+)\.norm1\.linear$", r"\1.img_mod.linear"),
    (r"(double_blocks\.\d+)\.norm1_context\.linear$", r"\1.txt_mod.linear"),
    (r"\.ff\.net\.0\.proj$", ".img_mlp.fc1"),
    (r"\.ff\.net\.2$", ".img_mlp.fc2"),
    (r"\.ff_context\.net\.0\.proj$", ".txt_mlp.fc1"),
    (r"\.ff_context\.net\.2$", ".txt_mlp.fc2"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1"),
    (r"^proj_out$", "final_layer.linear"),
)
_COMFY_HUNYUAN: _Rules = (
    (r"((?:img|txt|self)_attn)_(qkv|proj)$", r"\1.\2"),
    (r"_mlp\.fc1$", "_mlp.0"),
    (r"_mlp\.fc2$", "_mlp.2"),
    (r"_mod\.linear$", "_mod.lin"),
    (r"\.modulation\.linear$", ".modulation.lin"),
)
"""How ComfyUI writes some of them."""
_LTX: _Rules = (
    (r"^audio_proj_in$", "audio_patchify_proj"),
    (r"^proj_in$", "patchify_proj"),
    (r"^av_cross_attn_video_scale_shift\b", "av_ca_video_scale_shift_adaln_single"),
    (r"^av_cross_attn_video_a2v_gate\b", "av_ca_a2v_gate_adaln_single"),
    (r"^av_cross_attn_audio_scale_shift\b", "av_ca_audio_scale_shift_adaln_single"),
    (r"^av_cross_attn_audio_v2a_gate\b", "av_ca_v2a_gate_adaln_single"),
    (r"\bvideo_a2v_cross_attn_scale_shift_table$", "scale_shift_table_a2v_ca_video"),
    (r"\baudio_a2v_cross_attn_scale_shift_table$", "scale_shift_table_a2v_ca_audio"),
    (r"\.norm_q$", ".q_norm"),
    (r"\.norm_k$", ".k_norm"),
    (r"^(audio_)?prompt_adaln\b", r"\1prompt_adaln_single"),
    (r"^audio_time_embed\.", "audio_adaln_single."),
    (r"^time_embed\.", "adaln_single."),
)
_TABLES = (("Wan", _WAN), ("SkyReelsV2", _WAN), ("HunyuanVideoT", _HUNYUAN), ("LTX", _LTX))
"""Beginning of a transformer's class name -> its table."""
_FUSED = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_q$", r"double_blocks.\1.img_attn_qkv", ("to_q", "to_k", "to_v")),
    (
        r"^transformer_blocks\.(\d+)\.attn\.add_q_proj$",
        r"double_blocks.\1.txt_attn_qkv",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
    ),
    (
        r"^single_transformer_blocks\.(\d+)\.attn\.to_q$",
        r"single_blocks.\1.linear1",
        ("to_q", "to_k", "to_v", "../proj_mlp"),
    ),
    (
        r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_q$",
        r"txt_in.individual_token_refiner.blocks.\1.self_attn_qkv",
        ("to_q", "to_k", "to_v"),
    ),
)
"""HunyuanVideo's layers that diffusers has as several: the first of them, the one, and all of them in its order."""


@dataclass(frozen=True)
class Place:
    """Where the parts of a layer of a file go: modules (or one parameter) of diffusers, in the order of its rows."""

    modules: tuple[str, ...]
    swapped: bool = False
    """The halves of the rows change places: diffusers has scale before shift, and HunyuanVideo shift before scale."""
    component: str = ""
    """The pipeline's part beside its transformers that has them; empty for the transformers."""


class LayerNames:
    """Every name under which a LoRA file may know a layer of a pipeline's transformers."""

    def __init__(self, pipeline: Any) -> None:
        """From the first transformer; a second one is built as it is."""
        transformer = pipeline.transformer
        kind = type(transformer).__name__
        rules = next((table for start, table in _TABLES if kind.startswith(start)), ())
        modules = [name for name, _ in transformer.named_modules() if name and ".lora_" not in name]
        own = [*modules, *(name for name, _ in transformer.named_parameters())]
        self._own = {alias: Place((name,)) for name in own for alias in _aliases(name)}
        self._native: dict[str, Place] = {}
        for name in own:
            native = _translated(name, rules)
            place = Place((name,), swapped=native == "final_layer.adaLN_modulation.1")
            for alias in _variants(native, rules):
                self._native[alias] = place
        for name in modules if rules is _HUNYUAN else ():
            for pattern, native, parts in _FUSED:
                found = re.match(pattern, name)
                if found is not None:
                    place = Place(tuple(_sibling(name, part) for part in parts))
                    for alias in _variants(found.expand(native), rules):
                        self._native[alias] = place
        if kind.startswith("LTX2") and getattr(pipeline, "connectors", None) is not None:
            self._add_connectors(pipeline.connectors)

    def _add_connectors(self, connectors: Any) -> None:
        """LTX-2's text connectors, which a file may change beside the transformer."""
        for name, _ in connectors.named_modules():
            place = Place((name,), component="connectors")
            self._own[f"connectors.{name}"] = place
            native = name.replace("text_proj_in", "aggregate_embed")
            self._native[f"text_embedding_projection.{native}"] = place

    def of(self, layers: Iterable[str]) -> Mapping[str, Place]:
        """The names as a file with these layers means them: of the two ways the one that knows more of them."""
        layers = set(layers)
        own, native = (len(layers - known.keys()) for known in (self._own, self._native))
        return self._own if own <= native else self._native


def _translated(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _aliases(name: str) -> tuple[str, str]:
    """A name, and as kohya's trainers write it."""
    return name, name.replace(".", "_")


def _variants(native: str, rules: _Rules) -> set[str]:
    found = {native}
    if rules is _HUNYUAN:
        found.add(_translated(native, _COMFY_HUNYUAN))
    return {alias for name in found for alias in _aliases(name)}


def _sibling(name: str, part: str) -> str:
    """The module of that name beside another; "../" is one level up."""
    folder = name.rpartition(".")[0]
    while part.startswith("../"):
        folder, part = folder.rpartition(".")[0], part.removeprefix("../")
    return f"{folder}.{part}"


def rows_of(transformer: Any, place: Place) -> list[int]:
    """How many outputs each module of a place has."""
    return [int(parameter_of(transformer, name, "weight").shape[0]) for name in place.modules]


def parameter_of(transformer: Any, name: str, kind: str) -> Any:
    """The weight or bias of a module, also where peft has wrapped it; None for a bias that is not there."""
    return getattr(base_of(transformer, name), kind, None)


def base_of(transformer: Any, name: str) -> Any:
    """A module as it was before peft wrapped it; for a parameter's name the parameter."""
    found = transformer
    for part in name.split("."):
        found = getattr(found, part)
    return getattr(found, "base_layer", found)
