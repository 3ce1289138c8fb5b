"""Structured calls on so few tokens that their launches cost more than their work, and what becomes of them. No torch.

A structured call is six launches and more, which take the host 0.66 ms whatever the GPU has to do (0.76 with frames
recomputed), and a dense call one, 0.07 to 0.17 ms: H200, 1,872 and 4,032 tokens, torch 2.11, triton 3.6. So a dense
call that computes in less time than those launches take is never slower, and it is exact. Fused blocks have more
launches than stock ones too, which few tokens do not repay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.presets import Preset

DENSE_BELOW = "dense_below"
"""Why a call ran dense, in records and tables: it has fewer tokens than that."""
LAUNCHES_S = 0.6e-3
"""Seconds that the launches of a structured call take at least."""
FUSE_FROM = 10_000_000
"""Entries of a sample's stream, tokens times channels, from which fused blocks repay their launches on a GPU.

Measured on an H200: at 0.5 million a step of the demo model takes 35 ms fused and 29 stock, bound by its launches (2.2
and 1.8 ms a block); at 50 million, of Wan2.1-1.3B at 832x480, 230 and 338 ms. There a stock block takes 11 ms, so that
at 10 million its work takes as long as a fused block's launches.
"""
_RATES = {"H100": 550e12, "H200": 550e12, "B200": 550e12, "B300": 550e12, "A100": 170e12, "H20": 80e12}
"""Operations of dense attention in a second, by a word of the GPU's name. Measured on an H200 (7,800 tokens, 12 heads x
128: 0.67 ms); others by what their tensor cores do against it, Blackwell's no more than an H200's.
"""
FASTEST = max(_RATES, key=lambda name: _RATES[name])
"""With as many tokens as run structured on this GPU, they do so on every other."""
_LEAST_RATE = 40e12
"""Of every other GPU."""


@dataclass(frozen=True)
class SmallCalls:
    """What becomes of structured calls that are small; the defaults change nothing."""

    dense_below: int = 0
    """Calls of fewer tokens run dense."""
    graphs: bool = False
    """Small calls are recorded as CUDA graphs and replayed, where a GPU runs them."""


AS_THEY_ARE = SmallCalls()
"""Small calls run as all others do."""


def dense_below(gpu: str, channels: int) -> int:
    """Tokens below which a dense call takes a GPU less time than the launches of a structured one.

    gpu: its product name. channels: heads times head dimension. A dense call of N tokens has 4 N^2 channels operations.
    """
    rate = next((rate for name, rate in _RATES.items() if is_chip(gpu, name)), _LEAST_RATE)
    return math.isqrt(int(LAUNCHES_S * rate / (4 * channels)))


def dense_limit(setup: Setup, preset: Preset, gpu: str | None, channels: int) -> int:
    """Tokens below which the calls of a preset run dense: as asked for, or as a GPU computes them in less time.

    gpu: its product name; None where nothing structured runs by Triton. channels: heads times head dimension. An
    implementation that was named runs, and so do calls that are to be replayed as CUDA graphs.
    """
    if setup.dense_below is not None:
        return setup.dense_below
    return 0 if gpu is None or preset.impl != "auto" or setup.graphs else dense_below(gpu, channels)


def all_dense(tokens: int, preset: Preset, limit: int) -> bool:
    """Whether all calls of a clip run dense because they have fewer tokens than the limit."""
    return preset.attention != "dense" and tokens < limit


def repays_fusing(tokens: int, channels: int) -> bool:
    """Whether fused blocks are faster than stock ones for a stream of so many tokens and channels, on a GPU."""
    return tokens * channels >= FUSE_FROM


def small_words(tokens: int, below: int, *, asked: bool) -> str:
    """Why calls of so many tokens run dense, and how to have them structured; `asked`: by --dense-below."""
    words = f"calls of {tokens:,} tokens run dense"
    if asked:
        return f"{words}, as --dense-below {below} asks"
    return (
        f"{words}: below {below:,} tokens dense attention takes this GPU less time than the launches of a structured "
        "call; --dense-below 0 runs them structured"
    )


def is_chip(gpu: str, name: str) -> bool:
    """Whether a word of a GPU's product name is that of a chip, alone or behind a G as in GH200 and GB200."""
    return bool({name, f"G{name}"} & set(gpu.upper().replace("-", " ").split()))
