"""Load a diffusers pipeline: quietly, completely or not at all, on the device and in the dtype asked for."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.errors import InputError, ModelError, VmonarchError
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.machine.memory import available_bytes
from vmonarch_cli.models import hub
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.folder import read_folder, read_index
from vmonarch_cli.pipeline.apply_setup import finish, prepare, quantization_config
from vmonarch_cli.pipeline.complete import check_complete, load_encoders
from vmonarch_cli.pipeline.context_parallel import split
from vmonarch_cli.pipeline.device import DTYPES, device_name, dtype_name
from vmonarch_cli.pipeline.imports import import_parts, quiet_imports, why_import_failed
from vmonarch_cli.pipeline.lora import read_loras
from vmonarch_cli.pipeline.modular import hide_progress, is_modular, read_modular
from vmonarch_cli.pipeline.offload import place
from vmonarch_cli.pipeline.quantize import check_quantize
from vmonarch_cli.pipeline.single_file import load_transformer
from vmonarch_cli.plan.memory import weight_bytes
from vmonarch_cli.plan.setup import Setup, check_tuned_weights
from vmonarch_cli.plan.tuned import check_file
from vmonarch_cli.text import innermost_line

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
    given_pipeline: str | None = None,
    share_clip: bool = False,
) -> Any:
    """A diffusers pipeline from a local folder or a hub id, ready to run.

    Transformers and text encoders are in ``dtype``, the VAE in float32 where its family needs it. ``setup.offload`` is
    a mode that was decided, not "auto"; ``given_pipeline`` names the class to use the weights with when there is a
    first frame or a video; with ``share_clip`` the processes of a torchrun split every clip. Only safetensors are read
    and no code from the model runs.
    Raises ModelError or InputError in one sentence when something is missing, corrupt, too large or does not fit.
    """
    check_tuned_weights(setup)
    check_quantize(setup.quantize, device, dtype)
    quiet_libraries()
    folder = _local_folder(source, revision)
    entry = read_folder(folder)
    _check_packages(entry)
    for adapter in setup.tuned:
        check_file(adapter, folder)
    on_card = device.type == "cuda" and setup.offload == "none"
    if not (on_card and setup.quantize):
        _check_memory(source, weight_bytes(entry, dtype_name(dtype)), dtype, device if on_card else torch.device("cpu"))
    single_files = setup.single_files
    quantized = tuple(name for name in ("transformer", "transformer_2") if (folder / name).is_dir())
    config = quantization_config(setup, quantized)
    with _one_sentence(source, device):
        loras = read_loras(setup.loras, entry.transformers)
        dtypes = _dtypes(entry, dtype, given_pipeline, setup.vae_dtype)
        given = load_encoders(folder, dtypes)
        for name, file in single_files.items():
            given[name] = load_transformer(Path(file), folder, name, dtype)
        pipeline = _pipeline(folder, entry, dtypes, given, config)
        check_complete(pipeline, folder, without=(*given, *(quantized if config is not None else ())))
        if given_pipeline not in (None, entry.pipeline):
            pipeline = _under_class(pipeline, given_pipeline)
        prepare(pipeline, setup, dtype, device, loras)
        if share_clip:
            split(pipeline, device)
        place(pipeline, setup.offload, device)
        finish(pipeline, setup)
    _hide_progress(pipeline)
    set_flow_shift(pipeline, flow_shift)
    return pipeline


def load_decoder(
    source: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    setup: Setup = Setup(),  # noqa: B008 - frozen
    given_pipeline: str | None = None,
) -> Any:
    """The same without transformers and text encoders, to decode saved latents; all of it is on the device. Of the
    setup only what concerns the VAE counts.
    """
    quiet_libraries()
    folder = _local_folder(source, revision)
    entry = read_folder(folder)
    _check_packages(entry)
    _check_memory(source, weight_bytes(entry, dtype_name(dtype), to_decode=True), dtype, device)
    without = dict.fromkeys(name for name in _ONLY_DENOISING if name in read_index(folder))
    with _one_sentence(source, device):
        pipeline = _pipeline(folder, entry, _dtypes(entry, dtype, given_pipeline, setup.vae_dtype), without)
        pipeline.loaded_for_decoding = dtype
        check_complete(pipeline, folder)
        if given_pipeline not in (None, entry.pipeline):
            pipeline = _under_class(pipeline, given_pipeline)
        prepare(pipeline, Setup(vae_tiling=setup.vae_tiling), dtype, device)
        place(pipeline, "none", device)
    _hide_progress(pipeline)
    return pipeline


def _check_packages(entry: ModelEntry) -> None:
    """ModelError when a package is not installed that the model's pipelines need."""
    missing = FAMILIES[PIPELINES[entry.pipeline].transformer].missing()
    if missing is not None:
        name = missing.split(",")[0]
        raise ModelError(f"{entry.alias} needs {missing}, and the package is not here: pip install {name}")


def _check_memory(source: str, need: int, dtype: torch.dtype, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if need > free:
        raise ModelError(
            f"the weights of {source} need {need / 1e9:.1f} GB in {dtype} and {device_name(device)} has "
            f"{free / 1e9:.1f} GB free: choose a smaller model, a narrower --dtype or another --device"
        )


def _dtypes(
    entry: ModelEntry, dtype: torch.dtype, given_pipeline: str | None, vae_dtype: str
) -> dict[str, torch.dtype]:
    """The dtype of each component, as from_pretrained takes them; `vae_dtype`: a name, or "auto"."""
    dtypes = {**dict.fromkeys(_IN_DTYPE, dtype), "default": torch.float32}
    as_image = PIPELINES.get(given_pipeline or "")
    if not entry.vae_float32 or (as_image is not None and as_image.vae_in_dtype):
        dtypes["vae"] = dtype
    if vae_dtype != "auto":
        dtypes["vae"] = DTYPES[vae_dtype]
    return dtypes


def _pipeline(
    folder: Path, entry: ModelEntry, dtypes: dict[str, torch.dtype], given: dict[str, Any], quantization: Any = None
) -> Any:
    """The pipeline of a folder: ordinary or modular. given: components in the place of the folder's, None for none."""
    import diffusers

    facts = PIPELINES[entry.pipeline]
    safely = {"use_safetensors": True, "local_files_only": True}
    if not facts.modular:
        extra = {} if quantization is None else {"quantization_config": quantization}
        # The base class does not know which parts may be given or None, and would load its own.
        kind = getattr(diffusers, facts.name)
        return kind.from_pretrained(str(folder), dtype=dtypes, trust_remote_code=False, **safely, **given, **extra)

    def options(name: str) -> dict[str, Any]:
        config = None if quantization is None else quantization.quant_mapping.get(name)
        extra = {} if config is None else {"quantization_config": config}
        return {"dtype": dtypes.get(name, dtypes["default"]), **safely, **extra}

    return read_modular(facts, folder, given, options)


def _hide_progress(pipeline: Any) -> None:
    hide_progress(pipeline) if is_modular(pipeline) else pipeline.set_progress_bar_config(disable=True)


@contextmanager
def _one_sentence(source: str, device: torch.device) -> Iterator[None]:
    """Silence the libraries' warnings, and turn whatever they raise into a ModelError of one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except VmonarchError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise ModelError(f"{source} does not fit the memory of {device_name(device)}: choose a smaller model") from None
    except Exception as error:
        # from_pretrained has no error family of its own: OSError, ValueError, KeyError, SafetensorError and more.
        reason = innermost_line(error).rstrip(".")[:300]
        raise ModelError(f"model {source} cannot be loaded: {reason}") from error


def quiet_libraries() -> None:
    """Import diffusers and transformers and keep them from printing, also later; ModelError where they do not work."""
    quiet_imports()
    try:
        import diffusers
        import transformers

        import_parts("diffusers")
    except Exception as error:  # versions that do not fit raise RuntimeError, ImportError, AttributeError, ...
        raise ModelError(f"the installed packages do not work together: {why_import_failed(error)}") from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def set_flow_shift(pipeline: Any, shift: float | None) -> None:
    """Give the scheduler a flow-matching timestep shift (None: its own); schedulers name the setting differently.

    A scheduler that shifts by the number of tokens does so no longer. InputError for one that has no shift.
    """
    if shift is None:
        return
    scheduler = pipeline.scheduler
    name = next((name for name in ("flow_shift", "shift") if name in scheduler.config), None)
    if name is None:
        raise InputError(f"--flow-shift cannot be set: {type(scheduler).__name__} of this model has no shift")
    given: dict[str, Any] = {name: shift}
    if scheduler.config.get("use_dynamic_shifting"):
        given["use_dynamic_shifting"] = False
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **given)


def _local_folder(source: str, revision: str | None) -> Path:
    """Where the model's files are, after a download for a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if cached := hub.cached_folder(source, revision):
        return cached
    from diffusers import DiffusionPipeline

    try:
        if modular := hub.download_modular(source, revision):
            return modular
        return Path(
            DiffusionPipeline.download(source, revision=revision, use_safetensors=True, trust_remote_code=False)
        )
    except ModelError:
        raise
    except Exception as error:
        # As above, and whatever the network stack raises.
        raise hub.explain(error, source, revision) from error


def _under_class(pipeline: Any, name: str) -> Any:
    """The same components under the class that takes a first frame or a video; what only that class has stays empty."""
    import diffusers

    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in pipeline.config.items() if key in known and key not in pipeline.components}
    return kind(**{key: part for key, part in pipeline.components.items() if key in known}, **settings)
