"""The blocks of Wan 2.1 and 2.2, Wan VACE and SkyReels-V2 with their arithmetic between the products fused.

Six passes over tensors: norm1 with its modulation, q and k with norms and rotation, the first gate with norm2, the
second sum with norm3 and its modulation, the activation, and the last gate.
"""

from __future__ import annotations

from typing import Any

import torch

from vmonarch_cli.families.fusing import (
    FusedBlock,
    StreamShape,
    feed_forward,
    gelu_forward,
    give_parameters,
    norm_of,
    replacement,
    takes_rows,
)
from vmonarch_kernels import (
    HeadNorm,
    Norm,
    Rotation,
    Term,
    gated_residual,
    gelu_tanh_,
    layer_norm_modulate,
    qk_norm_rope,
    quantize_rows,
    residual_norm,
)

_EPS = 1e-6


def _of_samples(table: torch.Tensor, temb: torch.Tensor) -> list[Term]:
    """Shifts, scales and gates (B, 6, C) of samples; the table (1, 6, C) is the block's own."""
    return [Term(temb[:, i : i + 1], table[0, i]) for i in range(6)]


def _of_tokens(table: torch.Tensor, temb: torch.Tensor) -> list[Term]:
    """The same of every token: (B, N, 6, C), of Wan 2.2's text-and-image model."""
    return [Term(temb[:, :, i], table[0, i]) for i in range(6)]


def _of_tokens_in_rows(table: torch.Tensor, temb: torch.Tensor) -> list[Term]:
    """The same as SkyReels-V2 has them: (B, 6, N, C)."""
    return [Term(temb[:, i], table[0, i]) for i in range(6)]


def _run(
    block: Any, stream: torch.Tensor, text: torch.Tensor, terms: list[Term], rotary_emb: Any, mask: Any = None
) -> torch.Tensor:
    """The stream (B, N, C) after one block's attention to itself and to the text, and its feed-forward network."""
    impl, rows = block.fused_impl, takes_rows(block.attn1.to_q)
    shift, scale, gate, c_shift, c_scale, c_gate = terms
    normed = layer_norm_modulate(stream, norm_of(block.norm1), scale, shift, rows=rows, impl=impl)
    out = block.attn1(normed, None, mask, rotary_emb)
    if isinstance(block.norm2, torch.nn.Identity):
        stream = normed = gated_residual(stream, out, gate, impl=impl)
    else:
        stream, normed = residual_norm(stream, out, gate, norm_of(block.norm2), rows=rows, impl=impl)
    out = block.attn2(normed, text, None, None)
    stream, normed = residual_norm(stream, out, None, norm_of(block.norm3), c_scale, c_shift, rows=rows, impl=impl)
    return gated_residual(stream, block.ffn(normed), c_gate, impl=impl)


@replacement
def _wan_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: torch.Tensor,
) -> torch.Tensor:
    terms = (_of_tokens if temb.ndim == 4 else _of_samples)(self.scale_shift_table, temb)
    return _run(self, hidden_states, encoder_hidden_states, terms, rotary_emb)


@replacement
def _vace_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    control_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    if self.proj_in is not None:
        control_hidden_states = self.proj_in(control_hidden_states) + hidden_states
    terms = _of_samples(self.scale_shift_table, temb)
    control = _run(self, control_hidden_states, encoder_hidden_states, terms, rotary_emb)
    return None if self.proj_out is None else self.proj_out(control), control


@replacement
def _skyreels_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: torch.Tensor,
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    terms = (_of_tokens_in_rows if temb.ndim == 4 else _of_samples)(self.scale_shift_table, temb)
    return _run(self, hidden_states, encoder_hidden_states, terms, rotary_emb, attention_mask)


_PARTS = {
    **dict.fromkeys(("norm2", "attn1.norm_q", "attn1.norm_k"), give_parameters),
    "ffn": feed_forward,
    "ffn.net.0": gelu_forward,
}
WAN_BLOCKS = {"WanTransformerBlock": FusedBlock(_wan_forward, _PARTS, ("attn1",))}
WAN_VACE_BLOCKS = {**WAN_BLOCKS, "WanVACETransformerBlock": FusedBlock(_vace_forward, _PARTS, ("attn1",))}
SKYREELS_BLOCKS = {"SkyReelsV2TransformerBlock": FusedBlock(_skyreels_forward, _PARTS, ("attn1",))}


def rehearse(shape: StreamShape, impl: str = "triton") -> None:
    """The fused operations of one block, on tensors of any content: noise levels of samples, weights as they are loaded
    (norms of the stream and the block's table in float32).
    """
    channels = shape.heads * shape.head_dim

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=shape.device)

    stream, wide, rows = empty(1, shape.tokens, channels), torch.float32, shape.e4m3
    shift, scale, gate, c_shift, c_scale, c_gate = _of_samples(empty(1, 6, channels, dtype=wide), empty(1, 6, channels))
    layer_norm_modulate(stream, Norm(_EPS), scale, shift, rows=rows, impl=impl)
    table = empty(1, shape.tokens, 1, shape.head_dim, dtype=wide)
    rotation = Rotation(table, table)
    weights = empty(channels), empty(channels)
    qk_norm_rope(stream, stream, shape.heads, norm=HeadNorm(*weights, _EPS), rotation=rotation, impl=impl)
    affine = Norm(_EPS, empty(channels, dtype=wide), empty(channels, dtype=wide))
    residual_norm(stream, stream, gate, affine, rows=rows, impl=impl)
    residual_norm(stream, stream, None, Norm(_EPS), c_scale, c_shift, rows=rows, impl=impl)
    gated_residual(stream, stream, c_gate, impl=impl)
    # Behind layers that are not plain, and in float32; others take it with the product.
    gelu_tanh_(empty(1, shape.tokens, 4 * channels), impl=impl)
    if rows:
        quantize_rows(stream, impl=impl)
