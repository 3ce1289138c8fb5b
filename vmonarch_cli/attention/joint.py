"""Joint text-video attention around the structured call: text keys exact for all, text queries exact.

A call's tokens are those of the video, in one piece, and those of the text before it, after it or both. Video queries
see the text's keys exactly, as one more entry of their softmax (``extra`` of ``monarch_attention``); text queries see
everything exactly. Keys of text padding are seen by no query. The output rows of padding are zero; no layer reads them.

In a packed sequence everything beside the video that is being made counts as text: prompt, sound, given frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vmonarch_kernels import attention_lse, dense_attention

Rows = slice | torch.Tensor
"""Which text tokens of a sample are real: a leading part, or their numbers."""


@dataclass(frozen=True)
class Text:
    """The text's tokens of a joint call."""

    tokens: int
    before: int
    """How many of them stand before the video's tokens; the others stand after them."""
    valid: list[Rows] | None
    """For every sample of the batch; None when all tokens of all samples are real."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, ...) -> (video, text): views, but for a text that stands on both sides."""
        end = x.shape[1] - (self.tokens - self.before)
        first, video, last = x[:, : self.before], x[:, self.before : end], x[:, end:]
        if not self.before:
            return video, last
        return video, first if self.before == self.tokens else torch.cat([first, last], dim=1)

    def samples(self, rows: slice) -> Text:
        """The text of some samples of the batch."""
        return self if self.valid is None else replace(self, valid=self.valid[rows])

    def join(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return torch.cat([text[:, : self.before], video, text[:, self.before :]], dim=1)


class Packed(NamedTuple):
    """Where the clip that is being made is in a sequence that packs its tokens together with others."""

    grid: tuple[int, int, int]
    """(T, H, W) tokens of the clip."""
    before: int = 0
    """Tokens before its first one."""
    others: int = 0
    """All tokens that are not of the clip."""

    @property
    def text(self) -> Text | None:
        """The others, as structured attention knows them."""
        return Text(self.others, self.before, None) if self.others else None


def valid_rows(mask: torch.Tensor | None) -> list[Rows] | None:
    """Real tokens of each sample of a mask, bool (B, tokens); waits for the device, so ask once per forward."""
    if mask is None:
        return None
    table = mask.cpu()
    if bool(table.all()):
        return None
    found: list[Rows] = []
    for row in table:
        count = int(row.sum())
        found.append(slice(count) if bool(row[:count].all()) else row.nonzero().flatten().to(mask.device))
    return found


def text_entry(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the video's queries to the text's keys: (out (B, N, heads, D), lse (B, N, heads) float32).

    A sample without a real token has lse = -inf, which weighs nothing.
    """
    video_q, (_, text_k), (_, text_v) = text.split(q)[0], text.split(k), text.split(v)
    if text.valid is None:
        return _with_lse(video_q, text_k, text_v)
    out = torch.zeros_like(video_q)
    lse = video_q.new_full(video_q.shape[:-1], float("-inf"), dtype=torch.float32)
    for b, rows in enumerate(text.valid):
        keys, values = text_k[b : b + 1, rows], text_v[b : b + 1, rows]
        if keys.shape[1]:
            out[b : b + 1], lse[b : b + 1] = _with_lse(video_q[b : b + 1], keys, values)
    return out, lse


def text_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: Text) -> torch.Tensor:
    """Exact attention of the text's queries to all keys: (B, tokens, heads, D)."""
    text_q = text.split(q)[1]
    if text.valid is None:
        return dense_attention(text_q, k, v)
    out = torch.zeros_like(text_q)
    for b, rows in enumerate(text.valid):
        out[b : b + 1, rows] = dense_attention(
            text_q[b : b + 1, rows], _keys(k, b, rows, text), _keys(v, b, rows, text)
        )
    return out


def dense_joint(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: Text | None, backend: str = "sdpa"
) -> torch.Tensor:
    """The joint call computed by a dense attention, see ``dense_attention``: structured attention is measured against
    it.
    """
    if text is None or text.valid is None:
        return dense_attention(q, k, v, backend=backend)
    video_q, text_q = text.split(q)
    video_out, text_out = torch.zeros_like(video_q), torch.zeros_like(text_q)
    for b, rows in enumerate(text.valid):
        keys, values = _keys(k, b, rows, text), _keys(v, b, rows, text)
        queries = torch.cat([video_q[b : b + 1], text_q[b : b + 1, rows]], dim=1)
        out = dense_attention(queries, keys, values, backend=backend)
        video_out[b : b + 1], text_out[b : b + 1, rows] = out.split(
            [video_q.shape[1], out.shape[1] - video_q.shape[1]], 1
        )
    return text.join(video_out, text_out)


def _keys(x: torch.Tensor, b: int, rows: Rows, text: Text) -> torch.Tensor:
    """Keys or values (1, video + real text, heads, D) of one sample, in any order; a view where that can be."""
    if isinstance(rows, slice) and not text.before:
        video = x.shape[1] - text.tokens
        return x[b : b + 1, : video + len(range(text.tokens)[rows])]
    video_part, text_part = text.split(x)
    return torch.cat([video_part[b : b + 1], text_part[b : b + 1, rows]], dim=1)


def _with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention_lse(*heads_first, scale=q.shape[-1] ** -0.5)
    return out.transpose(1, 2), lse.transpose(1, 2).float()
