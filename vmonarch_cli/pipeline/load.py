"""Load a diffusers pipeline: quietly, completely or not at all, on the device and in the dtype asked for."""

from __future__ import annotations

import inspect
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.errors import InputError, ModelError, VmonarchError
from vmonarch_cli.models import hub
from vmonarch_cli.models.families import PIPELINES
from vmonarch_cli.models.folder import read_folder
from vmonarch_cli.pipeline import apply_setup as additions
from vmonarch_cli.pipeline import context_parallel as distributed
from vmonarch_cli.pipeline import offload
from vmonarch_cli.pipeline.device import device_name, dtype_name
from vmonarch_cli.plan import memory
from vmonarch_cli.plan.setup import Setup

_WEIGHTS_IN = ("transformer", "transformer_2", "text_encoder", "vae")
_ONLY_DENOISING = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "image_encoder", "connectors")
_IN_DTYPE = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "connectors")


def load_pipeline(
    source: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    flow_shift: float | None = None,
    revision: str | None = None,
    setup: Setup = Setup(offload="none"),  # noqa: B008 - frozen
    offload_mode: str = "none",
    image_pipeline: str | None = None,
    share_clip: bool = False,
    to_decode: bool = False,
) -> Any:
    """A diffusers pipeline from a local folder or a hub id, ready to run, or (`to_decode`) to decode alone, without the
    transformers and text encoders.

    Transformers and text encoders are in ``dtype``, the VAE in float32 where its family needs it. ``offload_mode`` is
    what ``offload.choose`` decided; ``image_pipeline`` names the class to use the weights with when there is a first
    frame; with ``share_clip`` the processes of a torchrun split every clip. Only safetensors are read and no code from
    the model runs.
    Raises ModelError or InputError in one sentence when something is missing, corrupt, too large or does not fit.
    """
    quiet_libraries()
    import diffusers

    folder = _local_folder(source, revision)
    entry = read_folder(folder)
    need = memory.weight_bytes(entry, dtype_name(dtype), to_decode=to_decode)
    on_card = device.type == "cuda" and offload_mode == "none"
    free = torch.cuda.mem_get_info(device)[0] if on_card else memory.available_bytes()
    if need > free and not (on_card and setup.quantize):
        raise ModelError(
            f"the weights of {source} need {need / 1e9:.1f} GB in {dtype} and "
            f"{device_name(device if on_card else torch.device('cpu'))} has "
            f"{free / 1e9:.1f} GB free: choose a smaller model, a narrower --dtype or another --device"
        )
    dtypes = {**dict.fromkeys(_IN_DTYPE, dtype), "default": torch.float32}
    as_image = PIPELINES.get(image_pipeline or "")
    if not entry.vae_float32 or (as_image is not None and as_image.vae_in_dtype):
        dtypes["vae"] = dtype
    quantized = tuple(name for name in ("transformer", "transformer_2") if (folder / name).is_dir())
    pipeline_class: Any = diffusers.DiffusionPipeline
    extra: dict[str, Any] = {}
    if to_decode:
        setup = Setup(offload=setup.offload, vae_tiling=setup.vae_tiling)
        parts = json.loads((folder / "model_index.json").read_text())
        # The base class does not know which parts may be None.
        pipeline_class = getattr(diffusers, parts["_class_name"])
        extra = dict.fromkeys(name for name in _ONLY_DENOISING if name in parts)
    elif (config := additions.quantization_config(setup, quantized)) is not None:
        extra["quantization_config"] = config
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = pipeline_class.from_pretrained(
                str(folder), dtype=dtypes, use_safetensors=True, trust_remote_code=False, local_files_only=True, **extra
            )
            if to_decode:
                pipeline.loaded_for_decoding = dtype
            if "quantization_config" not in extra:
                _check_complete(pipeline, folder)
            if image_pipeline is not None:
                pipeline = _as_image_pipeline(pipeline, image_pipeline)
            additions.prepare(pipeline, setup, dtype)
            if share_clip:
                distributed.split(pipeline, device)
            offload.place(pipeline, offload_mode, device)
            additions.finish(pipeline, setup)
    except VmonarchError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise ModelError(f"{source} does not fit the memory of {device_name(device)}: choose a smaller model") from None
    except Exception as error:
        # from_pretrained has no error family of its own: OSError, ValueError, KeyError, SafetensorError and more.
        raise ModelError(f"model {source} cannot be loaded: {_one_sentence(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    set_flow_shift(pipeline, flow_shift)
    return pipeline


def quiet_libraries() -> None:
    """Keep diffusers and transformers from printing; the environment must be set before their first import."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where torchao is installed, transformers imports it, and it warns of its CUDA files on a machine without CUDA.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def set_flow_shift(pipeline: Any, shift: float | None) -> None:
    """Give the scheduler a flow-matching timestep shift (None: its own); schedulers name the setting differently."""
    if shift is None:
        return
    scheduler = pipeline.scheduler
    name = next((name for name in ("flow_shift", "shift") if name in scheduler.config), None)
    if name is None:
        raise InputError(f"--flow-shift cannot be set: {type(scheduler).__name__} of this model has no shift")
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **{name: shift})


def _local_folder(source: str, revision: str | None) -> Path:
    """Where the model's files are, after a download for a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from diffusers import DiffusionPipeline

    hub.check_disk(source, revision)
    try:
        return Path(
            DiffusionPipeline.download(source, revision=revision, use_safetensors=True, trust_remote_code=False)
        )
    except Exception as error:
        # As above, and whatever the network stack raises.
        raise hub.explain(error, source, revision) from error


def _as_image_pipeline(pipeline: Any, name: str) -> Any:
    """The same components under the class that continues a first frame; what only that class has stays empty."""
    import diffusers

    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in pipeline.config.items() if key in known and key not in pipeline.components}
    return kind(**{key: part for key, part in pipeline.components.items() if key in known}, **settings)


def _check_complete(pipeline: Any, folder: Path) -> None:
    """ModelError when a parameter is not in the files: the libraries would start it at random and only warn."""
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


def _one_sentence(error: Exception) -> str:
    """The first line of a library's message: some go on for a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
