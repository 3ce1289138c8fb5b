"""One replacement for each family's self-attention processor, and where the family keeps it.

A replacement repeats the stock processor's ``__call__``, signature included (models filter keyword arguments by
it), and changes the attention call alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from vmonarch_cli.attention.op import self_attention


class MonarchProcessor:
    """What the families share. Not an nn.Module: assigning one must not change the model's state dict.

    The two class attributes are read and set by diffusers (``set_attention_backend``, ``enable_parallelism``).
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, layer: torch.Tensor) -> None:
        self.layer = layer
        """Address of the layer (``op.address``), a tensor so that compiled graphs do not depend on it."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, N, heads, D) each -> (B, N, heads, D)."""
        if self._parallel_config is not None:
            raise NotImplementedError("context parallelism does not work with swapped attention yet: turn it off")
        out: torch.Tensor = self_attention(q, k, v, self.layer)
        return out


class WanMonarchProcessor(MonarchProcessor):
    """WanAttnProcessor of diffusers for ``attn1``. Image keys (I2V) exist only in ``attn2``, which stays stock."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("WanMonarchProcessor does self-attention without a mask and got a context or a mask")
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            key = attn.to_k(hidden_states)
            value = attn.to_v(hidden_states)

        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query = _apply_rotary(query, *rotary_emb)
            key = _apply_rotary(key, *rotary_emb)

        out = self.attend(query, key, value).flatten(2, 3).type_as(query)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def _apply_rotary(x: torch.Tensor, freqs_cos: torch.Tensor, freqs_sin: torch.Tensor) -> torch.Tensor:
    """Wan's rotary embedding of x (B, N, heads, D); the tables (1, N, 1, D) hold every angle twice."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos = freqs_cos[..., 0::2]
    sin = freqs_sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


@dataclass(frozen=True)
class Family:
    """Where a transformer class has its self-attention."""

    processor: type[MonarchProcessor]
    pattern: re.Pattern[str]
    """Full module path of a self-attention layer; its first group is the layer's number."""

    def self_attentions(self, transformer: Any) -> dict[int, Any]:
        """Layer number -> module. ``_orig_mod.`` is what torch.compile puts in front of names."""
        found: dict[int, Any] = {}
        for name, module in transformer.named_modules():
            match = self.pattern.fullmatch(name.replace("_orig_mod.", ""))
            if match:
                found[int(match[1])] = module
        return found


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": Family(WanMonarchProcessor, re.compile(r"blocks\.(\d+)\.attn1")),
}
