"""A local diffusers folder, read without torch: configs become a `ModelEntry`, weights are checked for damage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.catalogue import PIPELINES, PUBLISHED

_NEEDED = ("transformer", "text_encoder", "vae")
_BESIDE_THE_TEXT = ("text_encoder", "text_encoder_2", "image_encoder", "connectors")  # counted with the text encoder
_COMPONENTS = ("transformer", "transformer_2", "vae", *_BESIDE_THE_TEXT)
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


def read_folder(folder: Path, count: Callable[[Path], int] | None = None) -> ModelEntry:
    """Describe the pipeline in `folder`; defaults come from the known model of the same architecture, if any.

    count: parameters of one component's folder; `count_parameters` by default.
    Raises ModelError, in one sentence, when the folder is not a pipeline of a known family, or a weights file is
    missing, not safetensors, or damaged (header and file size are checked; the tensors themselves are not read).
    """
    index = _read_json(folder / "model_index.json", f"{folder} is not a diffusers model folder")
    present = [name for name in _COMPONENTS if _is_component(index.get(name))]
    facts = _facts(folder, index)
    for name in _NEEDED:
        if name not in present:
            raise ModelError(f"{folder} is not a complete model: its model_index.json names no {name}")
    params = {name: (count or count_parameters)(folder / name) for name in present}
    config_file = folder / "transformer" / "config.json"
    config = _read_json(config_file, f"{folder} is not a complete model")
    vae = _read_json(folder / "vae" / "config.json", f"{folder} is not a complete model")
    kind = "Wan" if facts.family == "wan" else facts.transformer
    try:
        figures: dict[str, Any] = {
            "family": facts.family,
            "pipeline": facts.name,
            "takes_image": facts.takes_image,
            "image_pipeline": _image_pipeline(facts, index),
            **facts.figures(config, vae),
            "transformers": 2 if "transformer_2" in present else 1,
            "boundary_ratio": index.get("boundary_ratio"),
            "transformer_params": params["transformer"],
            "text_encoder_params": sum(params.get(name, 0) for name in _BESIDE_THE_TEXT),
            "vae_params": params["vae"],
        }
        entry = ModelEntry(
            alias=folder.resolve().name, title=folder.resolve().name, defaults=_defaults(figures), **figures
        )
    except KeyError as error:
        article = "a Wan transformer" if kind == "Wan" else f"a {kind}"
        raise ModelError(f"{config_file} has no {error}, which {article} needs") from None
    except (ValueError, TypeError):
        raise ModelError(f"{config_file} does not describe a {kind} transformer") from None
    return _with_own_schedule(entry, folder)


def _image_pipeline(facts: PipelineFacts, index: dict[str, Any]) -> str | None:
    """Of Wan's text-to-video models only TI2V, whose timesteps are per token, takes a first frame; Motif's do where
    they come with what prepares it.
    """
    if facts.family == "wan" and not index.get("expand_timesteps"):
        return None
    if facts.family == "motif-video" and not _is_component(index.get("feature_extractor")):
        return None
    return facts.image_pipeline


def _facts(folder: Path, index: dict[str, Any]) -> PipelineFacts:
    """The known pipeline of a folder; ModelError that says what was found where there is none."""
    name = index.get("_class_name")
    if name in PIPELINES:
        return PIPELINES[name]
    found = f"{folder} holds a {name or 'pipeline of no named class'}"
    transformer = index.get("transformer")
    if _is_component(transformer) and isinstance(transformer, list):
        kind = transformer[1]
        same = [facts.name for facts in PIPELINES.values() if facts.transformer == kind]
        found += f" with a {kind}, "
        if same:
            found += f"whose attention is known but whose way to be called is not (known are {', '.join(same)})"
        else:
            found += "and the layout of its tokens is not known, without which its attention cannot be structured"
    raise ModelError(f"{found}; supported are {', '.join(PIPELINES)}")


def count_parameters(folder: Path) -> int:
    """Parameters in the safetensors files of one component, from their headers; ModelError when one is damaged."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        pickles = [p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind)]
        if pickles:
            raise ModelError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened: "
                "convert them to safetensors"
            )
        raise ModelError(f"{folder} has no weights: a *.safetensors file belongs there")
    _check_shards(folder, {path.name for path in files})
    return sum(_count_in_file(path) for path in files)


def _check_shards(folder: Path, present: set[str]) -> None:
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(_read_json(index, f"{index} is damaged").get("weight_map", {}).values())
        missing = sorted(shards - present)
        if missing:
            raise ModelError(f"{folder} is incomplete: {missing[0]} is missing (of {len(shards)} weight files)")


def _count_in_file(path: Path) -> int:
    """Parameters of one safetensors file; its header must parse and the file must be as long as the header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"weights file {path} is damaged: it is not a safetensors file; download it again")
        raw = file.read(length)
    try:
        tensors = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        count: int = sum(math.prod(entry["shape"]) for entry in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"weights file {path} is damaged: its header does not parse; download it again") from None
    if size != 8 + length + end:
        raise ModelError(
            f"weights file {path} is damaged: it has {size:,} bytes and its header describes {8 + length + end:,}; "
            "download it again"
        )
    return count


def _defaults(figures: dict[str, Any]) -> Defaults:
    """Defaults of the known model with the same architecture, else those of its pipeline's smallest, or its family's
    smallest where no model of the pipeline is known, without a prompt.
    """
    same = ("pipeline", "heads", "head_dim", "layers", "ffn_dim", "latent_channels", "transformers")
    for entry in PUBLISHED:
        if all(getattr(entry, key) == figures[key] for key in same):
            return entry.defaults
    relatives = [entry for entry in PUBLISHED if entry.pipeline == figures["pipeline"]]
    relatives = relatives or [entry for entry in PUBLISHED if entry.family == figures["family"]]
    smallest = min(relatives, key=lambda entry: entry.transformer_params)
    return smallest.defaults.model_copy(
        update={"negative_prompt": "", "flow_shift": None, "guidance_scale_2": None, "dense_every": 1}
    )


def _with_own_schedule(entry: ModelEntry, folder: Path) -> ModelEntry:
    """Take what the folder's scheduler says: its fewest steps, and its flow shift where no known model gives one.

    A scheduler that shifts by the number of tokens has no shift of its own.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return entry
    config = _read_json(path, f"{path} is damaged")
    if config.get("shift_terminal"):  # the schedule is stretched to end there, which one step cannot
        entry = entry.model_copy(update={"min_steps": max(2, entry.min_steps)})
    shift = config.get("flow_shift", config.get("shift"))
    if entry.defaults.flow_shift is not None or config.get("use_dynamic_shifting"):
        return entry
    if not isinstance(shift, int | float) or shift <= 0:
        return entry
    return entry.model_copy(update={"defaults": entry.defaults.model_copy(update={"flow_shift": float(shift)})})


def _is_component(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[1] is not None


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{otherwise}: {path.parent.name}/{path.name} is missing") from None
    except OSError as error:
        raise ModelError(f"{otherwise}: {path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise ModelError(f"{otherwise}: {path} is not valid JSON") from None
    if not isinstance(table, dict):
        raise ModelError(f"{otherwise}: {path} is not a JSON object")
    return table
