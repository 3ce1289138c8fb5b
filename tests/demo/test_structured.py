"""Monarch attention with gradients: the same function as the library's, half a batch at a time."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from vmonarch_cli.demo.training.structured import halve_attention, structured_attention
from vmonarch_kernels import monarch_attention


def qkv(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(("own_frame", "band"), [(False, None), (True, 0)])
@pytest.mark.parametrize(("settled", "num_steps"), [(False, 2), (True, 3)])
def test_it_is_the_librarys_attention(own_frame: bool, band: int | None, settled: bool, num_steps: int) -> None:
    tensors = qkv(2, 5 * 6, 3, 16)
    expected = monarch_attention(
        *(x.detach() for x in tensors), (5, 2, 3), num_steps=num_steps, band=band, impl="reference"
    )
    torch.testing.assert_close(structured_attention(*tensors, 5, own_frame=own_frame, settled=settled), expected)


@pytest.mark.parametrize("own_frame", [False, True])
def test_its_gradients_are_right(own_frame: bool) -> None:
    assert torch.autograd.gradcheck(lambda *x: structured_attention(*x, 3, own_frame=own_frame), qkv(1, 3 * 2, 1, 4))


def test_the_first_half_of_a_batch_stays_dense() -> None:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, ffn_dim=16,
        num_layers=2,
    )  # fmt: skip
    latents = torch.randn(2, 4, 3, 8, 8).repeat(2, 1, 1, 1, 1)
    inputs = latents, torch.full((4,), 500.0), torch.randn(1, 3, 8).repeat(4, 1, 1)
    with torch.no_grad():
        expected = transformer(*inputs, return_dict=False)[0]
        halve_attention(transformer, frames=3)
        found = transformer(*inputs, return_dict=False)[0]
    torch.testing.assert_close(found[:2], expected[:2])
    assert not torch.allclose(found[2:], expected[2:], rtol=1e-3, atol=1e-4)
