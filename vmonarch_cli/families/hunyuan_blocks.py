"""The blocks of HunyuanVideo and HunyuanVideo-1.5 with their arithmetic between the products fused.

Not those of its image-to-video model that replaces the first frame's tokens: they modulate these apart.
"""

from __future__ import annotations

from typing import Any

import torch

from vmonarch_cli.families.fusing import (
    FusedBlock,
    activated,
    activation_forward,
    feed_forward,
    gelu_forward,
    give_parameters,
    norm_of,
    replacement,
    takes_rows,
)
from vmonarch_kernels import Term, gated_residual, layer_norm_modulate, residual_norm

Stream = tuple[torch.Tensor, torch.Tensor]


def _of_sample(values: torch.Tensor) -> Term:
    """A gate, scale or shift (B, C) of samples."""
    return Term(values[:, None])


@replacement
def _ada_norm_zero(
    self: Any,
    x: torch.Tensor,
    timestep: torch.Tensor | None = None,
    class_labels: torch.Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """diffusers' AdaLayerNormZero: the modulated norm, and gate, shift, scale and gate (B, C) for what follows."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
    normed = layer_norm_modulate(x, norm_of(self.norm), _of_sample(scale), _of_sample(shift), impl=self.fused_impl)
    return normed, *others


@replacement
def _ada_norm_zero_single(
    self: Any, x: torch.Tensor, emb: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' AdaLayerNormZeroSingle: the modulated norm and a gate (B, C)."""
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    normed = layer_norm_modulate(x, norm_of(self.norm), _of_sample(scale), _of_sample(shift), impl=self.fused_impl)
    return normed, gate


def _rest(block: Any, stream: torch.Tensor, out: torch.Tensor, terms: tuple[Any, ...], which: str) -> torch.Tensor:
    """What follows a dual-stream block's attention, for the video ("") or the text ("_context")."""
    gate, shift, scale, mlp_gate = (_of_sample(values) for values in terms)
    norm, network = getattr(block, f"norm2{which}"), getattr(block, f"ff{which}")
    rows = takes_rows(block.attn.to_q)
    stream, normed = residual_norm(stream, out, gate, norm_of(norm), scale, shift, rows=rows, impl=block.fused_impl)
    return gated_residual(stream, network(normed), mlp_gate, impl=block.fused_impl)


@replacement
def _dual_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    freqs_cis: Stream | None = None,
    *args: Any,
    **kwargs: Any,
) -> Stream:
    normed, *terms = self.norm1(hidden_states, emb=temb)
    normed_text, *text_terms = self.norm1_context(encoder_hidden_states, emb=temb)
    out, text_out = self.attn(
        hidden_states=normed,
        encoder_hidden_states=normed_text,
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    video = _rest(self, hidden_states, out, tuple(terms), "")
    return video, _rest(self, encoder_hidden_states, text_out, tuple(text_terms), "_context")


@replacement
def _single_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Stream | None = None,
    *args: Any,
    **kwargs: Any,
) -> Stream:
    tokens = encoder_hidden_states.shape[1]
    stream = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    normed, gate = self.norm(stream, emb=temb)
    inner = activated(self.proj_mlp, self.act_mlp, normed)
    out, text_out = self.attn(
        hidden_states=normed[:, :-tokens],
        encoder_hidden_states=normed[:, -tokens:],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    out = self.proj_out(torch.cat([torch.cat([out, text_out], dim=1), inner], dim=2))
    stream = gated_residual(stream, out, _of_sample(gate), impl=self.fused_impl)
    return stream[:, :-tokens], stream[:, -tokens:]


_DUAL = FusedBlock(
    _dual_forward,
    {
        **dict.fromkeys(("norm1", "norm1_context"), _ada_norm_zero),
        **dict.fromkeys(("attn.norm_q", "attn.norm_k"), give_parameters),
        **dict.fromkeys(("ff", "ff_context"), feed_forward),
        **dict.fromkeys(("ff.net.0", "ff_context.net.0"), gelu_forward),
    },
    ("attn",),
)
_SINGLE = FusedBlock(
    _single_forward,
    {
        "norm": _ada_norm_zero_single,
        **dict.fromkeys(("attn.norm_q", "attn.norm_k"), give_parameters),
        "act_mlp": activation_forward,
    },
    ("attn",),
)
HUNYUAN_BLOCKS = {"HunyuanVideoTransformerBlock": _DUAL, "HunyuanVideoSingleTransformerBlock": _SINGLE}
HUNYUAN_15_BLOCKS = {"HunyuanVideo15TransformerBlock": _DUAL}
