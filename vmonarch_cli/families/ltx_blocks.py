"""The blocks of LTX-Video with their arithmetic between the products fused."""

from __future__ import annotations

from typing import Any

import torch

from vmonarch_cli.families.fusing import FusedBlock, gelu_forward, give_parameters, norm_of, replacement
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
    impl, table = self.fused_impl, self.scale_shift_table
    values = temb.unflatten(2, (table.shape[0], -1))  # (B, 1 or N, 6, C)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (Term(values[:, :, i], table[i]) for i in range(6))
    stream, normed = residual_norm(hidden_states, None, None, norm_of(self.norm1, "rms"), scale, shift, impl=impl)
    out = self.attn1(hidden_states=normed, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    stream = gated_residual(stream, out, gate, impl=impl)
    out = self.attn2(
        stream,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    stream, normed = residual_norm(stream, out, None, norm_of(self.norm2, "rms"), mlp_scale, mlp_shift, impl=impl)
    return gated_residual(stream, self.ff(normed), mlp_gate, impl=impl)


LTX_BLOCKS = {
    "LTXVideoTransformerBlock": FusedBlock(
        _ltx_forward,
        {
            **dict.fromkeys(("norm1", "norm2", "attn1.norm_q", "attn1.norm_k"), give_parameters),
            "ff.net.0": gelu_forward,
        },
        ("attn1",),
    )
}
