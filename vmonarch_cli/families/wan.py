"""Wan 2.1 and 2.2, Wan VACE and SkyReels-V2: ``attn1`` sees only video tokens; ``attn2``, for text, stays stock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor, heads_of, project
from vmonarch_cli.families.base import (
    Family,
    ForwardInputs,
    Shape,
    encoded,
    layers,
    mean_and_std,
    run_vae,
    start_offloaded,
)
from vmonarch_cli.families.fusing import impl_of, normed_and_rotated
from vmonarch_cli.families.wan_blocks import SKYREELS_BLOCKS, WAN_BLOCKS, WAN_VACE_BLOCKS, rehearse
from vmonarch_cli.families.wan_vae import by_chunks, decode_chunks, decode_raw, is_plain
from vmonarch_cli.families.wan_vae_lean import by_channels, lean

_WHOLE_PIXELS = 1 << 19
"""A clip of so few pixels in all is decoded whole, and chunks of a longer one have half as many: a convolution of few
frames is slow on a CPU (16 times in chunks of four frames of 96x96), one of many leaves the caches.
"""


class WanMonarchProcessor(MonarchProcessor):
    """WanAttnProcessor and SkyReelsV2AttnProcessor for ``attn1``; image keys (I2V) exist only in ``attn2``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("WanMonarchProcessor", encoder_hidden_states, attention_mask)
        query, key, value = project(attn, hidden_states)
        if impl_of(attn) is not None:
            query, key = normed_and_rotated(attn, query, key, rotary_emb)
            (value,) = heads_of(attn, value)
        else:
            query, key, value = heads_of(attn, attn.norm_q(query), attn.norm_k(key), value)
            if rotary_emb is not None:
                query = apply_rotary(query, *rotary_emb)
                key = apply_rotary(key, *rotary_emb)

        out = self.attend(query, key, value).flatten(2, 3).type_as(query)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def apply_rotary(x: torch.Tensor, freqs_cos: torch.Tensor, freqs_sin: torch.Tensor) -> torch.Tensor:
    """Wan's rotary embedding of x (B, N, heads, D); the tables (1, N, 1, D) hold every angle twice."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos = freqs_cos[..., 0::2]
    sin = freqs_sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def _causal(transformer: Any) -> str | None:
    """SkyReels' causal variants mask the future inside every layer."""
    if transformer.config.num_frame_per_block > 1:
        return f"its attention is causal in blocks of {transformer.config.num_frame_per_block} frames"
    return None


def decode_wan(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> Iterator[torch.Tensor]:
    """The decoder of the pipelines with Wan's VAE."""
    vae = pipeline.vae
    latents = latents.to(vae.dtype)
    mean, std = mean_and_std(pipeline, latents)
    # The pipeline divides by the reciprocal; so that frames are the same to the bit, so does this.
    latents = latents / (1.0 / std) + mean
    if not by_chunks(vae):
        yield run_vae(pipeline, latents)
        return
    start_offloaded(vae)
    together = _together(shape) if is_plain(vae) else 1
    whole = shape is not None and shape[0] * shape[1] * shape[2] <= _WHOLE_PIXELS and is_plain(vae)
    with _fewer_passes(vae, latents, rounds_anyway=whole or together > 1) as arranged:
        if whole:
            yield decode_raw(vae, arranged).clamp(-1, 1)
        else:
            yield from decode_chunks(vae, arranged, together)


@contextmanager
def _fewer_passes(vae: Any, latents: torch.Tensor, *, rounds_anyway: bool) -> Iterator[torch.Tensor]:
    """The latents to decode while this is open, with `lean` where that was measured to be faster.

    On a CPU only where frames differ from the stock decoder's by rounding already (`rounds_anyway`). A GPU's own
    choice of convolution and TF32 differ by more from one card to the next.
    """
    if latents.device.type == "cuda":
        pays = is_plain(vae) and latents.dtype in (torch.float32, torch.bfloat16)
    else:
        pays = rounds_anyway and latents.device.type == "cpu" and latents.dtype == torch.float32
    if pays:
        with lean(vae):
            yield by_channels(latents)
    else:
        yield latents


def _together(shape: Shape | None) -> int:
    """Latent frames of a chunk: as many as are small enough, and one where they are large or nobody says how large."""
    return 1 if shape is None else max(1, _WHOLE_PIXELS // 2 // (4 * shape[0] * shape[1]))


def _encode(pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
    latents = encoded(pipeline, frames)
    mean, std = mean_and_std(pipeline, latents)
    return (latents - mean) / std


WAN = Family(
    {"WanAttnProcessor": WanMonarchProcessor},
    layers("blocks.N.attn1"),
    decode_wan,
    plain_calls=True,
    encode=_encode,
    batches=True,
    forward=ForwardInputs(),
    fused=WAN_BLOCKS,
    rehearse_fused=rehearse,
)
# The VACE blocks run first, but the main stack is what --dense-layers counts: it is numbered first.
WAN_VACE = Family(
    {"WanAttnProcessor": WanMonarchProcessor},
    layers("blocks.N.attn1", "vace_blocks.N.attn1"),
    decode_wan,
    plain_calls=True,
    encode=_encode,
    fused=WAN_VACE_BLOCKS,
)
SKYREELS_V2 = Family(
    {"SkyReelsV2AttnProcessor": WanMonarchProcessor},
    layers("blocks.N.attn1"),
    decode_wan,
    obstacle=_causal,
    plain_calls=True,
    encode=_encode,
    fused=SKYREELS_BLOCKS,
    batches=True,
)
