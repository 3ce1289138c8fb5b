"""The fused operations of a block against float64, on odd shapes, strides and dtypes, and within torch.compile.

On a GPU the Triton kernels run as compiled code and in bfloat16 too; without one the same kernels run under Triton's
interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vmonarch_kernels import (
    HeadNorm,
    ImplUnavailable,
    Norm,
    Rotation,
    Term,
    gated_activation,
    gated_residual,
    gelu_tanh_,
    layer_norm_modulate,
    linear_gelu_tanh,
    qk_norm_rope,
    residual_norm,
    resolve_fused_impl,
)

launch_fused = pytest.importorskip("vmonarch_kernels.launch_fused")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter cuts bfloat16 off where a GPU rounds; there float16 stands for the low precisions.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
Run = Callable[[Any, str], tuple[Tensor, ...]]


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def check(run: Callable[[Callable[[Tensor], Tensor], str], tuple[Tensor | None, ...]], dtype: torch.dtype) -> None:
    """`run(cast, impl)` computes on tensors that `cast` has made: Triton within 1.5 times the eager error of a dtype,
    in float32, where both are a few roundings, within 3 times.
    """
    # All see the same numbers: rounding them first is no error of the operation.
    found = run(lambda x: x.to(dtype), "triton")
    eager = run(lambda x: x.to(dtype), "torch")
    expected = run(lambda x: x.to(dtype).double(), "torch")
    for one, other, exact in zip(found, eager, expected, strict=True):
        assert one is not None
        assert other is not None
        assert exact is not None
        assert one.dtype == dtype
        assert one.shape == exact.shape
        assert one.is_contiguous()
        factor = 3.0 if dtype == torch.float32 else 1.5
        assert relative_error(one, exact) <= factor * max(relative_error(other, exact), torch.finfo(dtype).eps / 4)


def rotation(tokens: int, dim: int, *, heads: int = 1, layout: str = "interleaved", batch: int = 1) -> Rotation:
    """Tables in float32, as models have them, whatever the tensors' dtype."""
    angles = 3 * random(batch, tokens, heads, dim // 2, seed=9).float()
    twice = angles.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat([angles, angles], -1)
    return Rotation(twice.cos(), twice.sin(), layout)  # type: ignore[arg-type]


# (batch, tokens, heads, D)
HEADS = [(1, 5, 2, 16), (2, 7, 3, 24), (1, 9, 5, 96)]


@pytest.mark.parametrize("per_head", [False, True], ids=["all heads", "each head"])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("size", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_rotation_of_q_and_k(
    dtype: torch.dtype, size: tuple[int, int, int, int], layout: str, per_head: bool
) -> None:
    batch, tokens, heads, dim = size
    turned = rotation(tokens, dim, layout=layout)

    def run(cast: Callable[[Tensor], Tensor], impl: str) -> tuple[Tensor | None, ...]:
        q, k, _ = cast(random(batch, tokens, 3 * heads * dim)).chunk(3, dim=-1)  # slices of one projection
        weights = [cast(1 + random(dim if per_head else heads * dim, seed=seed) / 4) for seed in (1, 2)]
        norm = HeadNorm(weights[0], weights[1], 1e-6, per_head)
        return qk_norm_rope(q, k, heads, norm=norm, rotation=turned, impl=impl)

    check(run, dtype)


@pytest.mark.parametrize("case", ["own tables", "a prompt behind", "no norm", "no rotation", "no weights", "q alone"])
def test_what_some_families_leave_out_or_have_of_their_own(case: str) -> None:
    batch, tokens, heads, dim = 2, 6, 3, 16
    norm: HeadNorm | None = HeadNorm(random(dim).float() + 2, random(dim, seed=4).float() + 2, 1e-6, per_head=True)
    turned: Rotation | None = rotation(tokens, dim)
    if case == "own tables":
        turned = rotation(tokens, dim, heads=heads, batch=batch)
    elif case == "a prompt behind":
        turned = rotation(tokens - 2, dim)
    elif case == "no norm":
        norm = None
    elif case == "no rotation":
        turned = None
    elif case == "no weights":
        norm = HeadNorm(None, None, 1e-6)

    def run(cast: Callable[[Tensor], Tensor], impl: str) -> tuple[Tensor | None, ...]:
        q, k = (cast(random(batch, tokens, heads * dim, seed=seed)) for seed in (1, 2))
        out, other = qk_norm_rope(q, None if case == "q alone" else k, heads, norm=norm, rotation=turned, impl=impl)
        assert (other is None) == (case == "q alone")
        return (out,) if other is None else (out, other)

    check(run, torch.float16)
    if case == "a prompt behind":
        x = random(batch, tokens, heads * dim).float()
        out, _ = qk_norm_rope(x, None, heads, rotation=turned, impl="triton")
        assert torch.equal(out[:, -2:].flatten(2), x[:, -2:])
        assert not torch.equal(out[:, :-2].flatten(2), x[:, :-2])


def test_the_rotation_is_that_of_diffusers() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    turned = rotation(6, 16)
    x = random(2, 6, 3, 16).float()
    expected = apply_rotary_emb(x, (turned.cos[0, :, 0], turned.sin[0, :, 0]), sequence_dim=1)
    for impl in ("torch", "triton"):
        out, _ = qk_norm_rope(x.flatten(2), None, 3, rotation=turned, impl=impl)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("of_tokens", [False, True], ids=["of samples", "of tokens"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_norm_and_modulation(dtype: torch.dtype, affine: bool, kind: str, of_tokens: bool) -> None:
    batch, tokens, channels = 2, 9, 40
    rows = tokens if of_tokens else 1
    values = random(batch, 6, rows, channels, seed=5).float() / 2
    table = random(6, channels, seed=6).float() / 2

    def run(cast: Callable[[Tensor], Tensor], impl: str) -> tuple[Tensor, ...]:
        # A stream that is a part of a longer one, a gradient-free y of other strides.
        x = cast(3 + random(batch, tokens + 3, channels))[:, 3:]
        y = cast(random(batch, channels, tokens, seed=2)).mT
        norm = Norm(1e-6, kind=kind)  # type: ignore[arg-type]
        if affine:
            norm = replace(norm, weight=cast(random(channels, seed=7)), bias=cast(random(channels, seed=8)))
        gate, scale, shift = (Term(values[:, i], table[i]) for i in range(3))
        plain = Term(values[:1, 0])  # one sample's for all, without a table
        return (
            layer_norm_modulate(x, norm, impl=impl),
            layer_norm_modulate(x, norm, scale, shift, impl=impl),
            gated_residual(x, y, gate, impl=impl),
            gated_residual(x, y, plain, impl=impl),
            gated_residual(x, y, impl=impl),
            *residual_norm(x, y, None, norm, impl=impl),
            *residual_norm(x, y, gate, norm, scale, shift, impl=impl),
        )

    check(run, dtype)


@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_programs_of_several_rows_end_with_the_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_fused, "ENOUGH_PROGRAMS", 2)  # rows of a program: 1, 2 and 8
    x, y = (random(1, tokens, 8, seed=seed).float() for seed in (1, 2))
    term = Term(random(1, 1, 8, seed=3).float())
    for found, expected in zip(
        residual_norm(x, y, term, Norm(1e-6), term, term, impl="triton"),
        residual_norm(x, y, term, Norm(1e-6), term, term, impl="torch"),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_without_a_sum_the_stream_itself_comes_back() -> None:
    x = random(1, 4, 8).float()
    for impl in ("torch", "triton"):
        assert residual_norm(x, None, None, Norm(1e-6), impl=impl)[0] is x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype: torch.dtype) -> None:
    def run(cast: Callable[[Tensor], Tensor], impl: str) -> tuple[Tensor, ...]:
        x = cast(3 * random(2, 5, 4100))
        gated = [gated_activation(x, kind, impl=impl) for kind in ("silu", "gelu", "gelu_tanh")]
        return *gated, gated_activation(x[..., ::2], "silu", impl=impl), gelu_tanh_(x, impl=impl)

    check(run, dtype)


def test_gelu_is_in_place_and_keeps_its_range() -> None:
    for impl in ("torch", "triton"):
        x = torch.tensor([[-60000.0, -10.0, 0.0, 10.0, 60000.0]], dtype=torch.float16, device=DEVICE)
        assert gelu_tanh_(x, impl=impl) is x
        assert x.tolist() == [[0.0, 0.0, 0.0, 10.0, 60000.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_a_linear_layer(dtype: torch.dtype) -> None:
    """With the product on a GPU, in its tanh form everywhere; rows of any strides."""

    def run(cast: Callable[[Tensor], Tensor], impl: str) -> tuple[Tensor, ...]:
        x, weight, bias = (cast(random(*size, seed=1)) for size in ((2, 37, 64), (144, 64), (144,)))
        outs = (
            linear_gelu_tanh(x, weight, bias, impl=impl),
            linear_gelu_tanh(x[:, ::3], weight, bias, impl=impl),
            linear_gelu_tanh(x[0, :1], weight, None, impl=impl),
        )
        assert all(out.is_contiguous() for out in outs)
        return outs

    check(run, dtype)


def test_gelu_of_a_linear_layer_has_gradients_where_they_are_wanted() -> None:
    x, weight = random(1, 3, 8).float(), random(16, 8).float().requires_grad_()
    linear_gelu_tanh(x, weight, None).sum().backward()
    assert weight.grad is not None
    with pytest.raises(ImplUnavailable, match="a gradient is wanted"):
        linear_gelu_tanh(x, weight, None, impl="triton")


def test_a_video_of_no_samples_is_no_error() -> None:
    empty = torch.empty(0, 4, 8, device=DEVICE)
    assert gelu_tanh_(empty, impl="triton").shape == (0, 4, 8)
    assert linear_gelu_tanh(empty, torch.empty(6, 8, device=DEVICE), None, impl="triton").shape == (0, 4, 6)
    assert gated_activation(empty, "silu", impl="triton").shape == (0, 4, 4)
    assert gated_residual(empty, empty, impl="triton").shape == (0, 4, 8)
    assert qk_norm_rope(empty, None, 2, impl="triton")[0].shape == (0, 4, 2, 4)


def test_long_videos_are_within_the_limits_of_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes 2^31 - 1 programs on a grid's first axis and 65,535 on each other one."""
    grids: list[tuple[int, ...]] = []

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *arguments, **constants: None

    for name in ("qk_norm_rope_kernel", "residual_norm_kernel", "gelu_tanh_kernel", "gated_activation_kernel"):
        monkeypatch.setattr(launch_fused.kernels, name, Launched())
    x = torch.empty(2, 600_000, 256, device="meta")
    launch_fused.qk_norm_rope(x, x, 2, None, None)
    launch_fused.residual_norm(x, x, None, Norm(1e-6), None, None)
    launch_fused.gelu_tanh_(x)
    launch_fused.gated_activation(x, "silu")
    assert len(grids) == 4
    assert all(first < 2**31 and max(others, default=1) <= 65_535 for first, *others in grids)


# What runs


def test_the_implementation_is_that_of_the_device() -> None:
    assert resolve_fused_impl("auto", DEVICE, torch.bfloat16) == ("triton" if CUDA else "torch")
    assert resolve_fused_impl("auto", DEVICE, torch.float64) == "torch"
    assert resolve_fused_impl("triton", DEVICE, torch.float16) == "triton"
    with pytest.raises(ImplUnavailable, match=r"float64 and the kernels take bfloat16, float16 or float32"):
        resolve_fused_impl("triton", DEVICE, torch.float64)
    with pytest.raises(ValueError, match=r"impl is 'fast'; valid are auto, torch, triton"):
        resolve_fused_impl("fast", DEVICE, torch.float32)


def test_a_cpu_without_the_interpreter_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplUnavailable, match="the tensors are on the CPU"):
        resolve_fused_impl("triton", "cpu", torch.float32)


def test_where_a_gradient_is_wanted_the_eager_operations_run() -> None:
    x, y = (random(1, 3, 8, seed=seed).float().requires_grad_() for seed in (1, 2))
    with pytest.raises(ImplUnavailable, match="a gradient is wanted"):
        gated_residual(x, y, impl="triton")
    total, out = residual_norm(x, y, None, Norm(1e-6), impl="auto")
    (total.sum() + out.square().sum()).backward()
    assert x.grad is not None
    assert y.grad is not None
    with torch.no_grad():
        gated_residual(x, y, impl="triton")


STREAM, HEAD = torch.zeros(2, 3, 8), torch.zeros(8)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "heads": (lambda: qk_norm_rope(STREAM, None, 3), r"q is \(2, 3, 8\); valid is \(B, N, heads \* D\) with 3 heads"),
    "k": (lambda: qk_norm_rope(STREAM, STREAM[:1], 2), r"k is \(1, 3, 8\) in torch.float32; valid is q's \(2, 3, 8\)"),
    "weight": (
        lambda: qk_norm_rope(STREAM, None, 2, norm=HeadNorm(HEAD, None, 1e-6, per_head=True)),
        r"weight_q is \(8,\); valid is \(4,\)",
    ),
    "table": (
        lambda: qk_norm_rope(STREAM, None, 2, rotation=Rotation(torch.zeros(1, 4, 1, 4), torch.zeros(1, 4, 1, 4))),
        r"cos is \(1, 4, 1, 4\); valid is \(1 or 2, up to 3 tokens, 1 or 2, 4\)",
    ),
    "layout": (
        lambda: qk_norm_rope(STREAM, None, 2, rotation=Rotation(STREAM, STREAM, "pairs")),  # type: ignore[arg-type]
        "layout is 'pairs'; valid are interleaved, half",
    ),
    "y": (lambda: gated_residual(STREAM, STREAM[:, :2]), r"y is \(2, 2, 8\); valid is x's \(2, 3, 8\)"),
    "gate": (
        lambda: gated_residual(STREAM, STREAM, Term(torch.zeros(2, 2, 8))),
        r"gate is \(2, 2, 8\); valid is \(1 or 2, 1 or 3, 8\)",
    ),
    "gate's table": (
        lambda: gated_residual(STREAM, STREAM, Term(STREAM, torch.zeros(6, 8))),
        r"the table of gate is \(6, 8\); valid is \(8,\)",
    ),
    "gate alone": (lambda: residual_norm(STREAM, None, Term(STREAM), Norm(1e-6)), "gate came without y"),
    "scale alone": (lambda: layer_norm_modulate(STREAM, Norm(1e-6), Term(STREAM)), "one of scale and shift is None"),
    "two kinds": (
        lambda: layer_norm_modulate(STREAM, Norm(1e-6), Term(STREAM), Term(STREAM[:, :1])),
        "one of scale and shift is a sample's",
    ),
    "bias": (lambda: layer_norm_modulate(STREAM, Norm(1e-6, HEAD, HEAD[1:])), r"bias is \(7,\); valid is \(8,\)"),
    "kind": (lambda: gated_activation(STREAM, "relu"), "kind is 'relu'; valid are silu, gelu, gelu_tanh"),  # type: ignore[arg-type]
    "odd": (lambda: gated_activation(STREAM[..., 1:], "silu"), "x has 7 channels; valid is an even number"),
    "strides": (lambda: gelu_tanh_(STREAM.mT), r"x has strides \(24, 1, 8\) for shape \(2, 8, 3\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()


# Within torch.compile


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_all_of_them_compile_into_one_graph(impl: str) -> None:
    batch, tokens, heads, dim = 1, 6, 2, 16
    width = heads * dim
    weight, turned = random(width, seed=3).float(), rotation(tokens, dim)
    values = random(batch, 3, width, seed=4).float()

    def block(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        gate, scale, shift = (Term(value) for value in values.chunk(3, dim=1))
        total, out = residual_norm(x, y, gate, Norm(1e-6), scale, shift, impl=impl)
        q, k = qk_norm_rope(out, y, heads, norm=HeadNorm(weight, None, 1e-6), rotation=turned, impl=impl)
        inner = gelu_tanh_(torch.cat([out, out], dim=-1), impl=impl)
        inner = inner + linear_gelu_tanh(out, inner[0, :1].expand(2 * width, -1)[:, :width], None, impl=impl)
        assert k is not None
        return total, q, k, gated_residual(total, gated_activation(inner, "silu", impl=impl), gate, impl=impl)

    x, y = (random(batch, tokens, width, seed=seed).float() for seed in (1, 2))
    with torch.no_grad():
        expected = block(x, y)
        compiled = torch.compile(block, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
        for found, wanted in zip(compiled(x, y), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["qk_norm_rope", "residual_norm", "gated_residual", "gelu_tanh_", "gated_activation"])
def test_each_operator_keeps_torch_s_rules(op: str) -> None:
    """Schema, fake kernel and mutation, as torch.library's own check has it."""
    x, y, values = random(2, 5, 32).float(), random(2, 5, 32, seed=1).float(), random(2, 1, 32, seed=2).float()
    table = rotation(5, 16)
    arguments: dict[str, tuple[Any, ...]] = {
        "qk_norm_rope": (x, y, values[0, 0], None, table.cos, table.sin, 2, 1e-6, False, "interleaved"),
        "residual_norm": (x, y, values, None, values, values[0, 0], values, None, None, None, 1e-6, "layer"),
        "gated_residual": (x, y, values, None),
        "gelu_tanh_": (x,),
        "gated_activation": (x, "silu"),
    }
    found = getattr(torch.ops.vmonarch_kernels, op).default
    torch.library.opcheck(found, arguments[op], test_utils=("test_schema", "test_faketensor"))
