"""What each training step of the transformer sees: clips, captions and noise levels, all fixed by the step's number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.demo.captions import caption
from vmonarch_cli.demo.model import FLOW_SHIFT, encode_prompts
from vmonarch_cli.demo.training import loop
from vmonarch_cli.demo.training.latent_bank import LatentBank

_EMPTY_CAPTION_SHARE = 0.1


def sigmas_for(step: int, count: int, generator: torch.Generator, shift: float = FLOW_SHIFT) -> Tensor:
    """Noise levels (count,) in (0, 1): logit-normal on even steps, uniform on odd ones, both shifted towards noise."""
    if step % 2 == 0:
        u = torch.sigmoid(torch.randn(count, generator=generator))
    else:
        u = torch.rand(count, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class StepInputs:
    """What steps `begin`, `begin` + 1, ... see: bank rows (S, B), noise levels (S, B), embeddings (S, B, L, D)."""

    begin: int
    rows: Tensor
    sigmas: Tensor
    text: Tensor

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        i = step - self.begin
        return self.rows[i], self.sigmas[i], self.text[i]


@dataclass(frozen=True)
class InputSource:
    """Draws the inputs of `every` steps at once, so that no step waits for the host."""

    tokenizer: Any
    text_encoder: Any
    device: torch.device
    every: int
    """Steps between two refreshes of the bank: a draw holds until the next."""
    size: int
    """Side of the clips at the end of the training, in pixels."""
    seed: int

    @torch.no_grad()
    def draw(self, step: int, bank: LatentBank, clips: int, copies: int) -> StepInputs:
        """Inputs of the steps up to the bank's next refresh.

        Args:
            step: the step that comes next.
            bank: where clips are taken from.
            clips: distinct clips a step.
            copies: how often a batch holds each of them, with the same noise and words.

        """
        begin = step - step % self.every
        rows, prompts, sigmas = [], [], []
        # A smaller clip has fewer values to average noise over: less noise hides as much of it.
        shift = FLOW_SHIFT * bank.size / self.size
        for number in range(begin, begin + self.every):
            rng = random.Random(self.seed_of(number))
            chosen = [rng.randrange(len(bank.specs)) for _ in range(clips)]
            rows.append(chosen * copies)
            prompts += ["" if rng.random() < _EMPTY_CAPTION_SHARE else caption(bank.specs[i], rng) for i in chosen]
            generator = torch.Generator().manual_seed(self.seed_of(number))
            sigmas.append(sigmas_for(number, clips, generator, shift).repeat(copies))
        with loop.autocast(self.device):
            text = encode_prompts(self.tokenizer, self.text_encoder, prompts)
        return StepInputs(
            begin,
            torch.tensor(rows, device=self.device),
            torch.stack(sigmas).to(self.device),
            text.view(self.every, clips, *text.shape[1:]).repeat(1, copies, 1, 1),
        )

    def seed_of(self, step: int) -> int:
        """The seed of everything that is drawn for a step."""
        return self.seed * 1_000_003 + step
