"""The lengths and sizes of clips that one training of the transformer mixes, each step seeing clips of one of them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Bucket:
    """Clips of `frames` frames of `size` x `size` pixels, and their share of the steps."""

    frames: int
    size: int
    share: float

    @property
    def name(self) -> str:
        """As the flag writes it: 193x96."""
        return f"{self.frames}x{self.size}"

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return (self.frames - 1) // 4 + 1, self.size // 4, self.size // 4

    @property
    def tokens(self) -> int:
        """Tokens of a clip in the transformer."""
        frames, rows, columns = self.grid
        return frames * (rows // 2) * (columns // 2)

    def halved(self) -> Bucket:
        """The same clips at half the size."""
        return replace(self, size=self.size // 2)

    def equal_count(self, count: int, first: Bucket) -> int:
        """How many of these clips have about as many tokens as `count` clips of another bucket; one at least."""
        return max(1, round(count * first.tokens / self.tokens))


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Buckets from text such as "49x96" or "49x96:2,193x96:1": frames x size, and steps in proportion.

    Raises:
        ValueError: frames are not 4 n + 1, sizes no multiples of 16, shares not positive, or a bucket comes twice.

    """
    found = []
    for part in text.split(","):
        shape, _, share = part.partition(":")
        frames, _, size = shape.partition("x")
        try:
            found.append(Bucket(int(frames), int(size), float(share or 1)))
        except ValueError:
            found = []
            break
    names = {bucket.name for bucket in found}
    right = all(
        b.frames % 4 == 1 and b.size % 16 == 0 and b.frames > 0 < b.size and 0 < b.share < math.inf for b in found
    )
    if not found or not right or len(names) < len(found):
        raise ValueError(
            f"--clips: got {text!r}, valid are different FRAMESxSIZE or FRAMESxSIZE:SHARE with commas between, frames "
            "4 n + 1, sizes multiples of 16"
        )
    total = sum(b.share for b in found)
    return tuple(replace(b, share=b.share / total) for b in found)


def turn_of(shares: Sequence[float], turn: int) -> int:
    """Which of several has this turn, from 0, so that after any number of turns each had about its share of them.

    The multiples of the golden ratio fill [0, 1) evenly, and each one owns a part of it as large as its share.
    """
    place = turn * _GOLDEN_RATIO % 1.0
    ends = list(accumulate(shares))
    return min(bisect_right(ends, place * ends[-1]), len(ends) - 1)
