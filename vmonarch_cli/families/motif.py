"""Motif-Video: Hunyuan's joint blocks, and decoder blocks in which the encoder's video stands in the text's place."""

from __future__ import annotations

from typing import Any

import torch

from vmonarch_cli.families.base import Family, Shape, at_once, layers, mean_and_std, run_vae
from vmonarch_cli.families.hunyuan import HunyuanMonarchProcessor


class MotifMonarchProcessor(HunyuanMonarchProcessor):
    """MotifVideoAttnProcessor2_0; text cross-attention has a class and a processor of its own, which stay."""

    def attend_jointly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, video + tokens, heads, D) each -> the same.

        A decoder block (no mask, as many tokens as the video has) attends over [decoder, encoder] video: two clips of
        one grid, and structured as one clip of twice the frames.
        """
        if mask is None and q.shape[1] == 2 * tokens:
            return self.attend(q, k, v, clips=2)
        return super().attend_jointly(q, k, v, tokens, mask)


def _decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    latents = latents.to(pipeline.vae.dtype)
    mean, std = mean_and_std(pipeline, latents)
    return run_vae(pipeline, latents * std + mean)


MOTIF_VIDEO = Family(
    {"MotifVideoAttnProcessor2_0": MotifMonarchProcessor},
    layers("transformer_blocks.N.attn", "single_transformer_blocks.N.attn"),
    at_once(_decode),
)
