"""What is tried when decoding runs out of memory: each rung needs less and takes longer, and the last error stands."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch

_AROUND_THE_VAE = ("transformer", "transformer_2", "text_encoder", "image_encoder")
_Rung = tuple[str, str, Callable[[ExitStack], None]]
_Result = TypeVar("_Result")
Retries = tuple[dict[str, str], ...]
"""What was tried because memory had run out, as a record says it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch's CPU allocator raises a bare RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("not enough memory" in words or "out of memory" in words)


def decode_with_retries(
    decode: Callable[[Retries], _Result], pipeline: Any, device: torch.device, on_retry: Callable[[str], None]
) -> tuple[_Result, Retries]:
    """The result of `decode`, which gets the retries so far, and those that it took; afterwards the pipeline is as it
    was before.

    When memory runs out: with tiling; then with the rest of the model moved off the GPU; then on the CPU. Any other
    error, and the last rung's, is raised as it came.
    """
    retries: Retries = ()
    result = _attempt(partial(decode, retries))
    with ExitStack() as undo:
        for name, words, prepare in _rungs(pipeline, device):
            if not isinstance(result, _OutOfMemory):
                break
            on_retry(f"decoding ran out of memory: trying again {words}")
            retries = (*retries, {"stage": "decode", "reason": "out of memory", "with": name})
            _free_memory()
            prepare(undo)
            result = _attempt(partial(decode, retries))
    if isinstance(result, _OutOfMemory):
        raise result.error
    return result, retries


class _OutOfMemory:
    """An attempt that ran out of memory; the traceback is dropped, because it keeps the attempt's tensors alive."""

    def __init__(self, error: Exception) -> None:
        self.error = error.with_traceback(None)


def _attempt(decode: Callable[[], _Result]) -> _Result | _OutOfMemory:
    try:
        return decode()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _OutOfMemory(error)


def _rungs(pipeline: Any, device: torch.device) -> Iterator[_Rung]:
    vae = pipeline.vae
    if hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False):
        yield "tiling", "with tiling", lambda undo: _tile(vae, undo)
    if device.type == "cpu":
        return
    # A module that offloading already moves about (accelerate's hook) is left alone.
    around = [getattr(pipeline, name, None) for name in _AROUND_THE_VAE]
    resident = [module for module in around if module is not None and not hasattr(module, "_hf_hook")]
    if resident:
        yield (
            "offload",
            "with the rest of the model in the machine's own memory",
            lambda undo: _move(resident, device, undo),
        )
    if not hasattr(vae, "_hf_hook"):
        yield "cpu", "on the CPU", lambda undo: _move([vae], device, undo)


def _tile(vae: Any, undo: ExitStack) -> None:
    vae.enable_tiling()
    undo.callback(vae.disable_tiling)


def _move(modules: list[Any], device: torch.device, undo: ExitStack) -> None:
    for module in modules:
        undo.callback(module.to, device)
        module.to("cpu")
    _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
