"""Modular pipelines of diffusers, beside the ordinary ones: built from their blocks, called and placed in memory.

A modular pipeline is a sequence of blocks around components; it has no `encode_prompt`, no callback, no way to stop
before decoding and no offloading of its own. Its class and its blocks are diffusers' own, whatever a folder's index
says; of the index only the classes of the components count.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.errors import ModelError
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.folder import read_index
from vmonarch_cli.text import printable

_LIBRARIES = ("diffusers", "transformers")
_DECODING = "decode"
"""The name of the last block of every modular pipeline here."""
_ORDER = ("text_encoder", "vae", "transformer", "audio_vae")
"""Components in the order in which a call needs them; what comes next takes the place of what was before."""


def read_modular(
    facts: PipelineFacts,
    folder: Path,
    given: Mapping[str, Any],
    options: Callable[[str], dict[str, Any]],
) -> Any:
    """A modular pipeline with the components of a folder that it uses.

    given: components that were read before, by name; None leaves one out. options: arguments of `from_pretrained` for
    a component. Raises ModelError for a component of another library, and whatever `from_pretrained` raises.
    """
    import diffusers

    kind = getattr(diffusers, facts.name)
    pipeline = kind(blocks=getattr(diffusers, kind.default_blocks_name)())
    index = read_index(folder)
    readers = FAMILIES[facts.transformer].readers
    parts = dict(given)
    for name in facts.modular:
        if name not in parts:
            own = readers.get(name)
            parts[name] = _read(folder, name, index[name], options(name)) if own is None else own(folder / name)
    pipeline.register_components(**{name: part for name, part in parts.items() if part is not None})
    return pipeline


def _read(folder: Path, name: str, value: list[str], options: dict[str, Any]) -> Any:
    """One component of a folder; `value`: its library and class."""
    library, class_name = value
    kind: Any = getattr(importlib.import_module(library), class_name, None) if library in _LIBRARIES else None
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        named = printable(f"{library}.{class_name}")
        raise ModelError(f"{folder} names {named} as its {name}, which is no class of {' or '.join(_LIBRARIES)}")
    load: Any = kind.from_pretrained
    if not issubclass(kind, torch.nn.Module):
        options = {key: value for key, value in options.items() if key == "local_files_only"}
    return load(str(folder / name), **options)


def is_modular(pipeline: Any) -> bool:
    """Whether a pipeline is one of blocks."""
    import diffusers

    return isinstance(pipeline, diffusers.ModularPipeline)


def input_names(pipeline: Any) -> list[str]:
    """What a pipeline's call takes."""
    return [name for name in pipeline._blocks.input_names if name is not None]


@contextmanager
def without_decoding(pipeline: Any) -> Iterator[None]:
    """Inside the block a call ends with the latents, which stay in its state."""
    blocks = pipeline._blocks.sub_blocks
    decoding = blocks.pop(_DECODING)
    try:
        yield
    finally:
        blocks[_DECODING] = decoding


def hide_progress(pipeline: Any) -> None:
    """Show no bar: the pipeline's own setting reaches the outermost blocks alone."""

    def hide(block: Any) -> None:
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        for inner in getattr(block, "sub_blocks", {}).values():
            hide(inner)

    hide(pipeline._blocks)


def models_of(pipeline: Any) -> dict[str, Any]:
    """The components with weights, in the order in which a call needs them."""
    found = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: found[name] for name in sorted(found, key=lambda name: _ORDER.index(name))}


def offload_models(pipeline: Any, device: torch.device) -> None:
    """As `enable_model_cpu_offload` of ordinary pipelines: a component comes to the device when it runs, and the one
    before it leaves.
    """
    from accelerate import cpu_offload_with_hook

    hook = None
    for part in models_of(pipeline).values():
        part.to("cpu")
        _, hook = cpu_offload_with_hook(part, device, prev_module_hook=hook)


def offload_layers(pipeline: Any, device: torch.device) -> None:
    """As `enable_sequential_cpu_offload`: a layer comes to the device when it runs."""
    from accelerate import cpu_offload

    for part in models_of(pipeline).values():
        part.to("cpu")
        cpu_offload(part, device, offload_buffers=len(part._parameters) > 0)


def offload_groups(pipeline: Any, stay: list[str], **options: Any) -> None:
    """As `enable_group_offload`: blocks come to the device when they run; the components in `stay` are always there."""
    from diffusers.hooks import apply_group_offloading

    for name, part in models_of(pipeline).items():
        if name in stay:
            part.to(options["onload_device"])
        elif hasattr(part, "enable_group_offload"):
            part.enable_group_offload(**options)
        else:
            apply_group_offloading(part, **options)


def free_models(pipeline: Any) -> None:
    """Let the component that ran last leave the device, where `offload_models` has them come and go."""
    from accelerate.hooks import CpuOffload

    for part in models_of(pipeline).values():
        if isinstance(getattr(part, "_hf_hook", None), CpuOffload):
            part.to("cpu")
