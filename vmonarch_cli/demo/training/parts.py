"""Blocks of a Wan transformer in two compiled parts, before their self-attention and after it.

Attention itself stays as it is between them. So what is compiled once serves every kind of it, clips of all lengths
and sizes, and all blocks: when Monarch attention begins, nothing is compiled anew. (A block compiled whole is compiled
again for it, in five pieces.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.attention.base import QKV, heads_of, project
from vmonarch_cli.demo.training.structured import HalfStructured, dense_attention
from vmonarch_cli.families.wan import apply_rotary

Before = Callable[[Any, Tensor, Tensor, tuple[Tensor, Tensor]], QKV]
After = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


def compile_parts(transformer: Any, *, dynamic: bool, backend: str = "inductor") -> None:
    """Compile the blocks of a `WanTransformer3DModel` in parts; `dynamic`: for clips of several lengths and sizes."""
    before: Before = torch.compile(before_attention, dynamic=dynamic, fullgraph=True, backend=backend)
    after: After = torch.compile(after_attention, dynamic=dynamic, fullgraph=True, backend=backend)
    for block in transformer.blocks:
        block._compiled_call_impl = partial(run_parts, block, before, after)


def run_parts(
    block: Any, before: Before, after: After, stream: Tensor, text: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """What `WanTransformerBlock.forward` returns: the stream (B, N, C) after the block.

    Args:
        block: of diffusers.
        before: `before_attention`, compiled or not.
        after: `after_attention`, compiled or not.
        stream: (B, N, C).
        text: (B, L, C).
        temb: the timestep's embedding, (B, 6, C).
        rotary: cosines and sines, (1, N, 1, D) each.

    """
    q, k, v = before(block, stream, temb, rotary)
    processor = block.attn1.processor
    attend = processor.attend if isinstance(processor, HalfStructured) else dense_attention
    out = attend(q, k, v)
    # A copy, because it would be a view of something else for each kind of attention, and code is compiled for each.
    return after(block, stream, out.flatten(2).clone(), text, temb)


def before_attention(block: Any, stream: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor]) -> QKV:
    """q, k and v (B, N, heads, D) of a block's self-attention, normalised and rotated, all of v's dtype."""
    shift, scale = _modulation(block, temb)[:2]
    normed = (block.norm1(stream.float()) * (1 + scale) + shift).type_as(stream)
    attn = block.attn1
    query, key, value = project(attn, normed)
    query, key, value = heads_of(attn, attn.norm_q(query), attn.norm_k(key), value)
    query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
    return query.to(value.dtype), key.to(value.dtype), value


def after_attention(block: Any, stream: Tensor, out: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """The stream (B, N, C) after a block whose self-attention gave `out` (B, N, C)."""
    _, _, gate, c_shift, c_scale, c_gate = _modulation(block, temb)
    out = block.attn1.to_out[1](block.attn1.to_out[0](out))
    stream = (stream.float() + out * gate).type_as(stream)
    stream = stream + block.attn2(block.norm2(stream.float()).type_as(stream), text, None, None)
    normed = (block.norm3(stream.float()) * (1 + c_scale) + c_shift).type_as(stream)
    result: Tensor = (stream.float() + block.ffn(normed).float() * c_gate).type_as(stream)
    return result


def _modulation(block: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of the self-attention and of the feed-forward network, (B, 1, C) each."""
    chunks: tuple[Tensor, ...] = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
    return chunks
