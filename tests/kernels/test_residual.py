"""Frame refresh: exact frames in turn, and the residual that they leave for the calls after them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vmonarch_kernels import Inputs, Options, Residual, attend, dense_attention, frame_attention, monarch_attention
from vmonarch_kernels.residual import DECAY, NEIGHBOUR_SHARE
from vmonarch_kernels.structure import dequantised, split_frames
from vmonarch_kernels.turns import next_turns, turns, turns_before

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
IMPLS = ["reference", "torch", "triton"]
GRID = (5, 2, 3)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, GRID[0] * GRID[1] * GRID[2], 2, 32)
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3))
    return 2 * q, k, v


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_every_frame_has_its_turn_and_neighbours_turns_lie_apart() -> None:
    assert sorted(turns(21, first_frame=True)) == list(range(1, 21))
    assert all(abs(a - b) > 2 for a, b in itertools.pairwise(turns(21, first_frame=True)))


def test_the_first_frame_has_every_fourth_turn_where_it_is_not_exact_anyway() -> None:
    order = turns(21, first_frame=False)
    assert set(order) == set(range(21))
    assert [i for i, frame in enumerate(order) if frame == 0] == list(range(0, len(order), 4))
    assert [frame for frame in order if frame] == turns(21, first_frame=True)
    assert turns(1, first_frame=False) == [0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frame", [0, 3])
def test_a_frames_queries_see_every_key(impl: str, frame: int) -> None:
    q, k, v = inputs()
    expected = split_frames(dense_attention(q, k, v), GRID[0])[:, frame]
    assert error(frame_attention(q, k, v, GRID, frame, impl=impl), expected) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_a_frames_queries_see_the_extra_part(impl: str) -> None:
    q, k, v = inputs()
    text_k, text_v = inputs(seed=1)[1:]
    scores = q.transpose(1, 2) @ text_k.transpose(1, 2).mT * q.shape[-1] ** -0.5
    extra = (torch.softmax(scores, -1) @ text_v.transpose(1, 2)).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)
    expected = dense_attention(q, torch.cat([k, text_k], 1), torch.cat([v, text_v], 1))
    found = frame_attention(q, k, v, GRID, 2, impl=impl, extra=extra)
    assert error(found, split_frames(expected, GRID[0])[:, 2]) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("band", [None, 0])
def test_a_residual_is_added_to_the_output(impl: str, band: int | None) -> None:
    q, k, v = inputs()
    values = torch.randn(q.shape, device=DEVICE).to(torch.float8_e4m3fn)
    scale = torch.rand(2, GRID[1] * GRID[2], 2, GRID[0], device=DEVICE)
    scale[..., 0] = 0  # exact already
    plain = monarch_attention(q, k, v, GRID, impl=impl, band=band)
    found = monarch_attention(q, k, v, GRID, impl=impl, band=band, residual=(values, scale))
    assert error(found, plain + dequantised(values, scale, GRID[0]).flatten(1, 2)) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_on_tensors_that_stay_the_output_becomes_dense(impl: str) -> None:
    q, k, v = inputs()
    dense = split_frames(dense_attention(q, k, v), GRID[0])
    residual = Residual(q, GRID[0])
    errors = []
    for call in range(4):
        out, factor = residual.attention(Inputs(q, k, v, GRID), Options(band=0), 1, impl=impl, return_l=True)
        assert factor is not None
        frames = split_frames(out, GRID[0])
        errors.append(error(frames, dense))
        assert error(frames[:, turns(GRID[0], first_frame=True)[call]], dense[:, turns(GRID[0], True)[call]]) < 1e-5
    assert errors == sorted(errors, reverse=True)
    # What is left is what the residual has faded by, what neighbours gave them, and 8 bits.
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_residual_fades(impl: str) -> None:
    q, k, v = inputs()
    residual = Residual(q, GRID[0])
    first, _ = residual.attention(Inputs(q, k, v, GRID), Options(), 4, impl=impl)
    assert error(first, dense_attention(q, k, v)) < 1e-5, "all frames at once"
    kept = residual.scale.clone()
    residual.attention(Inputs(q, k, v, GRID), Options(), 1, impl=impl)
    now, *rest = turns(GRID[0], first_frame=True)
    last = next(frame for frame in rest if abs(frame - now) > 1)
    assert torch.equal(residual.scale[..., last], kept[..., last] * DECAY)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_extra", [False, True], ids=["video", "with extra"])
def test_neighbours_get_a_share_of_a_change(impl: str, with_extra: bool) -> None:
    q, k, v = inputs()
    lse = torch.full(q.shape[:3], 1.0, device=DEVICE)
    extra = (v.flip(1).contiguous(), lse) if with_extra else None
    call, options = Inputs(q, k, v, GRID, extra=extra), Options(band=0)
    residual = Residual(q, GRID[0])
    first = turns(GRID[0], first_frame=True)[0]
    structured = split_frames(attend(call, options, impl=impl)[0], GRID[0])
    residual.attention(call, options, 1, impl=impl)
    exact = frame_attention(q, k, v, GRID, first, impl="reference", extra=extra)
    change = exact - structured[:, first]
    kept = dequantised(residual.values, residual.scale, GRID[0])
    assert error(kept[:, first], change) < 0.04, "8 bits"
    for frame in range(GRID[0]):
        if frame and abs(frame - first) == 1:
            assert error(kept[:, frame], NEIGHBOUR_SHARE * change) < 0.04
        elif frame != first:
            assert not kept[:, frame].any(), "frame 0 is exact in every call"

    # The next change is mixed with what a neighbour holds, here a residual of its own.
    beside = first + 1
    residual = Residual(q, GRID[0])
    values, old = split_frames(residual.values, GRID[0]), torch.randn_like(change)
    values[:, beside] = old.to(torch.float8_e4m3fn)
    residual.scale[..., beside] = 1.0
    residual.attention(call, options, 1, impl=impl)
    kept = dequantised(residual.values, residual.scale, GRID[0])[:, beside]
    assert error(kept, NEIGHBOUR_SHARE * change + (1 - NEIGHBOUR_SHARE) * DECAY * old) < 0.06


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize(("refresh", "calls"), [(0.6, 20), (2, 20), (0.6, 50), (1, 3), (4, 16)])
def test_where_the_calls_are_counted_turns_come_early_and_are_no_more(
    refresh: float, calls: int, forwards: int
) -> None:
    frames = 13
    before = [turns_before(call, refresh, frames, calls, forwards) for call in range(calls + 1)]
    assert before == sorted(before)
    assert before[-1] == math.ceil(refresh * forwards * calls)
    assert before[1] == turns_before(1, refresh, frames, calls), "the first call need not know of other forwards"
    assert 0 < before[1] == math.floor(min(frames / 2, refresh * calls / 3)) <= frames / 2
    early = 1 + max(1, calls // 5)
    left = before[-1] - before[1]
    assert before[early] - before[1] >= min(frames, 0.8 * left), "every frame's turn, or most of what is left"
    assert before[early] - before[1] >= left * (early - 1) / (calls - 1) - 1, "no later than evenly"
    evenly = [turns_before(call, refresh, frames, None, forwards) for call in range(calls + 1)]
    assert evenly == [math.ceil(refresh * forwards * call - 1e-9) for call in range(calls + 1)]


@pytest.mark.parametrize("impl", IMPLS)
def test_calls_without_turns_use_the_residual_and_leave_it(impl: str) -> None:
    q, k, v = inputs()
    call = Inputs(q, k, v, GRID)
    residual = Residual(q, GRID[0])
    residual.attention(call, Options(band=0), 2, impl=impl)
    values, scale = residual.values.clone().view(torch.uint8), residual.scale.clone()
    expected = monarch_attention(q, k, v, GRID, impl=impl, band=0, residual=(residual.values, residual.scale))
    out, factor = residual.attention_without_turns(call, Options(band=0), impl=impl)
    assert factor is None
    assert torch.equal(out, expected)
    assert residual.attention_without_turns(call, Options(band=0), impl=impl, return_l=True)[1] is not None
    assert torch.equal(residual.values.view(torch.uint8), values)
    assert torch.equal(residual.scale, scale)


def test_a_fraction_is_the_mean_over_calls() -> None:
    q, k, v = inputs()

    def recomputed(refresh: float) -> list[int]:
        """How many frames each of eight calls made exact."""
        residual, dense = Residual(q, GRID[0]), split_frames(dense_attention(q, k, v), GRID[0])
        counts = []
        for _ in range(8):
            residual.scale.zero_()
            out = split_frames(residual.attention(Inputs(q, k, v, GRID), Options(), refresh, impl="torch")[0], GRID[0])
            counts.append(sum(error(out[:, frame], dense[:, frame]) < 1e-5 for frame in range(1, GRID[0])))
        return counts

    assert recomputed(0.75) == [1, 1, 1, 0, 1, 1, 1, 0]
    assert recomputed(0.5) == [1, 0, 1, 0, 1, 0, 1, 0]
    assert recomputed(1.5) == [2, 1, 2, 1, 2, 1, 2, 1]
    assert recomputed(0.1) == [1, 0, 0, 0, 0, 0, 0, 0]


def test_all_frames_take_turns_where_the_first_is_not_exact() -> None:
    q, k, v = inputs()
    residual = Residual(q, GRID[0], first_frame=False)
    out, _ = residual.attention(Inputs(q, k, v, GRID), Options(first_frame=False), 99, impl="torch")
    assert error(out, dense_attention(q, k, v)) < 1e-5


@pytest.mark.parametrize("first_frame", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_single_frame_is_dense_and_stays_so(impl: str, first_frame: bool) -> None:
    q, k, v = inputs()
    call, options = Inputs(q, k, v, (1, 5, 6)), Options(first_frame=first_frame)
    residual = Residual(q, 1, first_frame=first_frame, calls=4)
    for _ in range(4):
        out, _ = residual.attention(call, options, 0.75, impl=impl)
        assert error(out, dense_attention(q, k, v)) < 1e-5


def test_the_first_call_takes_the_share_of_all_turns_that_it_is_given() -> None:
    before = [turns_before(call, 2, 13, 4, 2, first=0.75) for call in range(5)]
    assert before == [0, 12, 14, 15, 16], "all forwards' turns count, and the mean stays"
    assert turns_before(1, 4, 13, 4, 2, first=0.75) == 13, "at most one for every frame"
    assert [turns_before(call, 1, 13, 2, first=0.9) for call in range(3)] == [0, 1, 2]


def test_turns_that_the_first_call_has_no_frames_for_come_in_the_next() -> None:
    before = [turns_before(call, 2.75, 13, 8, 2, first=0.6) for call in range(9)]
    assert before == [0, 13, 26, 32, 34, 37, 39, 42, 44]
    assert [turns_before(call, 2, 3, 4, 2, first=1.0) for call in range(5)] == [0, 3, 6, 9, 12]


def test_a_call_takes_every_frame_once() -> None:
    order = turns(13, first_frame=False)
    assert sorted(next_turns(order, 0, 13)[0]) == list(range(13))
    assert next_turns(order, 0, 5) == ([0, 5, 10, 2, 7], 6)
    assert next_turns([], 0, 5) == ([], 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_caller_may_plan_the_turns_itself(impl: str) -> None:
    q, k, v = inputs()
    residual, dense = Residual(q, GRID[0]), split_frames(dense_attention(q, k, v), GRID[0])
    for count in (3, 0, 1):
        out, _ = residual.attention(Inputs(q, k, v, GRID), Options(), 99, count=count, impl=impl)
        pairs = zip(split_frames(out, GRID[0])[0], dense[0], strict=True)
        exact = [error(frame, truth) < 1e-5 for frame, truth in pairs]
        assert sum(exact) == 1 + count, "the first frame is exact in every call"


def test_a_residual_ages_by_calls_that_are_left_out() -> None:
    q, k, v = inputs()
    residual = Residual(q, GRID[0])
    residual.attention(Inputs(q, k, v, GRID), Options(), 2, impl="torch")
    kept = residual.scale.clone()
    residual.fade(3)
    torch.testing.assert_close(residual.scale, kept * DECAY**3)


def test_it_fits_calls_of_its_own_shape() -> None:
    q, _, _ = inputs()
    residual = Residual(q, GRID[0])
    assert residual.fits(q)
    assert not residual.fits(q[:1])
    assert residual.nbytes == q.numel() + 4 * residual.scale.numel()


def test_bad_arguments_get_one_sentence() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="frame is 5; valid are 0 to 4"):
        frame_attention(q, k, v, GRID, 5)
    with pytest.raises(ValueError, match=r"residual is \(1,\) torch.float32 and \(1,\); these tensors need"):
        monarch_attention(q, k, v, GRID, residual=(torch.zeros(1, device=DEVICE),) * 2)
