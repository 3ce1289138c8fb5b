"""Motif-Video: Hunyuan's joint blocks, and decoder blocks in which the encoder's video stands in the text's place."""

from __future__ import annotations

from typing import Any

import torch

from vmonarch_cli.attention.base import Family, MonarchProcessor, added_qkv, heads_of, layers, split_out
from vmonarch_cli.families.hunyuan import key_mask, rotate_video, text_of


class MotifMonarchProcessor(MonarchProcessor):
    """MotifVideoAttnProcessor2_0; text cross-attention has a class and a processor of its own, which stay."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states (B, N, channels), encoder_hidden_states (B, tokens, channels) -> both again.

        A decoder block (no mask, as many tokens as the video has) attends over [decoder, encoder] video: two clips of
        one grid, and structured as one clip of twice the frames.
        """
        text, tokens = text_of(encoder_hidden_states)
        in_decoder = attention_mask is None and tokens == hidden_states.shape[1]
        single_stream = attn.add_q_proj is None
        if single_stream:
            hidden_states = torch.cat([hidden_states, text], dim=1)
        query, key, value = heads_of(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query = rotate_video(query, image_rotary_emb, tokens if single_stream else 0)
            key = rotate_video(key, image_rotary_emb, tokens if single_stream else 0)
        if not single_stream:
            added = added_qkv(attn, text)
            query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))

        if in_decoder:
            out = self.attend(query, key, value, clips=2)
        else:
            out = self.attend(query, key, value, text_tokens=tokens, text_mask=key_mask(attention_mask, tokens))
        return split_out(attn, out.flatten(2, 3).to(query.dtype), tokens)


MOTIF_VIDEO = Family(
    {"MotifVideoAttnProcessor2_0": MotifMonarchProcessor},
    layers("transformer_blocks.N.attn", "single_transformer_blocks.N.attn"),
)
