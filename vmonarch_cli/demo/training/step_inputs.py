"""What each training step of the transformer sees: clips, captions and noise levels, all fixed by the step's number."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.demo.captions import caption
from vmonarch_cli.demo.model import FLOW_SHIFT, encode_prompts
from vmonarch_cli.demo.training import loop
from vmonarch_cli.demo.training.buckets import Bucket
from vmonarch_cli.demo.training.latent_bank import LatentBank
from vmonarch_cli.demo.transfer import to_device

_EMPTY_CAPTION_SHARE = 0.1


def sigmas_for(step: int, count: int, generator: torch.Generator, shift: float = FLOW_SHIFT) -> Tensor:
    """Noise levels (count,) in (0, 1): logit-normal on even steps, uniform on odd ones, both shifted towards noise."""
    if step % 2 == 0:
        u = torch.sigmoid(torch.randn(count, generator=generator))
    else:
        u = torch.rand(count, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


def shift_for(bucket: Bucket, first: Bucket) -> float:
    """Shift of the noise levels for clips of a bucket, where clips of `first` have FLOW_SHIFT.

    A clip of fewer values has fewer to average noise over: less noise hides as much of it. So the shift grows with the
    square root of the number of values (Esser et al., 2024, "Scaling Rectified Flow Transformers", section 5.3.2).
    """
    return FLOW_SHIFT * math.sqrt(bucket.tokens / first.tokens)


@dataclass(frozen=True)
class StepInputs:
    """What one step sees: its bank's number, rows of it (B,), noise levels (B,) and embeddings (B, L, D); `halved`: the
    second half repeats the first.
    """

    bank: int
    rows: Tensor
    sigmas: Tensor
    text: Tensor
    halved: bool = False


@dataclass(frozen=True)
class InputSource:
    """Draws the inputs of many steps at once, so that no step waits for the host."""

    tokenizer: Any
    text_encoder: Any
    device: torch.device
    batch: int
    """Clips of the first bucket a step; of the others, as many as have about as many tokens."""
    first: Bucket
    """The first bucket, at its full size."""
    seed: int
    """Of what is drawn for a step."""
    shared_seed: int | None = None
    """Of which bank a step takes its clips from, where other processes take theirs from the same; else `seed`."""
    halves_every: int = 0
    """Of so many steps, one has a batch that holds its clips twice, with the same noise and words, and that can be
    quartered; 0: none.
    """

    def halved(self, step: int) -> bool:
        """Whether the second half of a step's batch repeats the first."""
        return self.halves_every > 0 and step % self.halves_every == 0

    def clips(self, bucket: Bucket, *, halved: bool = False) -> int:
        """Clips of a bucket that a step sees, as often as it sees them."""
        count = bucket.equal_count(self.batch, self.first)
        return max(4, count // 4 * 4) if halved else count

    def halved_shapes(self, buckets: Sequence[Bucket]) -> list[tuple[int, int, int]]:
        """Of a batch in halves, of each bucket: clips, latent frames and tokens."""
        return [(self.clips(bucket, halved=True), bucket.grid[0], bucket.tokens) for bucket in buckets]

    def bank_of(self, step: int, banks: Sequence[LatentBank]) -> int:
        """The number of the bank that a step takes its clips from."""
        shares = [bank.bucket.share for bank in banks]
        seed = self.seed if self.shared_seed is None else self.shared_seed
        return random.Random(f"bank/{_of_step(seed, step)}").choices(range(len(banks)), weights=shares)[0]

    @torch.no_grad()
    def draw(self, steps: Sequence[tuple[int, int]], banks: Sequence[LatentBank]) -> list[StepInputs]:
        """Inputs of steps, each a step's number and that of its bank.

        The host's part comes first and waits for nothing, so that it passes while the device works on earlier steps.
        """
        drawn = [self._drawn(number, banks[which]) for number, which in steps]
        counts = [len(rows) for rows, _, _ in drawn]
        all_rows = to_device(torch.tensor([row for rows, _, _ in drawn for row in rows]), self.device)
        all_sigmas = to_device(torch.cat([sigmas for _, sigmas, _ in drawn]), self.device)
        with loop.autocast(self.device):
            texts = encode_prompts(self.tokenizer, self.text_encoder, [said for _, _, part in drawn for said in part])
        parts = zip(all_rows.split(counts), all_sigmas.split(counts), texts.split(counts), strict=True)
        inputs = []
        for (number, which), (rows, sigmas, text) in zip(steps, parts, strict=True):
            halved = self.halved(number)
            copies = 2 if halved else 1
            inputs.append(
                StepInputs(which, rows.repeat(copies), sigmas.repeat(copies), text.repeat(copies, 1, 1), halved)
            )
        return inputs

    def trial(self, step: int, which: int, banks: Sequence[LatentBank]) -> StepInputs:
        """Inputs from a bank for a trial about a step; in halves where any step's are."""
        return self.draw([(step - step % max(self.halves_every, 1), which)], banks)[0]

    def _drawn(self, number: int, bank: LatentBank) -> tuple[list[int], Tensor, list[str]]:
        """Rows of a bank, noise levels and captions of the different clips of a step, on the host."""
        halved = self.halved(number)
        clips = self.clips(bank.bucket, halved=halved) // (2 if halved else 1)
        rng = random.Random(self.seed_of(number))
        rows = [rng.randrange(len(bank.specs)) for _ in range(clips)]
        said = ["" if rng.random() < _EMPTY_CAPTION_SHARE else caption(bank.specs[i], rng) for i in rows]
        generator = torch.Generator().manual_seed(self.seed_of(number))
        return rows, sigmas_for(number, clips, generator, shift_for(bank.bucket, self.first)), said

    def seed_of(self, step: int) -> int:
        """The seed of everything that is drawn for a step."""
        return _of_step(self.seed, step)


def _of_step(seed: int, step: int) -> int:
    return seed * 1_000_003 + step
