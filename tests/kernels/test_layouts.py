"""Every tensor of a call in every layout: the values decide, not the strides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vmonarch_kernels import Inputs, Options, Residual, attend, frame_attention
from vmonarch_kernels.turns import turns

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
IMPLS = ("reference", "torch", "triton")
GRID = (5, 2, 3)
NAMES = ("q", "k", "v", "l_prev", "extra out", "extra lse", "residual values", "residual scale")


def turned(x: Tensor, first: int, second: int) -> Tensor:
    """The same values with two dimensions in each other's place in memory."""
    return x.transpose(first, second).contiguous().transpose(first, second)


def every_second(x: Tensor, dim: int) -> Tensor:
    """The same values in every second place of a larger tensor, whose other places hold other values."""
    sizes = list(x.shape)
    sizes[dim] *= 2
    wide = torch.full(sizes, 3.0, device=x.device).to(x.dtype)
    part = wide[(slice(None),) * (dim % x.dim()) + (slice(1, None, 2),)]
    part.view(torch.uint8).copy_(x.view(torch.uint8)) if x.element_size() == 1 else part.copy_(x)
    return part


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "last two turned": lambda x: turned(x, -1, -2),
    "tokens and heads turned": lambda x: turned(x, 1, 2),
    "batch last": lambda x: turned(x, 0, -1),
    "every second token": lambda x: every_second(x, 1),
    "every second entry": lambda x: every_second(x, -1),
    "within a larger batch": lambda x: (
        torch.cat([x.view(torch.uint8)] * 2).view(x.dtype)[x.shape[0] :]
        if x.element_size() == 1
        else torch.cat([x + 1, x])[x.shape[0] :]
    ),
}
EXPANDED = {"batch": 0, "tokens": 1, "heads": 2}


def whole_call() -> Inputs:
    """A call that has every tensor there is."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    q, k, v, out = (normal(2, 30, 2, 16) for _ in range(4))
    _, l_prev = attend(Inputs(k, q, v, GRID), impl="torch", return_l=True)
    values = normal(2, 30, 2, 16).to(torch.float8_e4m3fn)
    scale = normal(2, 6, 2, 5).abs()
    scale[..., 0] = 0
    return Inputs(q, k, v, GRID, l_prev, (out, normal(2, 30, 2)), (values, scale))


def get(call: Inputs, name: str) -> Tensor:
    if " " not in name:
        found: Tensor = getattr(call, name)
        return found
    pair, part = name.split()
    both: tuple[Tensor, Tensor] = getattr(call, pair)
    return both[part in ("lse", "scale")]


def put(call: Inputs, name: str, value: Tensor) -> Inputs:
    if " " not in name:
        return replace(call, **{name: value})
    pair, part = name.split()
    first, second = getattr(call, pair)
    return replace(call, **{pair: (first, value) if part in ("lse", "scale") else (value, second)})


def check(call: Inputs, plain: Inputs, impl: str) -> None:
    for options in (Options(num_steps=1), Options(num_steps=2, band=0, first_frame=False)):
        expected, expected_l = attend(plain, options, impl=impl, return_l=True)
        found, found_l = attend(call, options, impl=impl, return_l=True)
        assert found.is_contiguous()
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        assert found_l is not None
        assert expected_l is not None
        assert (found_l.float() - expected_l.float()).abs().max() <= 1 / 16, "a step of e4m3, where rounding differs"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_tensor_may_lie_in_any_layout(impl: str, name: str, layout: str) -> None:
    plain = whole_call()
    value = LAYOUTS[layout](get(plain, name))
    assert torch.equal(value.float(), get(plain, name).float())
    check(put(plain, name, value), plain, impl)


@pytest.mark.parametrize("dim", EXPANDED)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_tensor_may_be_expanded(impl: str, name: str, dim: str) -> None:
    plain = whole_call()
    value = get(plain, name)
    wide = value.narrow(EXPANDED[dim], 0, 1).expand_as(value)
    check(put(plain, name, wide), put(plain, name, wide.contiguous()), impl)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_one_frames_attention_takes_any_layout(impl: str, layout: str) -> None:
    plain = whole_call()
    q, k, v, out, lse = (get(plain, name) for name in ("q", "k", "v", "extra out", "extra lse"))
    expected = frame_attention(q, k, v, GRID, 2, impl=impl, extra=(out, lse))
    turn = LAYOUTS[layout]
    found = frame_attention(turn(q), turn(k), turn(v), GRID, 2, impl=impl, extra=(turn(out), turn(lse)))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_residual_is_kept_in_any_layout(impl: str, layout: str) -> None:
    plain = replace(whole_call(), residual=None)
    kept = []
    for turn in (lambda x: x, LAYOUTS[layout]):
        residual = Residual(plain.q, GRID[0])
        residual.values, residual.scale = turn(residual.values), turn(residual.scale)
        call = replace(plain, q=turn(plain.q), k=turn(plain.k), v=turn(plain.v))
        out, _ = residual.attention(call, Options(band=0), 1, impl=impl)
        kept.append((out, residual.values.float(), residual.scale))
    first = turns(GRID[0], first_frame=True)[0]
    assert kept[0][2][..., first].all(), "a frame had its turn"
    for expected, found in zip(*kept, strict=True):
        assert (found - expected).norm() <= 1e-3 * expected.norm()
