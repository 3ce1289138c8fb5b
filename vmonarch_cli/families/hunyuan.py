"""HunyuanVideo and HunyuanVideo-1.5: joint attention over [video, text], text padding masked.

The stock 1.5 processor builds an S x S mask in every layer; here the text's own mask is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor, added_qkv, heads_of, split_out
from vmonarch_cli.families.base import Family, ForwardInputs, LatentClip, at_once, decode_scaled, encode_scaled, layers
from vmonarch_cli.families.fusing import impl_of, normed_and_rotated
from vmonarch_cli.families.hunyuan_blocks import HUNYUAN_15_BLOCKS, HUNYUAN_BLOCKS
from vmonarch_cli.models.base import ModelEntry

_POOLED_DIM = 768  # of CLIP-L, HunyuanVideo's second text encoder


class HunyuanMonarchProcessor(MonarchProcessor):
    """HunyuanVideoAttnProcessor2_0 for dual-stream and single-stream blocks, and that of 1.5, which has no
    single-stream blocks.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states (B, N, channels), encoder_hidden_states (B, tokens, channels) -> both again."""
        text, tokens = _text_of(encoder_hidden_states)
        single_stream = attn.add_q_proj is None
        if single_stream:
            hidden_states = torch.cat([hidden_states, text], dim=1)
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if impl_of(attn) is not None and attn.norm_q is not None:
            # The tables are the video's: a prompt's tokens, behind them, are not turned.
            tables = None if image_rotary_emb is None else tuple(table[None, :, None] for table in image_rotary_emb)
            query, key = normed_and_rotated(attn, query, key, tables, per_head=True)
            (value,) = heads_of(attn, value)
        else:
            query, key, value = heads_of(attn, query, key, value)
            query = query if attn.norm_q is None else attn.norm_q(query)
            key = key if attn.norm_k is None else attn.norm_k(key)
            if image_rotary_emb is not None:
                query = _rotate_video(query, image_rotary_emb, tokens if single_stream else 0)
                key = _rotate_video(key, image_rotary_emb, tokens if single_stream else 0)
        if not single_stream:
            added = added_qkv(attn, text)
            query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))

        out = self.attend_jointly(query, key, value, tokens, attention_mask)
        return split_out(attn, out.flatten(2, 3).to(query.dtype), tokens)

    def attend_jointly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, video + tokens, heads, D) each -> the same."""
        return self.attend(q, k, v, text_tokens=tokens, text_mask=_key_mask(mask, tokens))


def _text_of(encoder_hidden_states: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """A joint layer's text, which must be there, and its number of tokens."""
    if encoder_hidden_states is None:
        raise ValueError("joint text-video attention got no text: token refiners must keep their stock processors")
    return encoder_hidden_states, encoder_hidden_states.shape[1]


def _rotate_video(x: torch.Tensor, rotary_emb: Any, text_tokens: int) -> torch.Tensor:
    """Rotary embedding of the video's tokens in x (B, video + text, heads, D)."""
    from diffusers.models.embeddings import apply_rotary_emb

    if text_tokens == 0:
        rotated: torch.Tensor = apply_rotary_emb(x, rotary_emb, sequence_dim=1)
        return rotated
    video = apply_rotary_emb(x[:, :-text_tokens], rotary_emb, sequence_dim=1)
    return torch.cat([video, x[:, -text_tokens:]], dim=1)


def _key_mask(attention_mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The text's part, bool (B, tokens), of a key mask (B, 1, 1, S) or (B, tokens); video keys are never masked."""
    if attention_mask is None:
        return None
    return attention_mask.flatten(1)[:, -tokens:].bool()


@contextmanager
def _own_size(pipeline: Any, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """With an image 1.5's pipeline takes no size, but one of its own near the image's; here it is the image's, which
    has the clip's size already.
    """
    if "height" in arguments:
        yield arguments
        return
    processor = pipeline.video_processor
    processor.calculate_default_height_width = lambda height, width, target_size: (height, width)
    try:
        yield arguments
    finally:
        del processor.calculate_default_height_width


def _inputs(entry: ModelEntry, clip: LatentClip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.zeros(1, entry.max_sequence_length, dtype=torch.bool, device=device)
    mask[:, : entry.max_sequence_length // 4] = True  # a prompt fills a part of the text's tokens
    return {
        "encoder_attention_mask": mask,
        "pooled_projections": torch.zeros(1, _POOLED_DIM, device=device, dtype=dtype),
        "guidance": torch.tensor([1000.0 * entry.defaults.guidance_scale], device=device, dtype=dtype),
    }


HUNYUAN_VIDEO = Family(
    {"HunyuanVideoAttnProcessor2_0": HunyuanMonarchProcessor},
    layers("transformer_blocks.N.attn", "single_transformer_blocks.N.attn"),
    at_once(decode_scaled),
    encode=encode_scaled,
    batches=True,
    forward=ForwardInputs(others=_inputs),
    fused=HUNYUAN_BLOCKS,
)
HUNYUAN_VIDEO_15 = Family(
    {"HunyuanVideo15AttnProcessor2_0": HunyuanMonarchProcessor},
    layers("transformer_blocks.N.attn"),
    at_once(decode_scaled),
    adjusted=_own_size,
    fused=HUNYUAN_15_BLOCKS,
)
