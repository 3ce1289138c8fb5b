"""Every implementation against the float64 reference, on odd shapes, strides and dtypes.

On a GPU the Triton kernels run as compiled code and the shapes grow; without one the same
kernels run under Triton's interpreter on small shapes.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vmonarch_kernels import (
    Factors,
    ImplUnavailable,
    Inputs,
    Options,
    attention_lse,
    dense_attention,
    monarch_attention,
    monarch_factors,
    resolve_impl,
)
from vmonarch_kernels.spec import Grid
from vmonarch_kernels.structure import L_SCALE

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
IMPLS = ("torch", "triton")
# The interpreter multiplies bfloat16 wrongly; there float16 stands for the low precisions.
LOW = torch.bfloat16 if CUDA else torch.float16


@dataclass(frozen=True)
class Shape:
    """A problem: grid, heads, head dimension, batch."""

    grid: tuple[int, int, int]
    heads: int = 2
    head_dim: int = 16
    batch: int = 1

    @property
    def size(self) -> tuple[int, int, int, int]:
        frames, height, width = self.grid
        return self.batch, frames * height * width, self.heads, self.head_dim

    def __str__(self) -> str:
        return "x".join(map(str, (*self.grid, self.heads, self.head_dim, self.batch)))


SMALL = [
    Shape((2, 3, 5)),
    Shape((3, 1, 17), heads=1, head_dim=24, batch=2),
    Shape((7, 1, 1), heads=3),
    Shape((13, 2, 2), heads=1, head_dim=64),
    Shape((70, 1, 2), heads=1),
]
LARGE = [
    Shape((frames, 1, positions), head_dim=head_dim)
    for frames, positions, head_dim in [
        (2, 257, 64),
        (7, 15, 96),
        (7, 1456, 128),
        (13, 144, 64),
        (13, 257, 256),
        (21, 251, 128),
        (81, 15, 64),
        (81, 257, 128),
        (129, 1, 128),
        (129, 31, 96),
        (256, 15, 128),
        (256, 257, 64),
    ]
] + [Shape((13, 10, 10), heads=3, head_dim=128, batch=3)]
SHAPES = SMALL + (LARGE if CUDA else [])
OPTIONS = [
    {"num_steps": 2},
    {"num_steps": 1, "first_frame": False},
    {"num_steps": 3},
    {"num_steps": 2, "band": 0},
    {"num_steps": 1, "band": 1},
    {"num_steps": 2, "band": 2, "first_frame": False},
]


def inputs(shape: Shape, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape.size, generator=generator).to(DEVICE, dtype) for _ in range(3)]


def factors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    compute_dtype: torch.dtype = torch.float64,
    **rest: Any,
) -> Factors:
    """The reference with the arguments of ``monarch_attention``."""
    tensors = {name: rest.pop(name) for name in ("l_prev", "extra", "residual") if name in rest}
    return monarch_factors(Inputs(q, k, v, grid, **tensors), Options(**rest), compute_dtype=compute_dtype)


def relative_error(value: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((value.double() - expected).norm() / expected.norm())


def budget(qkv: list[Tensor], expected: Tensor, grid: tuple[int, int, int], **options: object) -> float:
    """1.5 times the error that the eager algorithm makes in the inputs' own precision.

    In float32 both errors are a few roundings, so their ratio says little: there it is tripled.
    """
    eager = factors(*qkv, grid, compute_dtype=qkv[0].dtype, **options).out
    factor = 3.0 if qkv[0].dtype == torch.float32 else 1.5
    return factor * max(relative_error(eager, expected), torch.finfo(qkv[0].dtype).eps / 4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_float32_matches_the_float64_reference(impl: str, shape: Shape, options: dict[str, int]) -> None:
    qkv = inputs(shape, torch.float32)
    expected = factors(*qkv, shape.grid, **options).out
    out = monarch_attention(*qkv, shape.grid, impl=impl, **options)  # type: ignore[call-overload]
    assert relative_error(out, expected) <= budget(qkv, expected, shape.grid, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_low_precision_stays_within_the_eager_error(impl: str, shape: Shape, dtype: torch.dtype) -> None:
    if impl == "triton" and dtype is torch.bfloat16 and not CUDA:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly; this case runs on a GPU")
    qkv = inputs(shape, dtype)
    for options in ({"num_steps": 2}, {"num_steps": 1, "band": 1}):
        expected = factors(*qkv, shape.grid, **options).out
        out = monarch_attention(*qkv, shape.grid, impl=impl, **options)  # type: ignore[call-overload]
        assert out.dtype is dtype
        assert relative_error(out, expected) <= budget(qkv, expected, shape.grid, **options)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("band", [None, 0, 1])
def test_warm_start_continues_from_the_returned_factor(impl: str, band: int | None) -> None:
    shape = Shape((6, 2, 3), batch=2)
    first, second = inputs(shape, torch.float32), inputs(shape, torch.float32, seed=1)
    _, factor = monarch_attention(*first, shape.grid, band=band, impl=impl, return_l=True)
    expected_l = factors(*first, shape.grid, band=band).L.permute(0, 4, 1, 2, 3)
    assert (factor.double() / L_SCALE - expected_l).abs().max() <= 1 / 32  # half a step of e4m3 below one
    options = {"num_steps": 1, "band": band, "l_prev": factor}
    expected = factors(*second, shape.grid, **options).out
    warm = monarch_attention(*second, shape.grid, impl=impl, **options)  # type: ignore[call-overload]
    cold = monarch_attention(*second, shape.grid, impl=impl, num_steps=1, band=band)
    assert relative_error(warm, expected) < 1e-6
    assert relative_error(cold, expected) > 1e-3


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_small_entries_of_a_stored_factor_keep_their_digits(impl: str) -> None:
    shape = Shape((150, 1, 2), heads=1)
    q, k, v = inputs(shape, torch.float32)
    qkv = (0.4 * q, 0.4 * k, v)  # every key frame weighs about 1 / 150
    _, factor = monarch_attention(*qkv, shape.grid, impl=impl, return_l=True)
    expected = factors(*qkv, shape.grid).L.permute(0, 4, 1, 2, 3)
    assert relative_error(factor.double() / L_SCALE, expected) < 0.04  # 0.09 where L itself is stored


@pytest.mark.parametrize("frames", [65, 130])
@pytest.mark.parametrize("impl", IMPLS)
def test_warm_start_with_tiled_key_frames(impl: str, frames: int) -> None:
    shape = Shape((frames, 1, 2), heads=1)
    qkv = inputs(shape, torch.float32)
    _, factor = monarch_attention(*qkv, shape.grid, band=1, impl=impl, return_l=True)
    options = {"num_steps": 1, "band": 1, "l_prev": factor}
    expected = factors(*qkv, shape.grid, **options).out
    out = monarch_attention(*qkv, shape.grid, impl=impl, **options)  # type: ignore[call-overload]
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("frames", [21, 40, 70])  # each has tiles of its own in 16 bits
@pytest.mark.parametrize("impl", IMPLS)
def test_warm_start_in_16_bits(impl: str, frames: int) -> None:
    shape = Shape((frames, 1, 3), heads=1, head_dim=128)
    qkv = inputs(shape, LOW)
    options = {"num_steps": 1, "band": 0, "first_frame": False}
    _, factor = monarch_attention(*qkv, shape.grid, impl=impl, return_l=True, **options)  # type: ignore[call-overload]
    expected = factors(*qkv, shape.grid, l_prev=factor, **options).out
    out = monarch_attention(*qkv, shape.grid, impl=impl, l_prev=factor, **options)  # type: ignore[call-overload]
    assert relative_error(out, expected) < 1e-2


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_a_stored_factor_is_taken_in_any_layout(impl: str) -> None:
    shape = Shape((5, 2, 3), batch=2)
    qkv = inputs(shape, torch.float32)
    _, factor = monarch_attention(*qkv, shape.grid, impl=impl, return_l=True)
    packed, turned = factor.contiguous(), factor.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert len({factor.stride(), packed.stride(), turned.stride()}) == 3
    outs = [monarch_attention(*qkv, shape.grid, impl=impl, num_steps=1, l_prev=x) for x in (factor, packed, turned)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_one_frame_is_exactly_dense_attention(impl: str) -> None:
    shape = Shape((1, 3, 5), batch=2)
    q, k, v = inputs(shape, torch.float32)
    out = monarch_attention(q, k, v, shape.grid, impl=impl)
    dense = dense_attention(q, k, v)
    if impl == "reference":
        assert relative_error(out, dense) < 1e-6
    else:
        assert torch.equal(out, dense)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_one_position_per_frame_is_dense_attention(impl: str) -> None:
    """P = 1: R is one, so L alone is the whole attention matrix."""
    shape = Shape((9, 1, 1), batch=2)
    q, k, v = inputs(shape, torch.float32)
    out = monarch_attention(q, k, v, shape.grid, impl=impl, first_frame=False)
    assert relative_error(out, dense_attention(q, k, v)) < 1e-6


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_a_band_over_all_frames_is_dense_attention(impl: str) -> None:
    shape = Shape((5, 2, 3))
    q, k, v = inputs(shape, torch.float32)
    out = monarch_attention(q, k, v, shape.grid, impl=impl, band=4)
    assert relative_error(out, dense_attention(q, k, v)) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_a_wider_band_is_closer_to_dense(impl: str) -> None:
    shape = Shape((7, 2, 4))
    q, k, v = inputs(shape, torch.float32)
    q = q * 2
    dense = dense_attention(q, k, v)
    errors = [
        relative_error(monarch_attention(q, k, v, shape.grid, impl=impl, band=band), dense) for band in (None, 0, 1, 2)
    ]
    assert errors == sorted(errors, reverse=True)


def text_part(q: Tensor, tokens: int = 5) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Keys and values of a prompt, and every query's exact attention over them."""
    generator = torch.Generator().manual_seed(7)
    shape = (q.shape[0], tokens, *q.shape[2:])
    k, v = (torch.randn(shape, generator=generator).to(q) for _ in range(2))
    out, lse = attention_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=q.shape[-1] ** -0.5)
    return k, v, (out.transpose(1, 2), lse.transpose(1, 2))


@pytest.mark.parametrize("band", [4, None])
@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_an_extra_part_joins_the_softmax_exactly(impl: str, band: int | None) -> None:
    """Where the video part is exact (a full band; frame 0), video and prompt together are dense attention."""
    shape = Shape((5, 2, 3), batch=2)
    q, k, v = inputs(shape, torch.float32)
    text_k, text_v, extra = text_part(q)
    dense = dense_attention(q, torch.cat([k, text_k], 1), torch.cat([v, text_v], 1))
    rows = slice(None) if band is not None else slice(0, 6)
    out = monarch_attention(q, k, v, shape.grid, impl=impl, band=band, extra=extra)
    assert relative_error(out[:, rows], dense[:, rows]) < 1e-6
    alone = monarch_attention(q, k, v, shape.grid, impl=impl, band=band)
    assert relative_error(alone[:, rows], dense[:, rows]) > 1e-2


@pytest.mark.parametrize("band", [None, 0, 1])
@pytest.mark.parametrize("impl", IMPLS)
def test_an_extra_part_matches_the_reference(impl: str, band: int | None) -> None:
    shape = Shape((6, 1, 4))
    q, k, v = inputs(shape, torch.float32)
    _, _, extra = text_part(q)
    expected = factors(q, k, v, shape.grid, band=band, extra=extra).out
    out = monarch_attention(q, k, v, shape.grid, impl=impl, band=band, extra=extra)
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("band", [0, 2])
@pytest.mark.parametrize("shape", [Shape((5, 1, 35), head_dim=24, batch=2), Shape((4, 3, 11), heads=3)], ids=str)
def test_the_band_joins_an_extra_part_as_exactly_as_the_eager_algorithm(shape: Shape, band: int) -> None:
    """In 16 bit, with prompts of several lengths: one sample's extra part is empty for a head."""
    qkv = inputs(shape, LOW)
    _, _, (text, lse) = text_part(qkv[0].float(), tokens=9)
    lse = lse.masked_fill((torch.arange(lse.shape[2], device=DEVICE) == 0) & (lse > -1e9), float("-inf"))
    extra = text.to(LOW).transpose(1, 2).contiguous().transpose(1, 2), lse  # heads first, as attention returns it
    wide = [x.double() for x in qkv]
    truth = monarch_attention(
        *wide, shape.grid, impl="reference", band=band, extra=(extra[0].double(), extra[1].double())
    )
    errors = {
        impl: relative_error(monarch_attention(*qkv, shape.grid, impl=impl, band=band, extra=extra).double(), truth)
        for impl in IMPLS
    }
    assert errors["triton"] <= max(1.5 * errors["torch"], 1e-3)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_an_empty_extra_part_changes_nothing(impl: str) -> None:
    shape = Shape((4, 1, 3))
    q, k, v = inputs(shape, torch.float32)
    nothing = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), device=q.device)
    for band in (None, 1):
        out = monarch_attention(q, k, v, shape.grid, impl=impl, band=band, extra=nothing)
        assert relative_error(out, monarch_attention(q, k, v, shape.grid, impl=impl, band=band)) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_first_frame_is_exact(impl: str) -> None:
    shape = Shape((4, 3, 3), batch=2)
    q, k, v = inputs(shape, torch.float32)
    dense = dense_attention(q, k, v)[:, :9]
    for band in (None, 0):
        out = monarch_attention(q, k, v, shape.grid, impl=impl, band=band)[:, :9]
        assert relative_error(out, dense) < 1e-6
        blurred = monarch_attention(q, k, v, shape.grid, impl=impl, band=band, first_frame=False)
        assert relative_error(blurred[:, :9], dense) > 1e-3


def test_split_keys_of_the_first_frame_are_merged_exactly() -> None:
    """From 2,048 tokens on the Triton path divides the first frame's keys over programs."""
    shape = Shape((33, 2, 32), heads=2)
    qkv = inputs(shape, torch.float32)
    out = monarch_attention(*qkv, shape.grid, num_steps=1, impl="triton")
    assert relative_error(out[:, :64], dense_attention(*qkv)[:, :64]) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_are_taken_as_they_come(impl: str) -> None:
    shape = Shape((3, 2, 3), batch=2)
    batch, tokens, heads, dim = shape.size
    fused = torch.randn(batch, tokens, 3, heads, dim, device=DEVICE)
    heads_first = torch.randn(batch, heads, tokens, dim, device=DEVICE).transpose(1, 2)
    column_major = torch.randn(batch, tokens, dim, heads, device=DEVICE).transpose(2, 3)
    strided = (fused[:, :, 0], heads_first, column_major)
    plain = [x.contiguous() for x in strided]
    for band in (None, 0):
        out = monarch_attention(*strided, shape.grid, impl=impl, band=band)
        assert out.is_contiguous()
        expected = monarch_attention(*plain, shape.grid, impl=impl, band=band)
        assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("band", [None, 1])
def test_memory_around_and_before_the_call_does_not_leak_in(impl: str, band: int | None) -> None:
    """NaN beside the inputs and in freshly freed memory must not reach the output."""
    shape = Shape((5, 1, 7), head_dim=24)
    batch, tokens, heads, dim = shape.size
    poisoned = torch.full((batch, tokens + 40, heads, dim + 8), float("nan"), device=DEVICE)
    window = poisoned[:, 20 : 20 + tokens, :, :dim]
    window.copy_(torch.randn(shape.size, device=DEVICE))
    q = k = v = window
    for size in (shape.size, (batch, heads, tokens), (batch, tokens // 5, heads, 5, 5)):
        garbage = [torch.full(size, float("nan"), device=DEVICE) for _ in range(4)]
        del garbage
    out = monarch_attention(q, k, v, shape.grid, impl=impl, band=band)
    expected = factors(q, k, v, shape.grid, band=band).out
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("band", [None, 1])
def test_a_constant_added_to_every_key_changes_nothing(impl: str, band: int | None) -> None:
    """q . (k + c) shifts each query's logits by a constant, which softmax forgets."""
    shape = Shape((4, 2, 3))
    q, k, v = inputs(shape, torch.float32)
    plain = monarch_attention(q, k, v, shape.grid, impl=impl, band=band)
    shifted = monarch_attention(q, k + 2.0, v, shape.grid, impl=impl, band=band)
    assert relative_error(shifted, plain) < 1e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_stay_finite(impl: str) -> None:
    shape = Shape((3, 2, 3))
    q, k, v = inputs(shape, torch.float32)
    expected = factors(q * 60, k * 60, v, shape.grid).out
    out = monarch_attention(q * 60, k * 60, v, shape.grid, impl=impl)
    assert torch.isfinite(out).all()
    assert relative_error(out, expected) < 1e-2


@pytest.mark.parametrize("band", [None, 0, 1])
def test_factors_are_stochastic_and_rebuild_the_output(band: int | None) -> None:
    shape = Shape((5, 2, 3), batch=2)
    q, k, v = inputs(shape, torch.float64)
    found = factors(q, k, v, shape.grid, band=band, first_frame=False)
    assert torch.allclose(found.L.sum(3) + found.L_exact, torch.ones_like(found.L_exact))
    assert torch.allclose(found.R.sum(-1), torch.ones_like(found.R[..., 0]))
    if band is None:
        dense_matrix = torch.einsum("bhlkj,bhkji->bhljki", found.L, found.R).flatten(2, 3).flatten(3)
        rebuilt = (dense_matrix @ v.transpose(1, 2)).transpose(1, 2)
        assert torch.allclose(rebuilt, found.out)


def test_entropy_identity() -> None:
    """sum R log R = beta . R K - lse (the identity of kernels/README.md), in float64."""
    generator = torch.Generator().manual_seed(0)
    beta, keys = (torch.randn(7, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = beta @ keys.T
    R = scores.softmax(-1)
    direct = torch.special.xlogy(R, R).sum(-1)
    identity = (beta * (R @ keys)).sum(-1) - scores.logsumexp(-1)
    assert (direct - identity).abs().max() < 1e-13


@pytest.mark.parametrize("impl", IMPLS)
def test_compile_sees_one_node(impl: str) -> None:
    shape = Shape((3, 2, 3))
    q, k, v = inputs(shape, torch.float32)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return monarch_attention(q * 1.0, k, v, shape.grid, impl=impl) + 1.0

    nodes: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(layer, backend=record, fullgraph=True)
    assert relative_error(compiled(q, k, v), layer(q, k, v)) < 1e-6
    assert sum("monarch_attention" in node for node in nodes) == 1


def test_custom_op_is_well_formed() -> None:
    shape = Shape((3, 2, 2))
    q, k, v = inputs(shape, torch.float32)
    op = torch.ops.vmonarch_kernels.monarch_attention.default
    for band, return_l in itertools.product((None, 0), (False, True)):
        args = (q, k, v, *[None] * 5, list(shape.grid), 2, 0.1, True, band, 0.25, "torch", return_l)
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_auto_reports_its_choice() -> None:
    chosen = resolve_impl("auto", DEVICE, LOW, 64)
    assert chosen == ("triton" if CUDA else "torch")
    assert resolve_impl("auto", "cpu", torch.float64, 64) == "torch"


def test_an_implementation_that_cannot_run_says_why() -> None:
    with pytest.raises(ImplUnavailable, match="head dimension is 512 and the kernels take 16 to 256"):
        resolve_impl("triton", DEVICE, LOW, 512)
    with pytest.raises(ImplUnavailable, match="float64"):
        resolve_impl("triton", DEVICE, torch.float64, 64)


def test_triton_on_a_cpu_without_the_interpreter_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplUnavailable, match="TRITON_INTERPRET=1 is not set"):
        resolve_impl("triton", "cpu", torch.float32, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"grid": (2, 3, 4)}, r"grid is \(2, 3, 4\) for 18 tokens; T \* H \* W must equal the tokens"),
        ({"num_steps": 0}, "num_steps is 0; valid are integers from 1"),
        ({"c_floor": 0.0}, "c_floor is 0.0; valid are numbers above 0 and up to 1"),
        ({"band": -1}, "band is -1; valid are None and integers from 0"),
        ({"impl": "cuda"}, "impl is 'cuda'; valid are auto, reference, torch, triton"),
        ({"l_prev": torch.zeros(1, device=DEVICE)}, r"l_prev is \(1,\) torch.float32; these tensors need"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_name_what_came_and_what_is_valid(change: dict[str, object], sentence: str) -> None:
    shape = Shape((3, 2, 3))
    arguments = {"grid": shape.grid, **change}
    with pytest.raises(ValueError, match=sentence):
        monarch_attention(*inputs(shape, torch.float32), **arguments)  # type: ignore[call-overload]


def test_mismatched_tensors_are_refused() -> None:
    q, k, v = inputs(Shape((3, 2, 3)), torch.float32)
    with pytest.raises(ValueError, match="they must share one shape"):
        monarch_attention(q, k[:, :-1], v, (3, 2, 3))
    with pytest.raises(ValueError, match="they must share one dtype"):
        monarch_attention(q, k.half(), v, (3, 2, 3))
