"""The banks of all lengths and sizes that one training mixes."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from vmonarch_cli.demo.training import loop
from vmonarch_cli.demo.training.buckets import Bucket, turn_of
from vmonarch_cli.demo.training.latent_bank import BankLimits, LatentBank


class BankSet:
    """A bank for each of `--clips`, all of half the size or all of the whole one.

    Args:
        args: the flags of `train dit`.
        encoder: the frozen autoencoder.
        device: where everything lies.
        log: told about the filling.
        seed: of the clips.

    """

    def __init__(
        self, args: argparse.Namespace, encoder: Any, device: torch.device, log: loop.JsonLog, *, seed: int
    ) -> None:
        self._args, self._encoder, self._device, self._log, self._seed = args, encoder, device, log, seed
        self.banks: list[LatentBank] = []
        self.small = False
        self.seconds = 0.0
        """Of filling so far."""
        self._replaced = 0

    def open(self, *, small: bool) -> None:
        """Empty banks, for clips of half the size or the whole one, in place of those before."""
        self._replaced = self.distinct
        self.small = small
        self.banks.clear()  # before the new ones take memory
        self.banks.extend(self._bank(bucket) for bucket in self._args.clips)

    def _bank(self, bucket: Bucket) -> LatentBank:
        a, first = self._args, self._args.clips[0]
        # At half the size as many clips are kept, each of a quarter of the memory.
        kept = round(bucket.share * bucket.equal_count(a.bank, first))
        shown = bucket.halved() if self.small else bucket
        at_once = shown.equal_count(a.encode_batch, first)
        limits = BankLimits.in_batches(kept, at_once, a.bank_seconds * bucket.share)
        return LatentBank(self._encoder, self._device, self._log, bucket=shown, limits=limits, seed=self._seed)

    def fill(self) -> None:
        """Render and encode what the banks hold."""
        began = time.monotonic()
        for bank in self.banks:
            bank.fill()
        self.seconds += time.monotonic() - began

    def refresh(self, turn: int) -> None:
        """Replace the oldest clips of one bank; each has its turn as often as its share says.

        Training takes clips from a bank by its share, too, so clips of all lengths are seen equally often before they
        go.
        """
        bank = self.banks[turn_of([bank.bucket.share for bank in self.banks], turn)]
        bank.refresh(bank.bucket.equal_count(self._args.refresh, self._args.clips[0]))

    @property
    def distinct(self) -> int:
        """Different clips that were rendered so far."""
        return self._replaced + sum(bank.next_clip for bank in self.banks)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the banks."""
        return {
            "distinct_before": self._replaced,
            "banks": [(bank.bucket.name, len(bank.specs), bank.next_clip) for bank in self.banks],
        }

    def restore(self, state: dict[str, Any], *, small: bool) -> None:
        """Make `fill` bring back the clips of a checkpoint, unless their size is another one by now."""
        self.open(small=small)
        self._replaced = state["distinct_before"]
        for bank, (name, clips, next_clip) in zip(self.banks, state["banks"], strict=True):
            if bank.bucket.name == name:
                bank.restore(clips, next_clip)
