"""A local diffusers folder, read without torch: configs become a `ModelEntry`, weights are checked for damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts
from vmonarch_cli.models.catalogue import PIPELINES, PUBLISHED
from vmonarch_cli.models.config import Config
from vmonarch_cli.models.unfit import UNFIT
from vmonarch_cli.models.weights import count_parameters
from vmonarch_cli.text import printable, shown, with_article
from vmonarch_cli.untrusted.files import read_json

_BESIDE_THE_TEXT = ("text_encoder", "text_encoder_2", "image_encoder", "connectors")  # counted with the text encoder
_OF_SOUND = ("audio_vae", "vocoder")
_COMPONENTS = ("transformer", "transformer_2", "vae", *_BESIDE_THE_TEXT)
INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
"""Where a pipeline of diffusers names its components; a modular one does so in a file of its own."""
_SETTINGS = {
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "vlprocessor": "processor_config.json",
    "processor": "preprocessor_config.json",
    "featureextractor": "preprocessor_config.json",
    "guid": "guider_config.json",
}
"""What is in a component's class name -> the file of its settings; a model's is config.json."""
_LARGEST_SHIFT = 100


def read_folder(folder: Path, count: Callable[[Path], int] = count_parameters) -> ModelEntry:
    """Describe the pipeline in `folder`; defaults come from the known model of the same architecture, if any.

    count: parameters of one component's folder.
    Raises ModelError, in one sentence, when the folder is not a pipeline of a known family, a config is missing or does
    not describe such a model, or a weights file is missing, not safetensors, or damaged (headers and file sizes are
    checked; the tensors themselves are not read).
    """
    index = read_index(folder)
    present = [name for name in _COMPONENTS if _is_component(index.get(name))]
    facts = _facts(folder, index)
    for name in (needed := facts.modular or facts.needed):
        if not _is_component(index.get(name)):
            index_name = MODULAR_INDEX if facts.modular else INDEX
            raise ModelError(f"{folder} is not a complete model: its {index_name} names no {name}")
    _check_configs(folder, index)
    params = {name: count(folder / name) for name in present}
    owner = "a Wan transformer" if facts.family == "wan" else with_article(facts.transformer)
    path = folder / "transformer" / "config.json"
    config = Config(_table(folder, "transformer/config.json", "a complete model"), path, owner)
    vae = Config(_table(folder, "vae/config.json", "a complete model"), folder / "vae" / "config.json", "its VAE")
    figures: dict[str, Any] = {
        "family": facts.family,
        "pipeline": facts.name,
        "takes_image": facts.takes_image,
        "image_pipeline": _image_pipeline(facts, index),
        "takes_video": facts.takes_video,
        "video_pipeline": _video_pipeline(facts, index),
        **facts.figures(config, vae),
        "scheduler": index["scheduler"][1] if _is_component(index.get("scheduler")) else None,
        "transformers": 2 if "transformer_2" in present else 1,
        "boundary_ratio": _boundary(folder, index, two="transformer_2" in present),
        "transformer_params": params["transformer"],
        "text_encoder_params": sum(params.get(name, 0) for name in _BESIDE_THE_TEXT),
        "vae_params": params["vae"] + sum(count(folder / name) for name in _OF_SOUND if name in needed),
    }
    name = folder.resolve().name
    try:
        entry = ModelEntry(alias=name, title=name, defaults=_defaults(figures), **figures)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"{path} does not describe {owner}: {field} comes out as {shown(first['input'])}, which none has"
        ) from None
    return _with_own_schedule(entry, folder)


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder's index says: each component as [library, class], and settings; ModelError where there is none.

    Of a modular pipeline only the components that are loaded are in it; where they come from is left out, because they
    are read from the folder.
    """
    if (folder / INDEX).is_file() or not (folder / MODULAR_INDEX).is_file():
        return _table(folder, INDEX, "a diffusers model folder")
    table = _table(folder, MODULAR_INDEX, "a diffusers model folder")
    name = table.get("_class_name")
    known = PIPELINES.get(name) if isinstance(name, str) else None
    used = None if known is None else known.modular
    return {key: _modular_value(value) for key, value in table.items() if used is None or key[:1] == "_" or key in used}


def _modular_value(value: Any) -> Any:
    """A component as [library, class]: it says so itself where it was loaded when the index was written, and the
    place that it comes from says so always.
    """
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[2], dict):
        return value
    return value[:2] if _is_component(value[:2]) else value[2].get("type_hint")


def _check_configs(folder: Path, index: dict[str, Any]) -> None:
    """ModelError when a component that the pipeline loads has no settings: the libraries' words for it are long."""
    for name, value in index.items():
        if not _is_component(value):
            continue
        settings = _SETTINGS.get(next((part for part in _SETTINGS if part in value[1].lower()), ""), "config.json")
        if not (folder / name / settings).is_file():
            raise ModelError(f"{folder} is not a complete model: {name}/{settings} is missing, which {value[1]} needs")


def _boundary(folder: Path, index: dict[str, Any], *, two: bool) -> float | None:
    """Where the second transformer takes over, as a part of the noise levels; None for one transformer."""
    value = index.get("boundary_ratio")
    where = f"{folder}/model_index.json"
    if value is None:
        if two:
            raise ModelError(f"{where} has no boundary_ratio, without which its transformer_2 is never used")
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ModelError(f"{where}: boundary_ratio is a number between 0 and 1, got {shown(value)}")
    if not two:
        raise ModelError(f"{where} has a boundary_ratio and no transformer_2 that could take over there")
    return float(value)


def _image_pipeline(facts: PipelineFacts, index: dict[str, Any]) -> str | None:
    """Of Wan's text-to-video models only TI2V, whose timesteps are per token, takes a first frame; Motif's do where
    they come with what prepares it.
    """
    if facts.family == "wan" and not index.get("expand_timesteps"):
        return None
    if facts.family == "motif-video" and not _is_component(index.get("feature_extractor")):
        return None
    return facts.image_pipeline


def _video_pipeline(facts: PipelineFacts, index: dict[str, Any]) -> str | None:
    """Wan's takes one transformer, whose timestep is one for all tokens."""
    alone = not (index.get("expand_timesteps") or _is_component(index.get("transformer_2")))
    return facts.video_pipeline if alone or facts.video_pipeline == facts.name else None


def _facts(folder: Path, index: dict[str, Any]) -> PipelineFacts:
    """The known pipeline of a folder; ModelError that says what was found where there is none."""
    name = index.get("_class_name")
    if isinstance(name, str) and name in PIPELINES:
        return PIPELINES[name]
    if isinstance(name, str) and name in UNFIT:
        raise ModelError(f"{folder} holds {with_article(name)}, which is not supported: {UNFIT[name]}")
    named = name if isinstance(name, str) and name else "pipeline of no named class"
    found = f"{folder} holds a {printable(named)}"
    transformer = index.get("transformer")
    if _is_component(transformer):
        kind = printable(transformer[1])
        same = [facts.name for facts in PIPELINES.values() if facts.transformer == kind]
        found += f" with a {kind}, "
        if same:
            found += f"whose attention is known but whose way to be called is not (known are {', '.join(same)})"
        else:
            found += "and the layout of its tokens is not known, without which its attention cannot be structured"
    raise ModelError(f"{found}; supported are {', '.join(PIPELINES)}")


def _defaults(figures: dict[str, Any]) -> Defaults:
    """Defaults of the known model with the same architecture, else those of its pipeline's smallest, or its family's
    smallest where no model of the pipeline is known, without a prompt.
    """
    same = ("pipeline", "heads", "head_dim", "layers", "ffn_dim", "latent_channels", "transformers")
    distilled = figures.get("distilled", False)
    for entry in PUBLISHED:
        if all(getattr(entry, key) == figures[key] for key in same) and entry.distilled == distilled:
            return entry.defaults
    relatives = [entry for entry in PUBLISHED if entry.pipeline == figures["pipeline"]]
    relatives = [entry for entry in relatives if entry.distilled == distilled] or relatives
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
    config = _table(folder, "scheduler/scheduler_config.json", "a complete model")
    if config.get("shift_terminal"):  # the schedule is stretched to end there, which one step cannot
        entry = entry.model_copy(update={"min_steps": max(2, entry.min_steps)})
    if config.get("use_karras_sigmas"):  # which no shift changes
        return entry.model_copy(update={"has_flow_shift": False})
    shift = config.get("flow_shift", config.get("shift"))
    if entry.defaults.flow_shift is not None or config.get("use_dynamic_shifting"):
        return entry
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= _LARGEST_SHIFT:
        return entry
    return entry.model_copy(update={"defaults": entry.defaults.model_copy(update={"flow_shift": float(shift)})})


def _is_component(value: Any) -> TypeGuard[list[str]]:
    """Whether a value of a model's index is [library, class], and not [null, null] or a setting."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _table(folder: Path, name: str, what: str) -> dict[str, Any]:
    """A JSON object of the model; `what` is said where the file is missing."""
    path = folder / name
    missing = f"{folder} is not {what}: {path.parent.name or '.'}/{path.name} is missing"
    # Schedulers' settings have infinities, which Python's JSON writes.
    table = read_json(path, f"{folder} is not {what}: {path}", ModelError, missing=missing, constants=True)
    if not isinstance(table, dict):
        raise ModelError(f"{folder} is not {what}: {path} is not a JSON object")
    return table
