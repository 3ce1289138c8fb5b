"""Monarch attention for a part of every batch, so that the demo transformer learns to work with both kinds.

The paper tunes its models with Monarch attention for 800 to 1,500 steps; the demo model's last training does the same.
The kernel library attends and has the gradients: Triton on a GPU, torch on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_cli.attention.ahead import KernelsAhead, start
from vmonarch_cli.attention.base import QKV
from vmonarch_cli.families.wan import WAN, WanMonarchProcessor
from vmonarch_cli.plan.call_options import options_for
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_kernels import Inputs, attend
from vmonarch_kernels.spec import Grid


def warm_without_turns(preset: Preset) -> Preset:
    """A preset with a warm start as a single training step can run it: no frame has turns, which take a whole clip of
    steps, and the first one is recomputed exactly instead.
    """
    return preset.model_copy(update={"first_frame": True, "refresh": 0.0})


def settled_attention(q: Tensor, k: Tensor, v: Tensor, grid: Grid, preset: Preset, *, impl: str = "auto") -> Tensor:
    """A warm call of a preset whose denoising steps hardly differ any more.

    A cold call on the same tensors gives the L that this one starts from. It is a constant: gradients go through the
    warm call's one iteration alone, as in a clip, where L comes from the step before.

    Args:
        q: (B, N, heads, D) with N = T H W of the grid.
        k: as q.
        v: as q.
        grid: (T, H, W).
        preset: one with a warm start, of which no frame is recomputed in turn.
        impl: as for `vmonarch_kernels.attend`.

    Returns:
        (B, N, heads, D), differentiable with respect to q, k and v. Where the preset's band covers all frames, dense
        attention.

    """
    start = None
    cold = options_for(preset, grid[0])
    if cold.keeps_l:
        with torch.no_grad():
            _, start = attend(Inputs(q, k, v, grid), cold.kernel, impl=impl, return_l=True)
    warm = options_for(preset, grid[0], warm=start is not None)
    return attend(Inputs(q, k, v, grid, start), warm.kernel, impl=impl)[0]


class HalfStructured(WanMonarchProcessor):
    """Dense attention for the first half of a batch, and for the second, which holds the same clips, Monarch's.

    One quarter of the batch runs as preset `paper`, the last quarter nearly as preset `fast`: warm, but with the first
    frame exact in place of frames in turn. `frames` may be set anew before any call: compiled code does not depend on
    it. While `on` is False the whole batch has dense attention.
    """

    def __init__(self, frames: int, *, impl: str = "auto") -> None:
        super().__init__(torch.zeros(2, dtype=torch.int64))
        self.frames = frames
        self.on = True
        self.impl = impl
        self.paper, self.fast = load_preset("paper"), warm_without_turns(load_preset("fast"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        """(B, N, heads, D) each -> (B, N, heads, D)."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        return _split_batch(self, q, k, v) if self.on else dense_attention(q, k, v)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, heads, D) each, of one dtype -> (B, N, heads, D)."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _attend_in_parts(processor: HalfStructured, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = q.shape[0] // 2, q.shape[0] // 4, q.shape[0] // 4
    # Split, not sliced: the gradients of parts are then put together once, not added up as whole tensors with zeros.
    q1, q2, q3 = q.split(parts)
    k1, k2, k3 = k.split(parts)
    v1, v2, v3 = v.split(parts)
    return torch.cat([dense_attention(q1, k1, v1), *_structured_quarters(processor, (q2, k2, v2), (q3, k3, v3))])


def _structured_quarters(processor: HalfStructured, paper: QKV, fast: QKV) -> tuple[Tensor, Tensor]:
    frames, impl = processor.frames, processor.impl
    grid = frames, 1, paper[0].shape[1] // frames  # where a position lies in its frame makes no difference
    with torch.autocast(paper[0].device.type, enabled=False):  # the library knows which of its numbers need float32
        cold, _ = attend(Inputs(*paper, grid), options_for(processor.paper, frames).kernel, impl=impl)
        return cold, settled_attention(*fast, grid, processor.fast, impl=impl)


# Not compiled: torch 2.11 on an H100 made of such parts of a batch code whose output was right and whose gradients were
# wrong by orders of magnitude.
_split_batch: Callable[[HalfStructured, Tensor, Tensor, Tensor], Tensor] = torch.compiler.disable(_attend_in_parts)


def halve_attention(transformer: Any, frames: int, *, impl: str = "auto") -> HalfStructured:
    """Give every self-attention of a Wan transformer the `HalfStructured` processor that is returned, for batches of a
    multiple of 4; `impl` as for `vmonarch_kernels.attend`.
    """
    processor = HalfStructured(frames, impl=impl)
    for attention in WAN.self_attentions(transformer).values():
        attention.set_processor(processor)
    return processor


def rehearse(shapes: Iterable[tuple[int, int, int]], heads: int, head_dim: int, device: torch.device) -> None:
    """The structured calls of training steps, forwards and backwards, on tensors of any content.

    Args:
        shapes: of each kind of step the clips of its batch, their latent frames and their tokens.
        heads: of the attention.
        head_dim: size of a head.
        device: where the training runs: in bfloat16 on a GPU, in float32 on a CPU.

    """
    processor = HalfStructured(frames=1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # In this thread alone, also backwards: what it would compile is noted there. A thread has a GPU of its own, too.
    here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with here, torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        for clips, processor.frames, tokens in shapes:
            shape = clips // 4, tokens, heads, head_dim
            x = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
            out = torch.cat(_structured_quarters(processor, (x, x, x), (x, x, x)))
            out.backward(torch.zeros_like(out))


def kernels_ahead(
    shapes: Iterable[tuple[int, int, int]], heads: int, head_dim: int, device: torch.device
) -> KernelsAhead | None:
    """Compile what `rehearse` would launch on a GPU, in other threads from now on; None on a CPU."""
    if device.type != "cuda":
        return None
    return start(partial(rehearse, list(shapes), heads, head_dim, device))
