"""Whether a loaded pipeline has all of its weights: the libraries start what is missing at random and only warn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmonarch_cli.errors import ModelError

_WEIGHTS_IN = ("transformer", "transformer_2", "text_encoder", "vae")


def check_complete(pipeline: Any, folder: Path) -> None:
    """ModelError when a parameter of a component is not in its files."""
    from safetensors import safe_open

    for name in _WEIGHTS_IN:
        module = getattr(pipeline, name, None)
        if module is None:
            continue
        stored: set[str] = set()
        for path in (folder / name).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                stored |= set(file.keys())
        state = module.state_dict()
        if not stored <= state.keys():
            # transformers renamed them while loading, so only their number can be compared.
            if len({tensor.data_ptr() for tensor in state.values()}) > len(stored):
                raise ModelError(f"{folder / name} lacks some of its weights: download the model again")
            continue
        # A tied weight is stored under one of its names only.
        loaded = {tensor.data_ptr() for key, tensor in state.items() if key in stored}
        missing = sorted(key for key, tensor in state.items() if key not in stored and tensor.data_ptr() not in loaded)
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(f"{folder / name} lacks the weights of {missing[0]}{others}: download the model again")
