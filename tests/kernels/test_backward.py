"""Gradients of every implementation: by finite differences, against autograd through the reference, and as a part of
what torch builds on them (checkpoints, torch.compile, several processes).

On a GPU the Triton kernels run as compiled code and the shapes grow; without one the same kernels run under Triton's
interpreter on small shapes.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vmonarch_kernels import Inputs, Options, Residual, attend, frame_attention, monarch_attention, monarch_factors
from vmonarch_kernels.structure import L_DTYPE, L_SCALE

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter multiplies bfloat16 wrongly; there float16 stands for the low precisions.
LOW = torch.bfloat16 if CUDA else torch.float16
NAMES = ("q", "k", "v", "extra_out", "extra_lse")


def make(
    grid: tuple[int, int, int],
    dim: int = 3,
    heads: int = 2,
    *,
    dtype: torch.dtype = torch.float64,
    extra: bool = False,
    warm: bool = False,
    residual: bool = False,
    batch: int = 1,
    seed: int = 0,
) -> Inputs:
    """A call whose tensors want gradients."""
    generator = torch.Generator().manual_seed(seed)
    frames, positions = grid[0], grid[1] * grid[2]
    size = (batch, frames * positions, heads, dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()

    q, k, v = (draw(*size) for _ in range(3))
    part = (draw(*size), draw(*size[:3])) if extra else None
    l_prev = kept = None
    if warm:
        rows = torch.rand(batch, positions, heads, frames, frames, generator=generator)
        l_prev = (L_SCALE * (2 * rows / frames).clamp(max=1)).to(DEVICE, L_DTYPE)  # above 448 there is no number
    if residual:
        scale = torch.rand(batch, positions, heads, frames, generator=generator)
        scale[..., 0] = 0  # the first frame may be exact
        kept = torch.randn(size, generator=generator).to(DEVICE, L_DTYPE), scale.to(DEVICE)
    return Inputs(q, k, v, grid, l_prev, part, kept)


def wanted(inputs: Inputs) -> list[Tensor]:
    return [inputs.q, inputs.k, inputs.v, *(inputs.extra or ())]


def with_tensors(inputs: Inputs, tensors: list[Tensor]) -> Inputs:
    q, k, v, *extra = tensors
    return replace(inputs, q=q, k=k, v=v, extra=(extra[0], extra[1]) if extra else None)


def gradients(
    inputs: Inputs, options: Options, impl: str, dtype: torch.dtype | None = None, compute: torch.dtype | None = None
) -> list[Tensor]:
    """Of all that has one, of a fixed random sum of the output; in ``compute`` the reference is eager autograd."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in wanted(inputs)]
    call = with_tensors(inputs, tensors)
    if compute is not None:
        out = monarch_factors(call, options, compute_dtype=compute).out
    else:
        out, _ = attend(call, options, impl=impl)
    generator = torch.Generator().manual_seed(9)
    weights = torch.randn(out.shape, generator=generator).to(DEVICE, inputs.q.dtype).to(out.dtype)
    return list(torch.autograd.grad(out, tensors, weights))


def errors(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    pairs = zip(NAMES, found, expected, strict=False)
    return {name: float((a.double() - b).norm() / b.double().norm().clamp_min(1e-300)) for name, a, b in pairs}


# float64: finite differences, and every combination of options

CHECKED: list[tuple[Options, dict[str, bool]]] = [
    (Options(), {}),
    (Options(1, first_frame=False), {"extra": True}),
    (Options(3, band=0, scale=0.9), {"warm": True}),
    (Options(2, band=0, first_frame=False, c_floor=0.9), {"extra": True, "residual": True}),
    (Options(2, band=1), {"extra": True, "warm": True}),
    (Options(1, band=3), {"extra": True}),
]


@pytest.mark.parametrize(("options", "parts"), CHECKED, ids=str)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(impl: str, options: Options, parts: dict[str, bool]) -> None:
    inputs = make((4, 1, 2), dim=2, heads=1, **parts)  # type: ignore[arg-type]

    def run(*tensors: Tensor) -> Tensor:
        return attend(with_tensors(inputs, list(tensors)), options, impl=impl)[0]

    assert torch.autograd.gradcheck(run, wanted(inputs), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("first_frame", [True, False])
@pytest.mark.parametrize("band", [None, 0, 1, 9])
@pytest.mark.parametrize("grid", [(1, 2, 3), (2, 1, 3), (5, 3, 1)], ids=str)
def test_torch_has_the_reference_s_gradients(grid: tuple[int, int, int], band: int | None, first_frame: bool) -> None:
    """Every option with every other."""
    exact = grid[0] == 1 or (band is not None and 2 * band + 1 >= grid[0])
    for steps, extra, warm, residual in itertools.product((1, 2, 3), (False, True), (False, True), (False, True)):
        inputs = make(grid, extra=extra, warm=warm, residual=residual and not exact, batch=2)
        options = Options(steps, c_floor=0.4, first_frame=first_frame, band=band, scale=0.7)
        found, expected = (gradients(inputs, options, impl) for impl in ("torch", "reference"))
        assert max(errors(found, expected).values()) < 1e-12, (options, extra, warm, residual)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("frames", "band"), [(1, None), (4, 3), (4, 2)])
def test_where_all_is_exact_it_is_dense_attention_s_gradient(impl: str, frames: int, band: int | None) -> None:
    inputs = make((frames, 1, 5), dim=16, dtype=torch.float32)
    found = gradients(inputs, Options(band=band), impl)

    tensors = [x.detach().double().requires_grad_() for x in wanted(inputs)]
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    expected = list(torch.autograd.grad(out, tensors, weights.double()))
    assert max(errors(found, expected).values()) < 2e-6


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_an_extra_part_without_keys_gets_no_gradient(impl: str) -> None:
    inputs = make((4, 1, 3))
    nothing = torch.zeros_like(inputs.q).requires_grad_(), torch.full(inputs.q.shape[:3], float("-inf")).double()
    empty = nothing[0].detach().requires_grad_(), nothing[1].to(DEVICE).requires_grad_()
    for band in (None, 0):
        found = gradients(replace(inputs, extra=empty), Options(band=band), impl)
        expected = gradients(inputs, Options(band=band), impl)
        assert max(errors(found[:3], expected).values()) < 1e-12
        assert all(bool((x == 0).all()) for x in found[3:])


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_l_has_no_gradient_and_its_neighbour_keeps_it(impl: str) -> None:
    inputs = make((3, 1, 4), dim=16, dtype=torch.float32)
    out, l_new = attend(inputs, Options(), impl=impl, return_l=True)
    assert l_new is not None
    assert not l_new.requires_grad
    plain = gradients(inputs, Options(), impl)
    generator = torch.Generator().manual_seed(9)
    weights = torch.randn(out.shape, generator=generator).to(out)
    found = list(torch.autograd.grad(out, wanted(inputs), weights))
    assert max(errors(found, plain).values()) < 1e-6


class Called(TorchDispatchMode):
    """Names of the operators that run outside of other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("frame", [None, 1])
def test_nothing_is_made_for_gradients_that_are_not_wanted(impl: str, frame: int | None) -> None:
    """Autograd would give the backward pass zeros as large as L and the statistics, in every layer."""
    inputs = make((3, 1, 4), dim=16, dtype=torch.float32)
    if frame is None:
        out, _ = attend(inputs, Options(band=0), impl=impl, return_l=True)
    else:
        out = frame_attention(inputs.q, inputs.k, inputs.v, inputs.grid, frame, impl=impl)
    with Called() as called:
        torch.autograd.grad(out, wanted(inputs), torch.ones_like(out))
    assert any("attention_backward" in name for name in called.names)
    assert not [name for name in called.names if "zeros" in name]


# Recomputed frames


@pytest.mark.parametrize("extra", [False, True])
def test_a_frame_s_gradients_are_those_of_finite_differences(extra: bool) -> None:
    inputs = make((3, 1, 2), dim=2, heads=1, extra=extra)

    def run(*tensors: Tensor) -> Tensor:
        call = with_tensors(inputs, list(tensors))
        return frame_attention(call.q, call.k, call.v, call.grid, 1, extra=call.extra, impl="torch", scale=0.6)

    assert torch.autograd.gradcheck(run, wanted(inputs), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("frame", [0, 2])
def test_triton_has_a_frame_s_gradients(frame: int, extra: bool) -> None:
    inputs = make((3, 1, 7), dim=16, dtype=torch.float32, extra=extra)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        tensors = [x.detach().to(dtype).requires_grad_() for x in wanted(inputs)]
        call = with_tensors(inputs, tensors)
        out = frame_attention(call.q, call.k, call.v, call.grid, frame, extra=call.extra, impl=impl)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        return list(torch.autograd.grad(out, tensors, weights.float().to(dtype)))

    assert max(errors(run("triton", torch.float32), run("torch", torch.float64)).values()) < 2e-6


@pytest.mark.parametrize("frame", [0, 1, 2])
def test_whole_tiles_of_a_frame_s_gradient_are_finite_in_every_sample(
    monkeypatch: pytest.MonkeyPatch, frame: int
) -> None:
    from vmonarch_kernels import launch_backward
    from vmonarch_kernels.configs_backward import HOPPER_QUERY_ROWS

    # A tile of queries ends in the frames behind, and that of the last frames in the next sample.
    inputs = make((3, 1, 7), dim=16, dtype=torch.float32, batch=3)
    tiles = []
    grad_keys = launch_backward._Backward.grad_keys

    def looked_at(run: Any, rows: Any, window: Any) -> None:
        for first in range(frame * 7, 3 * 21, 21):
            tiles.append(rows.gv.flatten(0, 2)[first : first + HOPPER_QUERY_ROWS])
        grad_keys(run, rows, window)

    monkeypatch.setattr(launch_backward._Backward, "grad_keys", looked_at)
    empty = torch.empty

    def unset(*size: Any, **how: Any) -> Tensor:
        made = empty(*size, **how)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    out = frame_attention(inputs.q, inputs.k, inputs.v, inputs.grid, frame, impl="triton")
    monkeypatch.setattr(launch_backward.torch, "empty", unset)
    torch.autograd.grad(out.sum(), wanted(inputs))
    assert len(tiles) == 3
    for tile in tiles:
        assert bool(tile.isfinite().all())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_refreshed_frames_have_the_gradients_of_what_they_show(impl: str) -> None:
    """Two calls that share a residual, each with turns: gradients against those of the output written out by hand."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    first, second = (make((5, 1, 4), dim=16, dtype=dtype, seed=seed) for seed in (0, 1))
    options = Options(1, first_frame=False, band=0)
    residual = Residual(first.q, 5, first_frame=False)
    outs = [residual.attention(inputs, options, 2, impl=impl)[0] for inputs in (first, second)]
    found = list(torch.autograd.grad((outs[0] * 3 + outs[1].square()).sum(), [*wanted(first), *wanted(second)]))

    other = Residual(first.q, 5, first_frame=False)
    expected_outs = []
    with torch.no_grad():
        scales = []
        for inputs in (first, second):
            before = other.values.clone(), other.scale * 0.95
            plain = other.attention(inputs, options, 2, impl=impl)[0]
            scales.append((before, plain))
    for inputs, (before, plain) in zip((first, second), scales, strict=True):
        exact = [frame_attention(inputs.q, inputs.k, inputs.v, inputs.grid, frame, impl="torch") for frame in range(5)]
        structured = attend(inputs, options, impl="torch")[0].unflatten(1, (5, 4))
        shown = plain.unflatten(1, (5, 4))
        turned = [bool((exact[frame] - shown[:, frame]).abs().max() < 1e-5) for frame in range(5)]
        assert sum(turned) == 2
        kept = before[0].double().unflatten(1, (5, 4)) * before[1].permute(0, 3, 1, 2)[..., None].double()
        rows = [exact[f] if turned[f] else structured[:, f] + kept[:, f].to(dtype) for f in range(5)]
        expected_outs.append(torch.stack(rows, 1).flatten(1, 2))
    loss = (expected_outs[0] * 3 + expected_outs[1].square()).sum()
    expected = list(torch.autograd.grad(loss, [*wanted(first), *wanted(second)]))
    # A residual has 8 bits, and where two roundings of them part, one entry moves.
    limit = 2e-3 if impl == "triton" else 1e-7
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)) < limit


# Triton

SMALL: list[tuple[tuple[int, int, int], int]] = [((2, 3, 5), 16), ((7, 1, 5), 24)]
SLOW = [
    pytest.param(grid, dim, marks=() if CUDA else pytest.mark.slow)  # for the interpreter
    for grid, dim in (((5, 1, 40), 64), ((70, 1, 2), 16))
]
LARGE = [
    ((frames, 1, positions), dim)
    for frames, positions, dim in [
        (1, 257, 128), (2, 257, 64), (2, 257, 128), (21, 251, 64), (21, 251, 128), (65, 31, 64), (65, 31, 128),
        (129, 17, 64), (129, 17, 128), (47, 61, 128), (13, 101, 256), (7, 101, 96),
    ]
]  # fmt: skip
VARIANTS: list[tuple[Options, dict[str, bool]]] = [
    (Options(), {}),
    (Options(1, first_frame=False), {"warm": True}),
    (Options(3, c_floor=0.5), {"extra": True}),
    (Options(2, band=0), {"extra": True, "warm": True, "residual": True}),
    (Options(1, band=1, first_frame=False), {"residual": True}),
    (Options(2, band=1), {}),
]


@pytest.mark.parametrize(("options", "parts"), VARIANTS, ids=str)
@pytest.mark.parametrize(("grid", "dim"), [*SMALL, *SLOW, *(LARGE if CUDA else [])], ids=str)
def test_triton_matches_float64_in_float32(
    grid: tuple[int, int, int], dim: int, options: Options, parts: dict[str, bool]
) -> None:
    inputs = make(grid, dim, dtype=torch.float32, **parts)  # type: ignore[arg-type]
    expected = gradients(inputs, options, "torch", torch.float64)
    found = errors(gradients(inputs, options, "triton"), expected)
    eager = errors(gradients(inputs, options, "reference", compute=torch.float32), expected)
    for name, error in found.items():
        assert error <= 3 * max(eager[name], 1e-6), (name, found, eager)


@pytest.mark.parametrize(("options", "parts"), VARIANTS, ids=str)
@pytest.mark.parametrize(("grid", "dim"), LARGE if CUDA else [*SMALL, *SLOW[:1]], ids=str)
def test_triton_stays_within_the_error_of_eager_autograd(
    grid: tuple[int, int, int], dim: int, options: Options, parts: dict[str, bool]
) -> None:
    inputs = make(grid, dim, dtype=LOW, **parts)  # type: ignore[arg-type]
    expected = gradients(inputs, options, "torch", torch.float64)
    found = errors(gradients(inputs, options, "triton"), expected)
    eager = errors(gradients(inputs, options, "reference", compute=LOW), expected)
    for name, error in found.items():
        assert error <= 1.5 * max(eager[name], torch.finfo(LOW).eps / 4), (name, found, eager)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strided_tensors_and_gradients_are_taken_as_they_come(impl: str) -> None:
    batch, tokens, heads, dim, grid = 2, 12, 2, 16, (3, 2, 2)
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(DEVICE)
    heads_first = torch.randn(batch, heads, tokens, dim, generator=generator).to(DEVICE).transpose(1, 2)
    column_major = torch.randn(batch, tokens, dim, heads, generator=generator).to(DEVICE).transpose(2, 3)
    for band in (None, 0):
        results = []
        for tensors in ([fused[:, :, 0], heads_first, column_major], None):
            leaves = [
                x.detach().requires_grad_() if tensors is not None else x.detach().contiguous().requires_grad_()
                for x in (fused[:, :, 0], heads_first, column_major)
            ]
            out = monarch_attention(*leaves, grid, impl=impl, band=band)
            results.append(torch.autograd.grad(out.sum(), leaves))  # an expanded gradient
        for a, b in zip(*results, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that a call's tensors have at one time, beside those that were there before."""
    if CUDA:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("parts", [{}, {"warm": True}, {"warm": True, "extra": True}], ids=str)
def test_the_workspace_is_six_tensors(num_steps: int, parts: dict[str, bool]) -> None:
    shape: tuple[Any, ...] = ((21, 1, 400), 128, 8) if CUDA else ((3, 1, 2), 128, 1)
    inputs = make(*shape, dtype=LOW, **parts)
    out, _ = attend(inputs, Options(num_steps, band=0 if parts else None), impl="triton")
    grad = torch.randn_like(out)

    def backward() -> object:
        return torch.autograd.grad(out, wanted(inputs), grad, retain_graph=True)

    if CUDA:
        backward()  # compiles the kernels
    gradients = sum(x.nbytes for x in wanted(inputs))
    # Statistics and a frame's partial sums are small beside six tensors.
    assert peak_bytes(backward) - gradients <= 6.6 * inputs.q.nbytes


# What torch builds on gradients


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_gives_the_same_gradients(impl: str, reentrant: bool) -> None:
    inputs = make((4, 1, 3), extra=True)

    def run(*tensors: Tensor) -> Tensor:
        return attend(with_tensors(inputs, list(tensors)), Options(band=0), impl=impl)[0]

    grads = []
    for out in (run(*wanted(inputs)), checkpoint(run, *wanted(inputs), use_reentrant=reentrant)):
        out.square().sum().backward()
        grads.append([x.grad for x in wanted(inputs)])
        for x in wanted(inputs):
            x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["attention", "attention_without_turns"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_never_takes_turns_twice(name: str, reentrant: bool) -> None:
    inputs = make((4, 1, 3))
    residual = Residual(inputs.q, 4)
    residual.attention(inputs, Options(), 1, impl="torch")

    def run(*tensors: Tensor) -> Tensor:
        call = with_tensors(inputs, list(tensors))
        if name == "attention":
            return residual.attention(call, Options(), 1, impl="torch")[0]
        return residual.attention_without_turns(call, Options(), impl="torch")[0]

    out = checkpoint(run, *wanted(inputs), use_reentrant=reentrant)
    before = residual.values.float(), residual.scale.clone()
    with pytest.raises(RuntimeError, match=f"Residual.{name} was called in a backward pass"):
        out.square().sum().backward()
    assert torch.equal(residual.values.float(), before[0])
    assert torch.equal(residual.scale, before[1])


def test_a_checkpoint_may_repeat_a_call_on_a_copy() -> None:
    inputs = make((4, 1, 3))
    residual = Residual(inputs.q, 4)
    residual.attention(inputs, Options(), 1, impl="torch")
    twin = copy.deepcopy(residual)
    calls = iter((residual, twin))

    def run(*tensors: Tensor) -> Tensor:
        return next(calls).attention(with_tensors(inputs, list(tensors)), Options(), 1, impl="torch")[0]

    found = torch.autograd.grad(checkpoint(run, *wanted(inputs), use_reentrant=False).square().sum(), wanted(inputs))
    other = Residual(inputs.q, 4)
    other.attention(inputs, Options(), 1, impl="torch")
    out = other.attention(inputs, Options(), 1, impl="torch")[0]
    expected = torch.autograd.grad(out.square().sum(), wanted(inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_compiled_code_has_one_graph_and_the_same_gradients(impl: str) -> None:
    inputs = make((3, 1, 4), dim=4, dtype=torch.float32, extra=True, warm=True)

    def run(*tensors: Tensor) -> Tensor:
        call = with_tensors(inputs, [tensors[0] * 2, *tensors[1:]])
        structured = attend(call, Options(2, band=0), impl=impl)[0]
        frame = frame_attention(call.q, call.k, call.v, call.grid, 1, impl=impl)
        return torch.cat([structured, frame], 1)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*wanted(inputs)).square().sum(), wanted(inputs)) for f in (run, compiled)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize("band", [None, 0, 9])
def test_the_ops_are_well_formed(band: int | None) -> None:
    """torch's own checks of an op; those of ahead-of-time tracing cannot compare L's dtype."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = make((3, 1, 4), dim=4, dtype=torch.float32, extra=True)
    extra = inputs.extra or (None, None)
    op = torch.ops.vmonarch_kernels.monarch_attention.default
    tensors = (inputs.q, inputs.k, inputs.v)
    arguments = (*tensors, None, *extra, None, None, [3, 1, 4], 2, 0.1, True, band, 0.25, "torch", True, True)
    torch.library.opcheck(op, arguments, test_utils=checks)
    frame = torch.ops.vmonarch_kernels.frame_attention.default
    torch.library.opcheck(frame, (*tensors, *extra, [3, 1, 4], 1, 0.25, "torch"))


WORKER = """
import json, sys
import torch
from torch import distributed, nn
from vmonarch_kernels import monarch_attention

rank, port = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, dtype=torch.float64), nn.Linear(8, 8, dtype=torch.float64)
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return self.out(monarch_attention(q, k, v, (3, 2, 2), impl="torch", band=0).flatten(2))

torch.manual_seed(0)
alone = Block()
both = nn.parallel.DistributedDataParallel(Block())
both.module.load_state_dict(alone.state_dict())
x = torch.randn(2, 12, 8, dtype=torch.float64)
both(x[rank : rank + 1]).square().mean().backward()
alone(x).square().mean().backward()
pairs = zip(alone.parameters(), both.module.parameters())
print(json.dumps(max(float((a.grad - b.grad).abs().max() / a.grad.abs().max()) for a, b in pairs)))
distributed.destroy_process_group()
"""


def test_two_processes_have_one_process_s_gradients() -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", WORKER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank), port], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        printed, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        assert float(printed) < 1e-12


# Chips that are not there

OFFLINE = Path(__file__).with_name("offline.py")


@pytest.mark.parametrize("arch", [90, 80])
def test_the_kernels_fit_the_chip_and_do_not_spill_in_their_loops(arch: int) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    kernels = ["grad_queries_kernel", "grad_keys_kernel"]
    if arch == 90:  # there the others serve a band of several steps alone, which needs the shares of the exact part
        kernels += ["grad_queries_hopper_kernel", "grad_keys_hopper_kernel"]
    calls = ["backward", "backward band"]
    request = {"arch": arch, "dtype": "bfloat16", "dim": 128, "calls": calls, "kernels": kernels}
    command = [sys.executable, str(OFFLINE), json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert {entry["kernel"] for entry in found} == set(kernels)
    for entry in found:
        assert entry["shared"] <= {90: 227, 80: 163}[arch] * 1024
        # A few words that an address leaves behind are no loss; the sums would be kilobytes.
        # A Hopper kernel's loop over tiles has more than 600 instructions and comes once in 25 turns of the inner one.
        tiles = 600 if "hopper" in entry["kernel"] else math.inf
        assert all(spilled <= {90: 80, 80: 600}[arch] for length, spilled in entry["loops"] if length < tiles), entry
        assert all(spilled <= 1024 for length, spilled in entry["loops"] if length >= tiles), entry
