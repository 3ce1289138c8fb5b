"""What a family says of its fused blocks, and what their forwards share.

A fused block is the stock module with other arithmetic between its linear layers: modules, parameters and their names
stay, and whatever hooks into modules (offloading, step caches, LoRA, context parallelism) finds them as they were. A
replaced ``forward`` has the stock one's signature, and serves while the module's ``fused_impl`` names an
implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from vmonarch_kernels import (
    HeadNorm,
    Norm,
    Rotation,
    gated_activation,
    gelu_tanh_,
    gelu_tanh_rows,
    linear_gelu_tanh,
    qk_norm_rope,
)

TAKES_ROWS = "takes_rows"
"""Of a linear layer's own forward that computes in e4m3: it takes rows (`vmonarch_kernels.Rows`), beside tensors."""
ATTRIBUTE = "fused_impl"
"""Of every module whose forward was replaced, and of attention modules whose processor asks for it."""
Forward = Callable[..., Any]
QK = tuple[torch.Tensor, torch.Tensor]


def replacement(run: Forward) -> Forward:
    """`run` as a module's forward; the class's own again once the module's ``fused_impl`` is None."""

    @functools.wraps(run)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fused_impl is None:
            return type(self).forward(self, *args, **kwargs)
        return run(self, *args, **kwargs)

    forward.fused = True  # type: ignore[attr-defined]
    return forward


@dataclass(frozen=True)
class StreamShape:
    """The residual stream of one sample, (1, tokens, heads * head_dim)."""

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    e4m3: bool = False
    """Whether the products of it compute in e4m3."""


@dataclass(frozen=True)
class FusedBlock:
    """How one block class of diffusers is fused."""

    forward: Forward
    """In place of the block's own; made by `replacement`, as those below."""
    parts: Mapping[str, Forward] = field(default_factory=dict)
    """Path within the block -> forward; a path that a block lacks is left out."""
    attentions: tuple[str, ...] = ()
    """Paths of the self-attention modules, whose processors normalise and rotate q and k in one pass."""


def impl_of(module: Any) -> str | None:
    """The implementation that a module's fused arithmetic runs with; None for a stock one."""
    found: str | None = getattr(module, ATTRIBUTE, None)
    return found


@replacement
def give_parameters(self: Any, hidden_states: torch.Tensor | None = None) -> Any:
    """A norm's weight and bias when it is called with nothing, else its own result.

    Through the call, because a module that offloading moves about has its parameters only inside it.
    """
    if hidden_states is not None:
        return type(self).forward(self, hidden_states)
    given = (self.weight, getattr(self, "bias", None))
    if torch.is_grad_enabled():
        return given
    # What moves parameters away afterwards may do so under the parameter's own name.
    return tuple(None if tensor is None else tensor.detach() for tensor in given)


def parameters_of(norm: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias of a norm, either None; of one without parameters nothing is called."""
    if getattr(norm, "weight", None) is None:
        return None, None
    weight, bias = norm(None)
    return weight, bias


def norm_of(module: Any, kind: Any = "layer") -> Norm:
    """A block's norm over its channels, as the fused operations take it."""
    return Norm(module.eps, *parameters_of(module), kind)


def normed_and_rotated(
    attn: Any, query: torch.Tensor, key: torch.Tensor, rotary_emb: Any, *, per_head: bool = False
) -> QK:
    """q and k (B, N, channels) of a fused attention module -> (B, N, heads, D): its RMS norms, then the rotation.

    rotary_emb: cosines and sines (B or 1, N', heads or 1, D), every angle twice; None for none.
    """
    weights = [parameters_of(norm)[0] for norm in (attn.norm_q, attn.norm_k)]
    rotation = None if rotary_emb is None else Rotation(*rotary_emb)
    norm = HeadNorm(weights[0], weights[1], attn.norm_q.eps, per_head)
    q, k = qk_norm_rope(query, key, attn.heads, norm=norm, rotation=rotation, impl=attn.fused_impl)
    assert k is not None  # noqa: S101 - for the type checker: a key was given
    return q, k


def unhooked(module: Any) -> bool:
    """Whether nothing runs before and after a module's forward when it is called, and nothing has wrapped that."""
    forward = vars(module).get("forward")
    function = getattr(forward, "__func__", None)
    own = forward is None or getattr(function, "fused", False) or getattr(function, TAKES_ROWS, False)
    return own and not any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        )
    )


def takes_rows(linear: Any) -> bool:
    """Whether a linear layer computes in e4m3 and takes the rows of its input as they are.

    Not within a compiler, which makes them itself, and not where anything hooks into the layer: that expects a tensor.
    """
    forward = vars(linear).get("forward")
    able = getattr(getattr(forward, "__func__", None), TAKES_ROWS, False)
    return able and not torch.compiler.is_compiling() and unhooked(linear)


def _plain(linear: Any) -> bool:
    """Whether a layer is torch's own, with a weight that is a tensor as any other: no adapter, no quantised weight, no
    offloading of its own.
    """
    return type(linear) is torch.nn.Linear and type(linear.weight) is torch.nn.Parameter and unhooked(linear)


def gelu_of(linear: Any, hidden_states: torch.Tensor, impl: str) -> torch.Tensor:
    """GELU, in its tanh form, of a linear layer's product: with the product where the layer is plain, else in place."""
    if _plain(linear):
        return linear_gelu_tanh(hidden_states, linear.weight, linear.bias, impl=impl)
    return gelu_tanh_(linear(hidden_states).contiguous(), impl=impl)


@replacement
def gelu_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """diffusers' GELU, a product and its activation, where it is the tanh form."""
    if self.approximate != "tanh":
        stock: torch.Tensor = type(self).forward(self, hidden_states)
        return stock
    return gelu_of(self.proj, hidden_states, self.fused_impl)


@replacement
def feed_forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """diffusers' FeedForward; between layers in e4m3, GELU writes what the second one takes, and nothing in 16 bits."""
    first, dropout, last, *others = self.net
    in_e4m3 = not others and takes_rows(last) and getattr(first, "approximate", "") == "tanh" and unhooked(first)
    if not in_e4m3 or dropout.training or not unhooked(dropout) or torch.is_grad_enabled():
        stock: torch.Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
        return stock
    rows = gelu_tanh_rows(first.proj(hidden_states), impl=self.fused_impl)
    out: torch.Tensor = last(rows)
    return out


@replacement
def activation_forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    """torch's GELU in place, on a tensor that nothing else has: the product before it."""
    if self.approximate != "tanh":
        stock: torch.Tensor = type(self).forward(self, input)
        return stock
    return gelu_tanh_(input.contiguous(), impl=self.fused_impl)


def activated(linear: Any, activation: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A linear layer's product through an activation module that is fused by `activation_forward`."""
    impl = impl_of(activation)
    if impl is not None and activation.approximate == "tanh" and unhooked(activation):
        return gelu_of(linear, hidden_states, impl)
    result: torch.Tensor = activation(linear(hidden_states))
    return result


@replacement
def swiglu_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """diffusers' SwiGLU, a product and its gated activation."""
    return gated_activation(self.proj(hidden_states), "silu", impl=self.fused_impl)
