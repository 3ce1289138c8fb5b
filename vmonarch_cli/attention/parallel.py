"""One clip on several GPUs: diffusers' Ulysses exchange around the swapped attention.

All communication is diffusers'. Before the attention each process has all heads of a part of the tokens; diffusers
exchanges that for all tokens, in raster order, of a part of the heads, and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def ulysses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parallel_config: Any,
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``attention`` of all tokens and a part of the heads; q, k, v (B, tokens / processes, heads, D) and the result."""
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    if parallel_config.context_parallel_config.ring_degree > 1:
        raise NotImplementedError("swapped attention needs all tokens of a head: set ulysses_degree, not ring_degree")

    def forward(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return attention(q, k, v)

    result: torch.Tensor = _templated_context_parallel_attention(
        q, k, v, forward_op=forward, backward_op=None, _parallel_config=parallel_config
    )
    return result
