"""Frame refresh: exact frames in turn, and the corrections that they leave for the calls after them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vmonarch_kernels import Residual, dense_attention, frame_attention, monarch_attention
from vmonarch_kernels.residual import DECAY, turns
from vmonarch_kernels.structure import dequantised, split_frames

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
    scale = torch.rand(2, 2, GRID[0], device=DEVICE)
    scale[:, :, 0] = 0  # exact already
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
        out, factor = residual.attention(q, k, v, GRID, 1, impl=impl, band=0, return_l=True)
        assert factor is not None
        frames = split_frames(out, GRID[0])
        errors.append(error(frames, dense))
        assert error(frames[:, turns(GRID[0], first_frame=True)[call]], dense[:, turns(GRID[0], True)[call]]) < 1e-5
    assert errors == sorted(errors, reverse=True)
    # What is left is what the corrections have faded by, and 8 bits.
    assert errors[-1] < 0.25 * errors[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_correction_fades_and_is_forgotten(impl: str) -> None:
    q, k, v = inputs()
    residual = Residual(q, GRID[0])
    first, _ = residual.attention(q, k, v, GRID, 4, impl=impl)
    assert error(first, dense_attention(q, k, v)) < 1e-5, "all frames at once"
    kept = residual.scale.clone()
    residual.attention(q, k, v, GRID, 1, impl=impl)
    last = turns(GRID[0], first_frame=True)[-1]
    assert torch.equal(residual.scale[:, :, last], kept[:, :, last] * DECAY)
    fresh, _ = residual.fresh().attention(q, k, v, GRID, 1, impl=impl)
    assert torch.equal(residual.scale[:, :, last], kept[:, :, last] * DECAY), "a fresh one shares nothing"
    residual.forget()
    again, _ = residual.attention(q, k, v, GRID, 1, impl=impl)
    assert torch.equal(again, fresh)
    assert torch.equal(again, Residual(q, GRID[0]).attention(q, k, v, GRID, 1, impl=impl)[0])


def test_all_frames_take_turns_where_the_first_is_not_exact() -> None:
    q, k, v = inputs()
    residual = Residual(q, GRID[0], first_frame=False)
    out, _ = residual.attention(q, k, v, GRID, 99, impl="torch", first_frame=False)
    assert error(out, dense_attention(q, k, v)) < 1e-5


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
        monarch_attention(q, k, v, GRID, residual=(torch.zeros(1), torch.zeros(1)))
