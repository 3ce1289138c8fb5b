"""Tuned adapters for a pipeline that a script made: read, checked against the pipeline, loaded, taken out again."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.tuned import check_base
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.pipeline.tuned import is_loaded, load_adapters, unload
from vmonarch_cli.plan.setup import AdapterFile
from vmonarch_cli.plan.tuned import read
from vmonarch_cli.presets import Preset
from vmonarch_cli.text import with_article
from vmonarch_cli.untrusted.files import user_path

_ANY_STEPS = 1000
"""So many that no preset's `few_steps` applies."""


@contextmanager
def with_tuned(pipeline: Any, file: str, preset: Preset) -> Iterator[str]:
    """Have an adapter in a pipeline inside the block, off; gives the name that `swapped` turns it on by.

    Raises ModelError, in one sentence, for a file that is no adapter, for one of other weights or another preset, and
    for a pipeline that cannot have one. Nothing is changed then.
    """
    try:
        adapter = read(user_path(file, "adapter"))
        _check(pipeline, adapter, preset)
        loaded = is_loaded(pipeline, adapter)
        if not loaded:
            load_adapters(pipeline, [adapter])
    except InputError as error:
        raise ModelError(error.message) from None
    try:
        yield adapter.layer_name
    finally:
        if not loaded:
            unload(pipeline, adapter)


def _check(pipeline: Any, adapter: AdapterFile, preset: Preset) -> None:
    said, name = adapter.adapter, type(pipeline).__name__
    if preset.attention == "dense":
        raise ModelError(f"adapter {adapter.path} is for structured attention, and preset {preset.name} is dense")
    for steps in (said.steps, _ANY_STEPS):
        misfit = said.misfit(preset, steps)
        if misfit is not None:
            raise ModelError(
                f"adapter {adapter.path} was tuned with preset {said.preset_name} and cannot run with {preset.name}: "
                f"{misfit}"
            )
    if said.kind == "lora" and not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"adapter {adapter.path} is a LoRA, and diffusers loads none into {with_article(name)}")
    if said.kind == "lora" and importlib.util.find_spec("peft") is None:
        raise ModelError(f"adapter {adapter.path} needs peft: pip install peft")
    if said.kind == "weights" and _moves(pipeline):
        raise ModelError(
            f"adapter {adapter.path} holds whole weights, which change places with the model's: {with_article(name)} "
            "that is offloaded by groups or by layers cannot have it"
        )
    check_base(said, adapter.path, _folder(pipeline, adapter))


def _folder(pipeline: Any, adapter: AdapterFile) -> Path:
    """The folder that a pipeline's first transformer was read from, by which diffusers names it."""
    source = transformers_of(pipeline)[0].config.get("_name_or_path") or ""
    folder = Path(source)
    if folder.name != "transformer" or not folder.is_dir():
        raise ModelError(
            f"adapter {adapter.path} was tuned on the weights of {adapter.adapter.model}, and which this "
            f"{type(pipeline).__name__} has is not known: load all of it with from_pretrained"
        )
    return folder.parent


def _moves(pipeline: Any) -> bool:
    """Whether hooks fetch the weights of parts of a transformer when they run."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    transformers = transformers_of(pipeline)
    meta = any(parameter.is_meta for transformer in transformers for parameter in transformer.parameters())
    return meta or any(_is_group_offload_enabled(transformer) for transformer in transformers)
