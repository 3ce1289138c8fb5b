"""Small calls, recorded and replayed: the same to the bit as calls that run as they are.

On a GPU they are recorded as CUDA graphs, elsewhere by a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tape import Tape
from torch import Tensor

from vmonarch_kernels import Inputs, Options, Residual, attend
from vmonarch_kernels.cost import LARGEST_SMALL as LARGEST
from vmonarch_kernels.graphs import Graphs, Replay
from vmonarch_kernels.structure import empty_l, split_frames

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GRID = (5, 2, 3)


def recorder() -> Graphs:
    return Graphs() if CUDA else Tape().graphs


def tensors(seed: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 30, heads, 16, generator=generator).to(DEVICE) for _ in range(3))
    return 2 * q, k, v


def same(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> bool:
    l_new, wanted = found[1], expected[1]
    if l_new is None or wanted is None:
        return l_new is wanted and torch.equal(found[0], expected[0])
    return torch.equal(found[0], expected[0]) and torch.equal(l_new.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("options", [Options(), Options(1, band=0)], ids=["paper", "band"])
def test_calls_are_run_recorded_and_replayed_with_the_same_results(options: Options) -> None:
    graphs = recorder()
    made = []
    for seed in range(4):
        inputs = Inputs(*tensors(seed), GRID)
        assert graphs.takes(inputs, "triton")
        found = graphs.attend(inputs, options, return_l=True)
        made.append((found, attend(inputs, options, impl="triton", return_l=True)))
    assert (graphs.recorded, graphs.replayed) == (1, 3)
    for found, expected in made:  # later calls have not changed earlier results
        assert same(found, expected)


def test_warm_calls_and_further_keys_are_recorded_apart() -> None:
    graphs = recorder()
    for seed in range(3):
        q, k, v = tensors(seed)
        start = empty_l(split_frames(q, GRID[0])).copy_(torch.rand(5, 5, device=DEVICE) * 50)
        extra = (torch.randn_like(q), torch.randn(q.shape[:3], device=DEVICE))
        for inputs in (
            Inputs(q, k, v, GRID),
            Inputs(q, k, v, GRID, start),
            Inputs(q, k, v, GRID, start, extra),
        ):
            assert same(graphs.attend(inputs, Options(1)), attend(inputs, Options(1), impl="triton"))
    assert graphs.recorded == 3


@pytest.mark.parametrize("counts", [[2, 1, 3, 1, 2, 3, 0, 2]], ids=["turns"])
def test_a_residual_through_graphs_is_the_same_from_call_to_call(counts: list[int]) -> None:
    graphs = recorder()
    plain, replayed = (Residual(tensors(0)[0], GRID[0], first_frame=False) for _ in range(2))
    replayed.graphs = graphs
    options = Options(1, band=0, first_frame=False)
    for seed, count in enumerate(counts):
        inputs = Inputs(*tensors(seed), GRID)
        found, expected = (
            one.attention(inputs, options, 1, count=count, impl="triton", return_l=True) for one in (replayed, plain)
        )
        assert same(found, expected)
        followed = replace(inputs, q=inputs.q + 0.5)
        assert same(
            replayed.attention_without_turns(followed, options, impl="triton"),
            plain.attention_without_turns(followed, options, impl="triton"),
        )
        assert torch.equal(replayed.values.view(torch.uint8), plain.values.view(torch.uint8))
        assert torch.equal(replayed.scale, plain.scale)
    assert graphs.replayed > 8


def test_one_recording_of_a_turn_serves_every_frame() -> None:
    graphs = recorder()
    residual = Residual(tensors(0)[0], GRID[0], first_frame=False)
    residual.graphs = graphs
    for seed in range(8):
        residual.attention(Inputs(*tensors(seed), GRID), Options(1, first_frame=False), 1, count=1, impl="triton")
    assert (graphs.recorded, graphs.replayed) == (2, 14)


@pytest.mark.parametrize("extra", [False, True], ids=["video", "and text"])
@pytest.mark.parametrize(("frame", "beside"), [(0, ()), (2, (1, 3)), (4, (3,))])
def test_a_turn_that_memory_names_is_the_same_as_one_that_the_host_names(
    frame: int, beside: tuple[int, ...], extra: bool
) -> None:
    from vmonarch_kernels.launch import refresh_triton, turn_triton

    q, k, v = (torch.cat([x, x.flip(1)]) for x in tensors(0))
    more = (torch.randn_like(q), torch.randn(q.shape[:3], device=DEVICE)) if extra else None
    inputs = Inputs(q, k, v, GRID, None, more)
    made = []
    for named in (True, False):
        residual = Residual(q, GRID[0])
        values = torch.arange(q.numel(), device=DEVICE).remainder(100).to(torch.uint8)
        residual.values.view(torch.uint8).copy_(values.view(q.shape))
        residual.scale.fill_(0.5)
        out, kept = q.flip(2).contiguous(), (residual.values, residual.scale)
        if named:
            turn = torch.tensor([frame, frame - 1 in beside, frame + 1 in beside, 0], dtype=torch.int32, device=DEVICE)
            turn_triton(inputs, out, kept, turn, 0.25, 0.25)
        else:
            refresh_triton(inputs, out, kept, frame, list(beside), 0.25, 0.25)
        made.append((out, residual.values.view(torch.uint8), residual.scale))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_tensors_of_any_strides_are_copied_as_they_are() -> None:
    """q, k and v cut from one tensor, and a residual whose tensors its caller has put in another order."""
    graphs = recorder()
    options = Options(1, band=0, first_frame=False)
    plain, replayed = (Residual(tensors(0)[0], GRID[0], first_frame=False) for _ in range(2))
    replayed.graphs = graphs
    for seed in range(6):
        q, k, v = torch.stack(tensors(seed), dim=-1).unbind(-1)
        inputs = Inputs(q, k, v, GRID)
        assert same(
            graphs.attend(inputs, options, return_l=True), attend(inputs, options, impl="triton", return_l=True)
        )
        found, expected = (one.attention(inputs, options, 1, count=1, impl="triton") for one in (replayed, plain))
        assert same(found, expected)
        assert torch.equal(replayed.values.view(torch.uint8), plain.values.view(torch.uint8))
        assert torch.equal(replayed.scale, plain.scale)
        if seed == 2:
            replayed = replayed.copy()
            replayed.scale = replayed.scale.mT.contiguous().mT
    assert graphs.replayed > 6


def test_what_cannot_be_recorded_runs_as_it_is_and_says_why() -> None:
    def fails(launch: Callable[[], None]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    graphs = Graphs(fails)
    for seed in range(3):
        inputs = Inputs(*tensors(seed), GRID)
        assert graphs.takes(inputs, "triton") is (seed < 2)
        assert same(graphs.attend(inputs, Options()), attend(inputs, Options(), impl="triton"))
    assert graphs.failure == "RuntimeError: operation not permitted when stream is capturing"
    assert graphs.replayed == 0


def test_large_calls_other_implementations_and_training_are_not_recorded() -> None:
    graphs = recorder()
    q, k, v = tensors(0)
    assert graphs.takes(Inputs(q, k, v, GRID), "triton")
    assert not graphs.takes(Inputs(q, k, v, GRID), "torch")
    wide = torch.empty(1, 1, 1, 1).expand(1, LARGEST // 8 + 8, 8, 16)
    assert not graphs.takes(Inputs(wide, wide, wide, (1, 1, wide.shape[1])), "triton")
    assert not graphs.takes(Inputs(q.requires_grad_(), k, v, GRID), "triton")
    assert Graphs().takes(Inputs(k, k, v, GRID), "triton") is CUDA, "no GPU, no CUDA graph"
