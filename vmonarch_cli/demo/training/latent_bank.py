"""The latents that the transformer trains on, kept on the device and renewed a little every few steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.demo.clips import frame_times, motions_at, occupancy, render
from vmonarch_cli.demo.model import latent_stats
from vmonarch_cli.demo.specs import ClipSpec, sample_spec
from vmonarch_cli.demo.training import loop
from vmonarch_cli.demo.training.buckets import Bucket
from vmonarch_cli.demo.transfer import to_device
from vmonarch_cli.families.wan_vae import encode_mean
from vmonarch_cli.models.demo_vocabulary import MOTIONS


@dataclass(frozen=True)
class BankLimits:
    """What a bank may take: clips in all, clips encoded at a time, seconds of filling."""

    clips: int
    at_once: int
    seconds: float

    @classmethod
    def in_batches(cls, clips: int, at_once: int, seconds: float) -> BankLimits:
        """At most so many clips, one at least, and of those above `at_once` only whole batches: cuDNN searches its
        fastest convolutions anew for every number of clips.
        """
        clips = max(1, clips)
        return cls(clips - clips % at_once or clips, at_once, seconds)


class LatentBank:
    """Normalised latents of rendered training clips, where their objects are and how they move, kept on the device in
    float16.

    Args:
        vae: the frozen autoencoder, which encodes in its own dtype, with measured latent statistics in its config.
        device: where everything lies.
        log: told about the filling.
        bucket: length and size of the clips.
        limits: how many clips, and how long filling may take; one encoding is made in any case.
        seed: of the clips.

    """

    def __init__(
        self, vae: Any, device: torch.device, log: loop.JsonLog, *, bucket: Bucket, limits: BankLimits, seed: int
    ) -> None:
        self.vae, self.device, self.log = vae, device, log
        self.bucket, self.limits, self.seed = bucket, limits, seed
        self.next_clip = 0
        self._numbers = list(range(limits.clips))
        self.specs: list[ClipSpec] = []
        self._mean, self._std = latent_stats(vae, device)
        # A GPU's convolutions want channels last, a CPU's do not care.
        self._layout = loop.set_layout(vae, channels_last=device.type == "cuda")
        self._oldest = 0
        frames, rows, columns = bucket.grid
        half = torch.float16
        self.latents = torch.empty(limits.clips, vae.config.z_dim, frames, rows, columns, dtype=half, device=device)
        self.outlines = torch.empty(limits.clips, frames, 2 * rows, 2 * columns, dtype=half, device=device)
        self.moving = torch.empty(limits.clips, frames, len(MOTIONS), dtype=half, device=device)
        self._times = frame_times(bucket.frames)

    def _put(self, row: int, specs: list[ClipSpec]) -> None:
        """Render, encode and keep clips from a row on."""
        rows = slice(row, row + len(specs))
        self.latents[rows] = self.encode(specs).to(torch.float16)
        times = self._times[::4]  # of latent frames
        covered = occupancy(specs, times, size=self.outlines.shape[-1], device=self.device)
        self.outlines[rows] = covered.to(torch.float16)
        self.moving[rows] = to_device(torch.stack([motions_at(spec, times) for spec in specs]), self.device).half()

    @torch.no_grad()
    def encode(self, specs: list[ClipSpec]) -> Tensor:
        """Normalised latents (B, z, T, h, w) of freshly rendered clips."""
        video = render(specs, self._times, size=self.bucket.size, device=self.device)
        latents = encode_mean(self.vae, video.to(self.vae.dtype).contiguous(memory_format=self._layout))
        normalised: Tensor = (latents.float() - self._mean) / self._std
        return normalised

    def restore(self, clips: int, next_clip: int) -> None:
        """Make `fill` bring back the bank of an earlier run: clip n always lies in row n modulo the bank's size."""
        self.next_clip = next_clip
        self._numbers = [next_clip - 1 - (next_clip - 1 - row) % clips for row in range(min(clips, self.limits.clips))]

    def fill(self) -> None:
        """Fill the bank, or as much of it as the time allows; FloatingPointError for latents that are not finite."""
        start = time.monotonic()
        before = loop.queued(self.device)
        while len(self.specs) < len(self._numbers) and (
            not self.specs or time.monotonic() - start < self.limits.seconds
        ):
            done = len(self.specs)
            specs = [self._spec(number) for number in self._numbers[done : done + self.limits.at_once]]
            self._put(done, specs)
            self.specs.extend(specs)
            before()  # one batch ahead: the host prepares it while the device encodes the one before
            before = loop.queued(self.device)
        loop.synchronize(self.device)
        self.next_clip = max(self.next_clip, len(self.specs))
        self._oldest = self.next_clip % len(self.specs)
        sample = self.latents[: min(len(self.specs), 512)].float()
        if not sample.isfinite().all():
            raise FloatingPointError(f"--vae: it encodes clips of {self.bucket.name} to latents that are not finite")
        self.log.write(
            "bank_full", bucket=self.bucket.name, clips=len(self.specs), took=time.monotonic() - start,
            mean=float(sample.mean()), std=float(sample.std()), memory_gb=loop.gpu_memory_gb(self.device),
        )  # fmt: skip

    def refresh(self, count: int) -> None:
        """Replace the oldest clips by new ones, in whole batches where they are more than one."""
        at_once = self.limits.at_once
        count = min(BankLimits.in_batches(count, at_once, 0.0).clips, len(self.specs) - self._oldest)
        for done in range(0, count, at_once):
            specs = [self._spec(self.next_clip + i) for i in range(min(at_once, count - done))]
            self._put(self._oldest, specs)
            self.specs[self._oldest : self._oldest + len(specs)] = specs
            self.next_clip += len(specs)
            self._oldest = (self._oldest + len(specs)) % len(self.specs)

    def _spec(self, number: int) -> ClipSpec:
        return sample_spec("train", self.seed, number, self.bucket.frames)
