"""Triton launches on the current device; every way into the kernels makes the tensors' device the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vmonarch_kernels import Inputs, Options, Residual, attend, frame_attention, monarch_attention

launch = pytest.importorskip("vmonarch_kernels.launch")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Machine:
    """A stand-in for the current device, and what was launched while it was which."""

    def __init__(self) -> None:
        self.current: Tensor | None = None
        self.launches: list[tuple[str, Tensor | None]] = []

    @contextmanager
    def device_of(self, x: Tensor) -> Iterator[None]:
        before, self.current = self.current, x
        yield
        self.current = before


class Watched:
    """A kernel that notes the current device at each launch, and runs."""

    def __init__(self, machine: Machine, name: str, kernel: Any) -> None:
        self.machine, self.name, self.kernel = machine, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.machine.launches.append((self.name, self.machine.current))
        return self.kernel[grid]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    for name in dir(launch.kernels):
        if name.endswith("_kernel"):
            monkeypatch.setattr(launch.kernels, name, Watched(found, name, getattr(launch.kernels, name)))
    monkeypatch.setattr(torch.cuda, "device_of", found.device_of)
    return found


def inputs(frames: int) -> Inputs:
    q, k, v = (torch.randn(1, frames * 2, 1, 16, device=DEVICE) for _ in range(3))
    return Inputs(q, k, v, (frames, 1, 2))


def test_every_launch_is_on_the_tensors_device(machine: Machine) -> None:
    q = inputs(5).q
    text = replace(inputs(5), extra=(torch.randn_like(q), torch.zeros(1, 10, 1, device=DEVICE)))
    calls = [(inputs(5), Options()), (inputs(5), Options(band=0)), (text, Options(band=0)), (inputs(70), Options())]
    for call, options in calls:
        _, factor = attend(call, options, impl="triton", return_l=True)
        attend(replace(call, l_prev=factor), options, impl="triton")
    launched = {name for name, _ in machine.launches}
    assert launched == {name for name in dir(launch.kernels) if name.endswith("_kernel")} - {"merge_splits_kernel"}

    frame_attention(q, q, q, (5, 1, 2), 1, impl="triton")
    seen = len(machine.launches)
    residual = Residual(q, 5)
    residual.attention(inputs(5), Options(band=0), 2, impl="triton")
    assert "merge_splits_kernel" in {name for name, _ in machine.launches[seen:]}
    for name, current in machine.launches:
        assert current is not None, f"{name} was launched on whatever device was current"
    assert machine.current is None, "and afterwards the current device is as before"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("band", [None, 0])
def test_a_second_gpu_computes_what_the_first_does(band: int | None) -> None:
    q, k, v = (torch.randn(1, 8 * 300, 4, 64, dtype=torch.bfloat16) for _ in range(3))
    outs = []
    for device in ("cuda:0", "cuda:1"):
        call, options = Inputs(q.to(device), k.to(device), v.to(device), (8, 1, 300)), Options(band=band)
        residual = Residual(call.q, 8)
        first, factor = residual.attention(call, options, 2, impl="triton", return_l=True)
        second, _ = residual.attention(replace(call, l_prev=factor), replace(options, num_steps=1), 2, impl="triton")
        frame = frame_attention(call.q, call.k, call.v, call.grid, 3, impl="triton")
        outs.append([x.cpu() for x in (first, second, frame)])
    assert torch.cuda.current_device() == 0
    for on_first, on_second in zip(*outs, strict=True):
        assert torch.equal(on_first, on_second)


@pytest.mark.parametrize("name", ["k", "v", "l_prev", "extra", "residual"])
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_tensors_of_two_devices_are_refused(impl: str, name: str) -> None:
    q = torch.randn(1, 6, 1, 16, device=DEVICE)
    e4m3 = torch.float8_e4m3fn
    tensors: dict[str, Any] = {
        "k": q,
        "v": q,
        "l_prev": torch.zeros(1, 2, 1, 3, 3, device=DEVICE).to(e4m3),
        "extra": (q, q[..., 0]),
        "residual": (q.to(e4m3), torch.zeros(1, 2, 1, 3, device=DEVICE)),
    }
    value = tensors[name]
    tensors[name] = (value[0], value[1].to("meta")) if isinstance(value, tuple) else value.to("meta")
    k, v = tensors.pop("k"), tensors.pop("v")
    with pytest.raises(ValueError, match=f"q is on .* and {name} on meta; all tensors must be on one device"):
        monarch_attention(q, k, v, (3, 1, 2), impl=impl, **tensors)
