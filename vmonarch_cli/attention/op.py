"""The one operator behind every swapped layer.

torch.compile traces a transformer block once and reuses the graph for all of them only if nothing in Python differs
between blocks. So the layer travels as data, a CPU tensor, and everything else (preset, counters, timers, warm
state) is looked up from it at run time, out of the compiler's sight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vmonarch_cli.attention.session import AttentionSession

_SESSIONS: dict[int, AttentionSession] = {}
_ids = itertools.count()


def register(session: AttentionSession) -> int:
    """Make a session known to the operator; returns the id that addresses carry."""
    session_id = next(_ids)
    _SESSIONS[session_id] = session
    return session_id


def unregister(session_id: int) -> None:
    _SESSIONS.pop(session_id, None)


def address(session_id: int, transformer: int, layer: int) -> torch.Tensor:
    """Where a call comes from, as the operator takes it: int64 (3,) on the CPU, wherever the model lives."""
    return torch.tensor([session_id, transformer, layer], dtype=torch.int64, device="cpu")


@torch.library.custom_op("vmonarch::self_attention", mutates_args=())
def self_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: torch.Tensor,
    text_tokens: int = 0,
    text_first: bool = False,
    text_mask: torch.Tensor | None = None,
    clips: int = 1,
) -> torch.Tensor:
    """Self-attention as the session of ``layer`` (see ``address``) computes it.

    q, k, v: (B, S, heads, D) of any stride; returns (B, S, heads, D), contiguous, q's dtype. The other arguments are
    those of ``MonarchProcessor.attend``. Raises RuntimeError when the ``swapped`` block of the session has ended.
    """
    return _run(q, k, v, layer, text_tokens, text_first, text_mask, clips)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: torch.Tensor,
    text_tokens: int,
    text_first: bool,
    text_mask: torch.Tensor | None,
    clips: int,
) -> torch.Tensor:
    session_id, transformer, index = layer.tolist()
    session = _SESSIONS.get(session_id)
    if session is None:
        raise RuntimeError("a swapped attention layer was called after its `with swapped(...)` block had ended")
    text = session.text(transformer, text_tokens, text_first, text_mask)
    return session.attend(q, k, v, transformer, index, text, clips).contiguous()


differentiable_self_attention: Callable[..., torch.Tensor] = torch.compiler.disable(_run)
"""The same for training: plain calls, which autograd follows and which break a compiled graph."""


@self_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: torch.Tensor,
    text_tokens: int = 0,
    text_first: bool = False,
    text_mask: torch.Tensor | None = None,
    clips: int = 1,
) -> torch.Tensor:
    return q.new_empty(q.shape)
