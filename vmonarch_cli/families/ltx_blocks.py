"""The blocks of LTX-Video with their arithmetic between the products fused."""

from __future__ import annotations

from typing import Any

import torch

from vmonarch_cli.families.fusing import (
    FusedBlock,
    feed_forward,
    gelu_forward,
    give_parameters,
    norm_of,
    replacement,
    takes_rows,
)
from vmonarch_kernels import Term, gated_residual, residual_norm


@replacement
def _ltx_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    impl, table, rows = self.fused_impl, self.scale_shift_table, takes_rows(self.attn1.to_q)
    values = temb.unflatten(2, (table.shape[0], -1))  # (B, 1 or N, 6, C)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (Term(values[:, :, i], table[i]) for i in range(6))
    norm1, norm2 = (norm_of(norm, "rms") for norm in (self.norm1, self.norm2))
    stream, normed = residual_norm(hidden_states, None, None, norm1, scale, shift, rows=rows, impl=impl)
    out = self.attn1(hidden_states=normed, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    stream = gated_residual(stream, out, gate, impl=impl)
    out = self.attn2(
        stream,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    stream, normed = residual_norm(stream, out, None, norm2, mlp_scale, mlp_shift, rows=rows, impl=impl)
    return gated_residual(stream, self.ff(normed), mlp_gate, impl=impl)


LTX_BLOCKS = {
    "LTXVideoTransformerBlock": FusedBlock(
        _ltx_forward,
        {
            **dict.fromkeys(("norm1", "norm2", "attn1.norm_q", "attn1.norm_k"), give_parameters),
            "ff": feed_forward,
            "ff.net.0": gelu_forward,
        },
        ("attn1",),
    )
}
