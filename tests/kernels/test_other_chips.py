"""Chips that are not there: what would run on them, and that it compiles for them (offline.py does the compiling)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vmonarch_kernels import attention_lse, dense, dense_backends
from vmonarch_kernels.configs import chip, hopper_config

pytest.importorskip("triton")
OFFLINE = Path(__file__).with_name("offline.py")
KB = 1024


def compiled(**request: Any) -> list[dict[str, Any]]:
    """The kernels of a request, compiled in a process of their own: the suite's has Triton's interpreter on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(OFFLINE), json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make torch see one GPU of a compute capability, of AMD's with a version of HIP."""

    def see(capability: tuple[int, int], hip: str | None = None) -> torch.device:
        properties = SimpleNamespace(multi_processor_count=100, shared_memory_per_block_optin=64 * KB)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        return torch.device("cuda", 0)

    return see


# The "torch" implementation and the dense parts


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "kernel"),
    [
        ((7, 0), torch.float16, 64, "efficient"),
        ((7, 5), torch.float16, 128, "efficient"),
        ((7, 5), torch.bfloat16, 128, "eager"),
        ((7, 5), torch.float32, 128, "efficient"),
        ((8, 0), torch.float16, 128, "flash"),
        ((8, 0), torch.bfloat16, 256, "flash"),
        ((8, 0), torch.bfloat16, 264, "efficient"),
        ((9, 0), torch.float32, 128, "efficient"),
        ((9, 0), torch.bfloat16, 100, "eager"),
        ((9, 0), torch.float64, 128, "eager"),
    ],
    ids=str,
)
def test_a_card_is_asked_for_kernels_that_it_has(
    card: Any, capability: tuple[int, int], dtype: torch.dtype, head_dim: int, kernel: str
) -> None:
    assert dense.lse_kernel(card(capability), dtype, head_dim) == kernel


def test_cards_before_8_0_and_amd_s_have_dense_backends_of_their_own(card: Any) -> None:
    assert dense_backends(card((7, 5)), torch.float16) == ("efficient",)
    assert dense_backends(card((8, 6)), torch.float16) == ("flash", "cudnn", "efficient")
    assert dense_backends(card((9, 0)), torch.bfloat16) == ("cudnn", "flash", "efficient")
    assert dense_backends(card((9, 0), hip="6.4"), torch.bfloat16) == ("flash", "efficient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_without_a_kernel_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, length, 20, dtype=dtype) for length in (50, 70, 70))
    expected = attention_lse(q, k, v, scale=0.3)
    monkeypatch.setattr(dense, "lse_kernel", lambda *_: "eager")
    monkeypatch.setattr(dense, "_CHUNK_ELEMENTS", 2 * 3 * 70 * 7)
    for found, wanted in zip(attention_lse(q, k, v, scale=0.3), expected, strict=True):
        assert (found.double() - wanted.double()).norm() <= 4 * torch.finfo(dtype).eps * wanted.double().norm()


# AMD's GPUs


def test_amd_s_capabilities_are_not_nvidia_s(card: Any) -> None:
    """torch gives gfx90a the capability of an H100."""
    found = chip.__wrapped__(card((9, 0), hip="6.4"))
    assert hopper_config(128, torch.bfloat16, found.capability, with_k=True, with_v=False) is None
    assert found.shared_memory == 64 * KB
    assert dense.lse_kernel(card((9, 0), hip="6.4"), torch.bfloat16, 128) == "eager"


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100"])
def test_attention_compiles_for_amd(arch: str) -> None:
    found = compiled(arch=arch, dtype="bfloat16", dim=128, calls=["frame"])
    assert {entry["kernel"] for entry in found} == {"attend_kernel", "merge_splits_kernel"}
    assert all(entry["shared"] <= 64 * KB for entry in found)


FORWARD = {"attend_kernel", "merge_extra_kernel", "merge_splits_kernel", "l_output_kernel", "r_queries_kernel"}
BACKWARD = {
    "l_backward_kernel", "grad_queries_kernel", "grad_keys_kernel", "warm_backward_kernel", "row_delta_kernel",
    "extra_backward_kernel",
}  # fmt: skip
TILED = {"l_lse_kernel", "l_sums_kernel", "l_rows_kernel", "l_columns_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100"])
def test_everything_compiles_for_amd(arch: str, dtype: str) -> None:
    found = compiled(arch=arch, dtype=dtype, dim=128)
    assert {entry["kernel"] for entry in found} == FORWARD | BACKWARD
    assert all(entry["shared"] <= 64 * KB for entry in found)


# Chips that do not convert e4m3


@pytest.mark.parametrize("arch", [80, "gfx1100"])
def test_bytes_of_8_bit_states_are_converted_in_the_kernels(arch: int | str) -> None:
    kernels = {"l_output_kernel", "r_queries_kernel", "merge_splits_kernel"}
    found = compiled(arch=arch, dtype="bfloat16", dim=128, calls=["warm", "refresh", "turn"], kernels=sorted(kernels))
    assert {entry["kernel"] for entry in found} == kernels
    if arch == 80:
        assert [entry for entry in found if entry["stack"]] == [], "nothing is spilled"


# The backward pass on NVIDIA's GPUs


def test_the_l_steps_of_long_clips_compile_backwards() -> None:
    """In tiles, where the last iteration has other tensors than the earlier ones."""
    found = compiled(arch=90, dtype="bfloat16", dim=128, frames=65, calls=["backward"], kernels=sorted(TILED))
    assert {entry["kernel"] for entry in found} == TILED
    assert all(entry["shared"] <= 227 * KB for entry in found)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "dim", "frames"), [("bfloat16", 128, 65)], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_the_backward_pass_compiles_and_fits(arch: int, dtype: str, dim: int, frames: int) -> None:
    calls = ["backward", "backward warm", "backward band", "backward frame"]
    kernels = BACKWARD | TILED
    found = compiled(arch=arch, dtype=dtype, dim=dim, frames=frames, calls=calls, kernels=sorted(kernels))
    tiled = frames > 64
    absent = {"l_backward_kernel"} if tiled else TILED
    assert {entry["kernel"] for entry in found} == kernels - absent
    limit = {80: 163, 90: 227, 100: 227}.get(arch, 99) * KB
    assert all(entry["shared"] <= limit for entry in found), [e for e in found if e["shared"] > limit]


# The fused operations of a block

FUSED = {"qk_norm_rope_kernel", "residual_norm_kernel", "gelu_tanh_kernel", "gated_activation_kernel"}


def check_fused(arch: int | str, width: int, dtype: str = "bfloat16", **request: Any) -> None:
    """All forms compile, nothing is spilled, and 512 threads have the registers that they need."""
    found = compiled(arch=arch, dtype=dtype, width=width, **request)
    assert {entry["kernel"] for entry in found} == FUSED
    if isinstance(arch, int):
        assert [entry for entry in found if entry["stack"]] == []
        assert max(entry["registers"] for entry in found) <= 128


def test_the_fused_operations_compile_without_spills() -> None:
    check_fused(90, 1536, calls=["heads, all", "gate and modulation", "gelu", "swiglu"])


@pytest.mark.parametrize(
    ("arch", "width", "calls"),
    [
        (90, 1536, ("rows in e4m3", "gate and modulation in e4m3")),
        (90, 8960, ("rows in e4m3", "gelu in e4m3")),
        (89, 13824, ("rows in e4m3", "gelu in e4m3")),
        (120, 5120, ("gate and modulation in e4m3",)),
    ],
)
def test_rows_in_e4m3_compile_without_spills(arch: int, width: int, calls: tuple[str, ...]) -> None:
    found = compiled(arch=arch, dtype="bfloat16", width=width, calls=list(calls))
    assert len(found) == len(calls)
    assert {entry["stack"] for entry in found} == {0}
    assert max(entry["registers"] for entry in found) <= 128


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("width", [1536, 3072, 5120])
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_the_fused_operations_compile_for_every_chip(arch: int, width: int, dtype: str) -> None:
    check_fused(arch, width, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100"])
def test_the_fused_operations_compile_for_amd(arch: str) -> None:
    check_fused(arch, 1536)
