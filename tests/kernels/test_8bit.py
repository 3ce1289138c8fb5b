"""8-bit states on chips that do not convert e4m3, as Triton's interpreter: kernels read and write the bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vmonarch_kernels import Inputs, Options, Residual, monarch_attention
from vmonarch_kernels.structure import L_DTYPE, empty_l, split_frames

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from vmonarch_kernels import _triton, launch  # noqa: E402
from vmonarch_kernels.configs import chip  # noqa: E402

# A GPU has its own conversions, or refuses tensors of the CPU: tests of the kernels' results cover those.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
GRID = (4, 2, 4)
CPU = torch.device("cpu")


@triton.jit
def _write(p_x, p_out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes of float32 numbers."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + at, _triton.to_8bit(tl.load(p_x + at), p_out.dtype.element_ty))


def every_byte(size: tuple[int, ...]) -> Tensor:
    """All 254 finite values of e4m3, over and over."""
    finite = torch.tensor([x for x in range(256) if x & 0x7F != 0x7F], dtype=torch.uint8)
    count = torch.Size(size).numel()
    return finite.repeat(-(-count // len(finite)))[:count].reshape(size).view(L_DTYPE)


def as_bytes(numbers: Tensor) -> Tensor:
    """What the kernels write of float32 (n,): uint8 (n,)."""
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % 1024))
    found = torch.empty(len(padded), dtype=torch.uint8)
    _write[(len(padded) // 1024,)](padded, found, BLOCK=1024)
    return found[: len(numbers)]


@pytest.mark.parametrize("band", [None, 0])
def test_every_value_of_a_residual_is_read_to_the_bit(band: int | None) -> None:
    """Values of zero have an output of zero, to which the residual is added."""
    q, k = torch.randn(2, 1, 32, 2, 16)
    values, scale = every_byte((1, 32, 2, 16)), torch.ones(1, 8, 2, 4)
    options = {"impl": "triton", "first_frame": False, "band": band}
    out = monarch_attention(q, k, torch.zeros_like(q), GRID, residual=(values, scale), **options)
    assert set(values.flatten().float().tolist()) == set(every_byte((254,)).float().tolist())
    assert torch.equal(out, values.float())


def test_every_value_of_a_stored_l_is_read_to_the_bit() -> None:
    """With one query frame's row of L beside zeros, alpha_r is that row times its queries: a product of two numbers."""
    frames, positions = 16, 8
    q = torch.ones(1, frames * positions, 2, 16)
    stored = torch.zeros(1, positions, 2, frames, frames).to(L_DTYPE)
    rows = every_byte((1, positions, 2, frames)).view(torch.uint8) & 0x7F  # entries of L are not negative
    stored[:, :, :, 3] = rows.view(L_DTYPE)
    call = launch.Call.of(Inputs(q, q, q, (frames, 1, positions)), Options(c_floor=1.0))
    q_r = launch.r_queries(call, l_prev=stored)
    entries = rows.view(L_DTYPE).float()
    expected = (entries * (1.0 / entries.clamp_min(256.0))).permute(0, 3, 1, 2)[..., None]
    assert len(rows.unique()) == 127
    assert torch.equal(q_r, expected.expand_as(q_r))


def test_numbers_become_the_bytes_that_torch_makes() -> None:
    """Of every float16 up to 464, and of float32 beside the places where rounding changes its mind."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    values = every_byte((254,)).float().abs().unique()
    middles = (values[1:] + values[:-1]) / 2  # between two values, and next to that
    ties = torch.cat([middles, *(torch.nextafter(middles, torch.full_like(middles, x)) for x in (0.0, 1e9))])
    numbers = torch.cat([halves[halves.abs() <= 464], ties, -ties])
    assert torch.equal(as_bytes(numbers), numbers.to(L_DTYPE).view(torch.uint8))


def test_numbers_beyond_the_largest_become_that_one() -> None:
    beyond = torch.tensor([464.1, -480.0, 1e30, -float("inf")])
    assert as_bytes(beyond).view(L_DTYPE).float().tolist() == [448.0, -448.0, 448.0, -448.0]
    assert as_bytes(torch.tensor([float("nan"), -float("nan")])).view(L_DTYPE).isnan().all()


def test_no_state_is_converted_as_a_whole() -> None:
    """Kernels get the memory of the states themselves, and a turn changes its frame and the neighbours alone."""
    q = torch.randn(1, 32, 2, 16)
    residual = Residual(q, GRID[0])
    factor = empty_l(split_frames(q, GRID[0]))
    assert launch.kernel_residual((residual.values, residual.scale))[0].data_ptr() == residual.values.data_ptr()
    assert launch.kernel_l(factor, chip(CPU)).data_ptr() == factor.data_ptr()
    values = split_frames(residual.values, GRID[0]).view(torch.uint8)
    values[:] = 0x7F  # NaN: what is read of it shows
    launch.refresh_triton(
        Inputs(q, q, q, GRID), torch.zeros_like(q), (residual.values, residual.scale), 1, [], 0.25, 0.1
    )
    assert (values[:, [0, 2, 3]] == 0x7F).all()
    assert not residual.values.view(torch.uint8)[:, 8:16].eq(0x7F).any()


def test_what_is_not_a_number_stays_so() -> None:
    q, k, v = torch.randn(3, 1, 32, 2, 16)
    values = torch.zeros(1, 32, 2, 16).to(L_DTYPE)
    values.view(torch.uint8)[0, 5, 1, 3] = 0xFF
    out = monarch_attention(q, k, v, GRID, impl="triton", residual=(values, torch.ones(1, 8, 2, 4)), first_frame=False)
    assert out.isnan().nonzero().tolist() == [[0, 5, 1, 3]]
