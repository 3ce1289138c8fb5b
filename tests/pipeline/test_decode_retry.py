"""What decoding tries when memory runs out, on a model that only notes what is done to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vmonarch_cli.pipeline.decode_retry import Retries, decode_with_retries, is_out_of_memory

GPU = torch.device("cuda", 0)


class Part:
    """A module that notes where it is moved."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.use_tiling = name, log, False

    def to(self, device: object) -> None:
        self.log.append(f"{self.name} to {device}")

    def enable_tiling(self) -> None:
        self.use_tiling = True
        self.log.append("tiling on")

    def disable_tiling(self) -> None:
        self.use_tiling = False
        self.log.append("tiling off")


def climb(
    failures: int, device: torch.device = GPU, error: Exception | None = None, **parts: Any
) -> tuple[Any, list[str]]:
    log: list[str] = []
    pipeline = SimpleNamespace(
        **{name: Part(name, log) for name in ("vae", "transformer", "text_encoder")}, transformer_2=None
    )
    for name, value in parts.items():
        getattr(pipeline, name)._hf_hook = value
    left = [failures]

    def decode(retries: Retries) -> str:
        log.append("decode")
        left[0] -= 1
        if left[0] >= 0:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return "frames"

    return decode_with_retries(decode, pipeline, device, lambda sentence: None), log


def test_each_rung_needs_less_and_all_is_undone() -> None:
    away = ["transformer to cpu", "text_encoder to cpu"]
    back = ["text_encoder to cuda:0", "transformer to cuda:0", "tiling off"]
    assert climb(0) == (("frames", ()), ["decode"])
    (_, retries), log = climb(1)
    assert ([retry["with"] for retry in retries], log) == (["tiling"], ["decode", "tiling on", "decode", "tiling off"])
    (_, retries), log = climb(2)
    assert [retry["with"] for retry in retries] == ["tiling", "offload"]
    assert log == ["decode", "tiling on", "decode", *away, "decode", *back]
    (_, retries), log = climb(3)
    assert [retry["with"] for retry in retries] == ["tiling", "offload", "cpu"]
    assert log[-6:] == ["vae to cpu", "decode", "vae to cuda:0", *back]


def test_the_last_error_stands_and_other_errors_do_not_climb() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        climb(4)
    with pytest.raises(torch.OutOfMemoryError):
        climb(2, torch.device("cpu"))
    with pytest.raises(ValueError, match="no"):
        climb(1, error=ValueError("no"))


def test_what_offloading_moves_itself_is_left_alone() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        climb(2, vae=1, transformer=1, text_encoder=1)
    (_, retries), log = climb(2, transformer=1)
    assert "transformer to cpu" not in log
    assert retries[-1] == {"stage": "decode", "reason": "out of memory", "with": "offload"}


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"))
    assert not is_out_of_memory(ValueError("not enough memory"))
