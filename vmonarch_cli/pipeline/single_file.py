"""Transformers from single files: read by diffusers, and held against the config of the folder that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.single_file import GGUF
from vmonarch_cli.models.weights import read_header
from vmonarch_cli.text import with_article
from vmonarch_cli.untrusted.files import read_json

Shapes = Mapping[str, tuple[int, ...]]


def load_transformer(file: Path, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """A transformer of a file's weights with the config of a model folder's ``part``, as the folder's own would load.

    Raises ModelError when the file does not hold exactly this transformer's weights.
    """
    import diffusers

    config = read_json(folder / part / "config.json", str(folder / part / "config.json"), ModelError)
    kind = getattr(diffusers, config["_class_name"])
    _check_fits(kind, config, _shapes(file), file, folder / part)
    options: dict[str, Any] = {"config": str(folder), "subfolder": part, "local_files_only": True}
    if file.suffix.lower() == GGUF:
        options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        return kind.from_single_file(str(file), dtype=dtype, **options)
    # In the file's own dtype: diffusers would round what the folder's loader keeps in float32.
    transformer = kind.from_single_file(str(file), **options)
    wide = set(kind._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if wide & set(name.split(".")) else dtype)
    return transformer


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor; of a quantised one the shape that it stands for."""
    if file.suffix.lower() != GGUF:
        return {name: tensor.shape for name, tensor in read_header(file).items()}
    import gguf

    return {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in gguf.GGUFReader(file).tensors}


def _check_fits(kind: Any, config: dict[str, Any], shapes: Shapes, file: Path, folder: Path) -> None:
    """ModelError unless the file has every weight of the class, in the shape that the config says.

    The converter of diffusers runs on tensors without content, so that nothing is read before it is known to fit.
    """
    from accelerate import init_empty_weights
    from diffusers.loaders import single_file_model as loader

    with init_empty_weights():
        expected = {name: tuple(value.shape) for name, value in kind.from_config(config).state_dict().items()}
    own: dict[str, Any] = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if not expected.keys() <= own.keys():
        convert = loader.SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"]
        try:
            own = convert(config=config, checkpoint=own)
        except Exception as error:
            # Converters take tensors by name and by number, and raise KeyError, IndexError, RuntimeError and others.
            raise ModelError(
                f"{file} does not hold the weights of {with_article(kind.__name__)}, which {folder} is"
            ) from error
    found = {name: tuple(value.shape) for name, value in own.items()}
    missing = sorted(expected.keys() - found.keys())
    if 2 * len(missing) > len(expected):
        raise ModelError(f"{file} does not hold the weights of {with_article(kind.__name__)}, which {folder} is")
    wrong = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{file} does not fit {folder}: {name} has the shape {found[name]} in the file and {expected[name]} by the "
            "config; give the file of a model of the same size"
        )
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{file} lacks the weights of {missing[0]}{others}, which {folder} has: download it again")
    more = sorted(found.keys() - expected.keys())
    of_blocks = [name for name in more if name.startswith(("blocks.", "transformer_blocks.", "vace_blocks."))]
    if of_blocks:
        raise ModelError(f"{file} does not fit {folder}: it has {of_blocks[0]}, and the config has no such layer")
