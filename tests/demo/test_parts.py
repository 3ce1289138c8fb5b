"""Blocks in two compiled parts: the same values and gradients, and one compilation for all that a training runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from vmonarch_cli.demo.model import DIT_PRESETS, build_transformer
from vmonarch_cli.demo.training import structured
from vmonarch_cli.demo.training.buckets import parse_buckets
from vmonarch_cli.demo.training.parts import compile_parts
from vmonarch_cli.demo.training.structured import HalfStructured, halve_attention, rehearse

SHAPES = [(8, 5, 8), (16, 3, 8), (4, 9, 8), (4, 5, 12), (12, 3, 12), (4, 13, 8)]
"""Clips, latent frames, and latent rows and columns."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def transformer() -> Any:
    torch.manual_seed(0)
    torch.compiler.reset()
    made = build_transformer(DIT_PRESETS["tiny"][0]).train()
    with torch.no_grad():
        for name, value in made.named_parameters():  # as trained: norms that differ from one another
            if "norm" in name:
                value.add_(0.1 * torch.randn_like(value))
    return made


def step(transformer: Any, half: HalfStructured | None, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(velocities, all gradients) of a step in bfloat16."""
    clips, frames, size = shape
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(clips, 16, frames, size, size, generator=generator)
    times, text = torch.rand(clips, generator=generator) * 1000, torch.randn(clips, 12, 32, generator=generator)
    if half is not None:
        half.frames = frames
    transformer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = transformer(noisy, times, text, return_dict=False)[0].float()
    velocity.square().mean().backward()
    return velocity.detach(), torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])


@pytest.mark.parametrize("halves", [False, True], ids=["dense", "structured"])
def test_parts_are_the_block_to_the_bit(transformer: Any, halves: bool) -> None:
    half = halve_attention(transformer, frames=1) if halves else None
    expected = step(transformer, half, SHAPES[0])
    compile_parts(transformer, dynamic=True, backend="eager")
    with torch.compiler.set_stance("force_eager"):
        found = step(transformer, half, SHAPES[0])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_one_compilation_serves_all_clips_and_both_kinds_of_attention(
    transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.fx.experimental._config, "use_duck_shape", False)
    compile_parts(transformer, dynamic=True, backend="aot_eager")
    step(transformer, None, SHAPES[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in SHAPES:
            step(transformer, None, shape)
        half = halve_attention(transformer, frames=1)
        for shape in SHAPES:
            found = step(transformer, half, shape)
    with torch.compiler.set_stance("force_eager"):
        expected = step(transformer, half, SHAPES[-1])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_rehearsal_makes_the_structured_calls_of_a_training(
    transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    attend = structured.attend

    def noted(inputs: Any, options: Any, **more: Any) -> Any:
        tensors = [(tuple(x.shape), x.stride(), x.dtype) for _, x in inputs.tensors()]
        calls.append((tensors, inputs.grid, options, more, torch.is_grad_enabled(), inputs.q.requires_grad))
        return attend(inputs, options, **more)

    monkeypatch.setattr(structured, "attend", noted)
    half = halve_attention(transformer, frames=1)
    with torch.autocast("cpu", enabled=False):
        for clips, frames, size in SHAPES:
            half.frames = frames
            noisy, text = torch.randn(clips, 16, frames, size, size), torch.randn(clips, 12, 32)
            transformer(noisy, torch.rand(clips), text, return_dict=False)
    trained = [call for number, call in enumerate(calls) if number // 3 % 2 == 0]  # of the first of two blocks
    calls.clear()
    rehearse([(clips, frames, frames * (size // 2) ** 2) for clips, frames, size in SHAPES], 2, 24, torch.device("cpu"))
    assert calls == trained


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton compiles nothing for a CPU")
def test_after_a_rehearsal_nothing_is_left_to_compile() -> None:
    from vmonarch_kernels.ahead import pending

    buckets = parse_buckets("17x32,49x32,33x48")
    shapes = [(bucket.equal_count(8, buckets[0]) * 4, bucket.grid[0], bucket.tokens) for bucket in buckets]
    ahead = structured.kernels_ahead(shapes, 4, 64, DEVICE)
    assert ahead is not None
    ahead.wait()
    assert ahead.failure is None
    assert ahead.compiled > 0
    half = HalfStructured(frames=1)

    def train() -> None:
        for clips, half.frames, tokens in shapes:
            q, k, v = (
                torch.randn(clips, tokens, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
                for _ in range(3)
            )
            out = half.attend(q, k, v)
            out.backward(torch.randn_like(out))

    with torch.autograd.set_multithreading_enabled(False):
        assert pending(train) == []


CARD = """
import torch
from functools import partial
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

driver.set_active(Driver())
from vmonarch_cli.demo.training import structured
from vmonarch_kernels import api, launch
from vmonarch_kernels.ahead import pending
from vmonarch_kernels.configs import Chip
launch.chip = lambda device: Chip((9, 0), 132, 227 * 1024, torch.uint8)
api.hardware_obstacle = lambda device: None
structured.HalfStructured = partial(structured.HalfStructured, impl="triton")
found = pending(lambda: structured.rehearse([(16, 13, 1872)], 4, 64, torch.device("cpu")))
print(*sorted({kernel.kernel.__name__ for kernel in found}))
"""


@pytest.mark.slow
def test_a_rehearsal_finds_the_kernels_of_both_passes() -> None:
    """Of a card that is not here, on which nothing is launched."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", CARD], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert {"r_queries_kernel", "attend_kernel", "l_output_kernel"} <= set(names)
    assert {"l_backward_kernel", "warm_backward_kernel", "grad_queries_kernel", "grad_keys_kernel"} <= set(names)
