"""Every weight of every component that a run uses comes from a file: the libraries start what is missing at random."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.folder import read_index
from vmonarch_cli.models.weights import read_headers

_NOT_USED = ("lm_head.",)
"""Weights of text encoders that no pipeline uses: they read the hidden states."""
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


def load_encoders(folder: Path, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """The components of a model that come from transformers (text and image encoders), by name, complete.

    transformers renames weights as it reads them, so that only its own report says what was in no file.
    Raises ModelError when a weight is missing or has another shape.
    """
    import transformers

    found = {}
    for name, class_name in _from_transformers(folder):
        kind: Any = getattr(transformers, class_name, None)
        if "Tokenizer" in class_name:
            _check_tokenizer(folder / name, class_name)
        is_model: bool = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
        if not is_model:
            continue
        read_headers(folder / name)
        found[name], report = kind.from_pretrained(
            str(folder / name),
            dtype=dtypes.get(name, dtypes["default"]),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        mismatched = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"])
        if mismatched:
            raise ModelError(f"{folder / name}: {mismatched[0]} has another shape than its config says")
        _check(folder / name, report["missing_keys"], report["unexpected_keys"])
    return found


def _from_transformers(folder: Path) -> list[tuple[str, str]]:
    """(component, class) of a model's index."""
    pairs = [(name, value) for name, value in read_index(folder).items() if isinstance(value, list) and len(value) == 2]
    return [(name, value[1]) for name, value in pairs if value[0] == "transformers" and isinstance(value[1], str)]


def _check_tokenizer(folder: Path, class_name: str) -> None:
    """ModelError when a tokenizer has no vocabulary; ByT5's are the bytes."""
    if "ByT5" not in class_name and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise ModelError(
            f"{folder} has no vocabulary, which {class_name} needs: {_VOCABULARIES[0]} or another belongs there"
        )


def check_complete(pipeline: Any, folder: Path, *, without: Iterable[str] = ()) -> None:
    """ModelError when a weight of a component that diffusers loaded is in no file; `without`: components left out."""
    for name, module in pipeline.components.items():
        if name in without or not isinstance(module, torch.nn.Module) or not (folder / name).is_dir():
            continue
        stored = {key for tensors in read_headers(folder / name).values() for key in tensors}
        state = module.state_dict()
        # A tied weight is stored under one of its names only.
        loaded = {tensor.data_ptr() for key, tensor in state.items() if key in stored}
        missing = [key for key, tensor in state.items() if key not in stored and tensor.data_ptr() not in loaded]
        _check(folder / name, missing, stored - state.keys())


def _check(folder: Path, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """ModelError for missing weights; `left_over` are names in the files that the component does not have."""
    lacking = sorted(key for key in missing if not key.startswith(_NOT_USED))
    if not lacking:
        return
    others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    strange = sorted(left_over)
    if 2 * len(strange) >= len(lacking):  # a tied weight lacks under two names and is there under one
        raise ModelError(
            f"{folder} holds its weights under other names: {lacking[0]}{others} should be there and {strange[0]} is; "
            "use the model in diffusers' format"
        )
    raise ModelError(f"{folder} lacks the weights of {lacking[0]}{others}: download the model again")
