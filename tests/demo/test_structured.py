"""Half of a training batch with the library's Monarch attention: values, gradients, and the half that stays dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from vmonarch_cli.demo.training.structured import (
    HalfStructured,
    halve_attention,
    settled_attention,
    warm_without_turns,
)
from vmonarch_cli.presets import load_preset
from vmonarch_kernels import Inputs, Options, attend

GRID = (5, 2, 3)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def qkv(*shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def settled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One iteration from the L of two others, own frame and first frame exact."""
    _, start = attend(Inputs(q, k, v, GRID), Options(2, band=0), impl="reference", return_l=True)
    assert start is not None
    return attend(Inputs(q, k, v, GRID, start.detach()), Options(1, band=0), impl="reference")[0]


def paper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(Inputs(q, k, v, GRID), Options(2), impl="reference")[0]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize(
    ("rows", "kind"), [(slice(4), dense), (slice(4, 6), paper), (slice(6, 8), settled)], ids=lambda x: str(x)[:12]
)
def test_parts_of_a_batch_have_values_and_gradients_of_their_kind(
    rows: slice, kind: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    tensors = qkv(8, 5 * 6, 3, 16)
    weights = torch.randn(8, 5 * 6, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = HalfStructured(frames=5).attend(*tensors)
    expected = kind(*(x[rows] for x in tensors))
    torch.testing.assert_close(found[rows], expected)
    gradients = torch.autograd.grad((found[rows] * weights[rows]).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights[rows]).sum(), tensors)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert other[rows].abs().max() > 0


def test_turned_off_the_whole_batch_is_dense() -> None:
    tensors, half = qkv(3, 5 * 6, 3, 16), HalfStructured(frames=5)
    half.on = False
    torch.testing.assert_close(half.attend(*tensors), dense(*tensors))


def test_the_l_that_a_settled_call_starts_from_is_a_constant() -> None:
    """Its gradient is that of the warm call alone, not that of all iterations from cold."""
    tensors = qkv(1, 5 * 6, 3, 16)
    fast = warm_without_turns(load_preset("fast"))
    warm = torch.autograd.grad(settled_attention(*tensors, GRID, fast).square().sum(), tensors)
    whole, _ = attend(Inputs(*tensors, GRID), Options(3, band=0), impl="reference")
    cold = torch.autograd.grad(whole.square().sum(), tensors)
    assert all(((a - b).norm() / b.norm()) > 0.02 for a, b in zip(warm[:2], cold[:2], strict=True))


@pytest.mark.parametrize("frames", [1, 2])
def test_the_shortest_clips(frames: int) -> None:
    """One latent frame is dense in all parts. Of two, the other one's R serves a single query frame: exact, too."""
    q, k, v = (x.detach() for x in qkv(4, frames * 6, 2, 16))
    same = torch.isclose(HalfStructured(frames).attend(q, k, v), dense(q, k, v)).flatten(1).all(1)
    assert same.tolist() == [True, True, frames == 1, True]


def test_triton_and_torch_agree() -> None:
    """On a GPU compiled, elsewhere in Triton's interpreter."""
    found = {}
    for impl in ("torch", "triton"):
        tensors = qkv(4, 3 * 6, 2, 16, dtype=torch.float32, device=DEVICE)
        out = HalfStructured(frames=3, impl=impl).attend(*tensors)
        found[impl] = (out, *torch.autograd.grad(out.square().sum(), tensors))
    for one, other in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_autocast_leaves_the_librarys_precision_alone() -> None:
    """Under autocast its products in float32 would be rounded to 16 bits."""
    q, k, v = (x.detach() for x in qkv(4, 5 * 6, 3, 16, dtype=torch.bfloat16))
    expected = HalfStructured(frames=5).attend(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = HalfStructured(frames=5).attend(q, k, v)
    assert torch.equal(found, expected)


def tiny_transformer() -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, ffn_dim=16,
        num_layers=2,
    )  # fmt: skip
    latents = torch.randn(2, 4, 3, 8, 8).repeat(2, 1, 1, 1, 1)
    return transformer, (latents, torch.full((4,), 500.0), torch.randn(1, 3, 8).repeat(4, 1, 1))


def test_the_first_half_of_a_batch_stays_dense_to_the_bit() -> None:
    transformer, inputs = tiny_transformer()
    with torch.no_grad():
        expected = transformer(*inputs, return_dict=False)[0]
        halve_attention(transformer, frames=3)
        found = transformer(*inputs, return_dict=False)[0]
    assert torch.equal(found[:2], expected[:2])
    for row in (2, 3):
        assert not torch.allclose(found[row], expected[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row", range(4))
def test_every_part_of_a_batch_teaches_all_layers(row: int) -> None:
    """The same with blocks that run again in the backward pass."""
    transformer, inputs = tiny_transformer()
    halve_attention(transformer, frames=3)

    def gradients() -> dict[str, Tensor]:
        transformer.zero_grad()
        transformer(*inputs, return_dict=False)[0][row].square().mean().backward()
        return {name: p.grad for name, p in transformer.named_parameters() if "attn1" in name and p.grad is not None}

    kept = gradients()
    assert len(kept) == 2 * 10  # weights and biases of q, k, v and out, norms of q and k
    for name, grad in kept.items():
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name
    transformer.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), kept, rtol=1e-4, atol=1e-7)
