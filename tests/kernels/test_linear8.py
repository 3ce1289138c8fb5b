"""Rows in e4m3 with a scale each, and the linear layer on them, on odd shapes, against float64.

On a GPU with e4m3 the Triton kernel runs as compiled code; without one it runs under Triton's interpreter.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from vmonarch_kernels import (
    ImplUnavailable,
    Norm,
    Rows,
    Term,
    gelu_tanh_,
    gelu_tanh_rows,
    layer_norm_modulate,
    linear8,
    linear_e4m3,
    quantize_rows,
    residual_norm,
)

pytest.importorskip("vmonarch_kernels.launch_fused")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STEP = 2.0**-4
"""Half a unit in the last place of e4m3, of a number itself."""


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 interprets e4m3 without NaN and without what a rounding carries into the exponent: torch rounds."""
    if CUDA:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    own = interpreter._convert_float

    def convert(values: Any, before: Any, after: Any, mode: Any) -> Any:
        if not after.is_fp8e4nv():
            return own(values, before, after, mode)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5, 7), (2, 33, 96), (65, 200)], ids=str)
def test_rows_come_back_within_a_rounding(size: tuple[int, ...], impl: str) -> None:
    x = random(*size) * torch.logspace(-3, 3, size[-2], device=DEVICE)[:, None]
    values, scale = quantize_rows(x, impl=impl)
    rows = x.reshape(-1, size[-1])
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (
        *(torch.float8_e4m3fn, rows.shape),
        *(torch.float32, (len(rows), 1)),
    )
    largest = rows.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(448 * scale, largest)
    error = (values.float() * scale - rows).abs()
    assert bool((error <= STEP * rows.abs() + largest / 448 * 2**-10 + 1e-12).all())


def test_implementations_agree_to_the_bit() -> None:
    x = random(40, 136, dtype=torch.float16)
    found = [quantize_rows(view, impl=impl) for impl in ("torch", "triton") for view in (x, x.t().contiguous().t())]
    for values, scale in found[1:]:
        torch.testing.assert_close(scale, found[0][1])
        assert float((values.float() != found[0][0].float()).float().mean()) < 0.01, (
            "but for ties of a rounded quotient"
        )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_zeros_stay_and_what_is_not_finite_shows(impl: str) -> None:
    x = random(4, 32)
    x[1], x[2, 5], x[3, 7] = 0, float("nan"), float("inf")
    values, scale = quantize_rows(x, impl=impl)
    back = values.float() * scale
    assert bool((back[1] == 0).all())
    assert bool(torch.isfinite(back[:2]).all())
    assert not torch.isfinite(back[2, 5])
    assert not torch.isfinite(back[3, 7])


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_that_of_its_rounded_operands(bias: bool) -> None:
    x, weight = random(2, 19, 96, dtype=torch.bfloat16), random(48, 96, seed=1)
    b = random(48, dtype=torch.bfloat16, seed=2) if bias else None
    w8, scale = quantize_rows(weight)
    out = linear_e4m3(x, w8, scale, b)
    assert (out.shape, out.dtype) == ((2, 19, 48), torch.bfloat16)
    x8, of_rows = quantize_rows(x)
    exact = (x8.double() * of_rows) @ (w8.double() * scale).t() + (0 if b is None else b.double())
    assert float((out.double().reshape(-1, 48) - exact).norm() / exact.norm()) < 0.004
    stock = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    assert float((out.double() - stock).norm() / stock.norm()) < 0.06


def same(rows: Rows | tuple[Tensor, Tensor], values: Tensor, scale: Tensor) -> None:
    """To the bit, but for ties of a rounded quotient."""
    found, of_rows = (rows.values, rows.scale) if isinstance(rows, Rows) else rows
    torch.testing.assert_close(of_rows, scale)
    assert float((found.float() != values.float()).float().mean()) < 0.01


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what had to be quantised for its products."""
    seen: list[tuple[int, ...]] = []
    real = linear8.quantize_rows
    monkeypatch.setattr(linear8, "quantize_rows", lambda x, impl: (seen.append(tuple(x.shape)), real(x, impl=impl))[1])
    return seen


def layer(width: int) -> tuple[Tensor, Tensor]:
    return quantize_rows(random(32, width, seed=3))


def test_products_of_one_tensor_share_its_rows(quantised: list[tuple[int, ...]]) -> None:
    x, weight = random(2, 5, 48, dtype=torch.bfloat16), layer(48)
    first, second = (linear_e4m3(x, *weight) for _ in range(2))
    assert torch.equal(first, second)
    assert quantised == [(2, 5, 48)]
    x.mul_(2)  # what has changed is quantised anew
    torch.testing.assert_close(linear_e4m3(x, *weight), 2 * first)
    linear_e4m3(x[:1], *weight)  # and so is a part
    assert quantised == [(2, 5, 48), (2, 5, 48), (1, 5, 48)]
    with torch.inference_mode():
        x = random(2, 5, 48, dtype=torch.bfloat16)
        assert torch.equal(linear_e4m3(x, *weight), first)
        x.mul_(2)
        torch.testing.assert_close(linear_e4m3(x, *weight), 2 * first)


@pytest.mark.parametrize("summed", [False, True])
def test_a_norm_writes_its_rows(summed: bool, quantised: list[tuple[int, ...]]) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float16
    x, y = (random(2, 2100, 48, dtype=dtype, seed=seed) for seed in (1, 2))  # several rows a program
    gate, scale, shift = (Term(random(2, 1, 48, seed=seed)) for seed in (4, 5, 6))
    norm = Norm(1e-6, random(48, seed=7))

    def run(rows: bool) -> Tensor:
        if summed:
            return residual_norm(x, y, gate, norm, scale, shift, rows=rows, impl="triton")[1]
        return layer_norm_modulate(x, norm, scale, shift, rows=rows, impl="triton")

    plain, out = run(False), run(True)
    assert torch.equal(out, plain)
    found = linear8.kept_rows(out)
    assert found is not None
    assert (found.shape, found.dtype) == (tuple(out.shape), dtype)
    same(found, *quantize_rows(plain, impl="triton"))
    if CUDA:
        linear_e4m3(out, *layer(48))
        assert quantised == []


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_of_an_activation(impl: str) -> None:
    x = 3 * random(2, 7, 200)
    rows = gelu_tanh_rows(x, impl=impl)
    assert (rows.shape, rows.dtype) == ((2, 7, 200), torch.float32)
    same(rows, *quantize_rows(gelu_tanh_(x.clone(), impl="torch"), impl="torch"))
    with pytest.raises(ValueError, match="x has 40000 channels"):
        gelu_tanh_rows(torch.empty(1, 40000, device=DEVICE), impl=impl)


def test_a_product_takes_rows_in_the_place_of_a_tensor() -> None:
    x, weight = random(2, 7, 96, dtype=torch.bfloat16), layer(96)
    rows = gelu_tanh_rows(x, impl="torch")
    out = linear_e4m3(rows, *weight, random(32, dtype=torch.bfloat16))
    assert (out.shape, out.dtype) == ((2, 7, 32), torch.bfloat16)
    exact = (rows.values.double() * rows.scale) @ (weight[0].double() * weight[1]).t() + random(32).bfloat16().double()
    assert float((out.double().reshape(-1, 32) - exact).norm() / exact.norm()) < 0.004


@pytest.mark.parametrize("op", ["quantize_rows", "gelu_tanh_rows", "residual_norm_rows"])
def test_each_operator_keeps_torch_s_rules(op: str) -> None:
    x, values = random(2, 5, 32), random(2, 1, 32, seed=2)
    terms = (x, x, values, None, values, values[0, 0], values, None, None, None, 1e-6, "layer")
    found = getattr(torch.ops.vmonarch_kernels, op).default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(found, terms if op == "residual_norm_rows" else (x,), test_utils=tests)


def test_what_cannot_be_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"x has 40000 channels; valid are up to 32768\."):
        quantize_rows(torch.empty(1, 40000, device=DEVICE))
    with pytest.raises(ImplUnavailable, match=r"the dtype is torch\.float64"):
        quantize_rows(random(2, 16).double(), impl="triton")
