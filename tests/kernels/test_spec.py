"""One call is written down once: the flat call and the spec are the same call, field by field."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from vmonarch_kernels import Inputs, Options, attend, monarch_attention
from vmonarch_kernels.api import IMPLS

GRID = (4, 2, 3)
OTHER = {"num_steps": 1, "c_floor": 0.9, "first_frame": False, "band": 0, "scale": 0.7}


def inputs() -> Inputs:
    """A call that has every tensor there is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, out = (torch.randn(2, 24, 2, 16, generator=generator) for _ in range(4))
    lse = torch.randn(2, 24, 2, generator=generator)
    values = torch.randn(2, 24, 2, 16, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 6, 2, 4, generator=generator)
    _, l_prev = monarch_attention(k, q, v, GRID, impl="torch", return_l=True)
    return Inputs(q, k, v, GRID, l_prev, (out, lse), (values, scale))


def test_the_alternatives_name_every_option() -> None:
    assert list(OTHER) == [field.name for field in fields(Options)]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", [None, *OTHER])
def test_the_flat_call_is_the_spec(impl: str, name: str | None) -> None:
    call, plain = inputs(), Options()
    options = plain if name is None else replace(plain, **{name: OTHER[name]})  # type: ignore[arg-type]
    out, factor = attend(call, options, impl=impl, return_l=True)
    tensors = {"l_prev": call.l_prev, "extra": call.extra, "residual": call.residual}
    chosen = {} if name is None else {name: OTHER[name]}
    flat = monarch_attention(  # type: ignore[call-overload]
        call.q, call.k, call.v, GRID, impl=impl, return_l=True, **tensors, **chosen
    )
    assert torch.equal(out, flat[0])
    assert factor is not None
    assert torch.equal(factor.float(), flat[1].float())
    if name is not None:
        assert not torch.equal(out, attend(call, plain, impl=impl)[0]), "the option reaches the implementation"


@pytest.mark.parametrize("name", ["l_prev", "extra", "residual"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_every_tensor_reaches_the_implementation(impl: str, name: str) -> None:
    call = inputs()
    with_all, _ = attend(call, impl=impl)
    without, _ = attend(replace(call, **{name: None}), impl=impl)
    assert not torch.equal(with_all, without)


def test_l_comes_only_where_it_is_wanted() -> None:
    assert attend(inputs(), impl="torch")[1] is None


@pytest.mark.parametrize("impl", IMPLS)
def test_an_implementation_called_by_name_handles_exact_structures(impl: str) -> None:
    call = inputs()
    found, factor = IMPLS[impl](replace(call, l_prev=None, residual=None), Options(band=3), True)
    expected, _ = IMPLS["reference"](replace(call, l_prev=None, residual=None), Options(band=3), False)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert factor is not None
    assert not factor.float().any()


def test_triton_is_imported_by_its_first_call_alone() -> None:
    code = (
        "import sys, torch, vmonarch_kernels as vk\n"
        "from vmonarch_kernels.api import IMPLS\n"
        "q = torch.randn(1, 6, 1, 16)\n"
        "vk.monarch_attention(q, q, q, (3, 1, 2), impl='torch')\n"
        "sys.exit('vmonarch_kernels.launch' in sys.modules or 'vmonarch_kernels._triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
