"""Trains the diffusion transformer by flow matching on cached latents, with a text encoder that no longer changes.

Run it with `python -m vmonarch_cli.demo.training dit --vae DIR/vae --text DIR --out DIR --seconds 480`. Clips are
rendered and encoded into a bank of latents on the GPU, which is refreshed a little every few steps; every use of a
clip gets a new caption. The first part of the training sees clips of half the size, four times as many of them a step.

Most of a clip is background, and what a caption says is mostly about the objects. Two things turn the training towards
them until they fade in its second half: the loss weighs more where objects are, and a small head (not exported) reads
the objects' outlines from the middle of the transformer.

With `--structured`, half of every batch repeats the other half's clips with Monarch attention, as the paper tunes its
models, and the loss also asks that both halves agree.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmonarch_cli.demo.captions import caption, plain_caption
from vmonarch_cli.demo.clips import FPS, NUM_FRAMES, SIZE, frame_times, occupancy, render
from vmonarch_cli.demo.model import (
    DIT_PRESETS,
    FLOW_SHIFT,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    config_dict,
    encode_prompts,
    export_pipeline,
    latent_stats,
)
from vmonarch_cli.demo.specs import ClipSpec, sample_spec
from vmonarch_cli.demo.training import loop as training
from vmonarch_cli.demo.training.structured import halve_attention
from vmonarch_cli.demo.training.train_text import load_text_encoder
from vmonarch_cli.demo.training.train_vae import exported
from vmonarch_cli.families.wan_vae import encode_mean
from vmonarch_cli.models.demo_vocabulary import MAX_TOKENS

_EMPTY_CAPTION_SHARE = 0.1
_OBJECT_WEIGHT = 4.0  # added to the loss's weight where an object covers everything
_OUTLINE_WEIGHT = 0.2  # of the outlines' cross-entropy against the flow-matching loss
_AGREEMENT_WEIGHT = 2.0  # of what dense and Monarch attention differ by, with --structured
_OUTLINE_BLOCK = 4  # the block after which outlines are read (counted from 0)
_OUTLINE_SIDE = 4  # each token says in 4 x 4 values where objects are
_REPORTS_BEFORE = ("vae_report.json", "text_report.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train dit`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the log and weights/")
    parser.add_argument("--vae", type=Path, required=True, help="the vae folder that `train vae` exported")
    parser.add_argument("--seconds", type=float, default=480.0, help="wall-clock limit of this run")
    parser.add_argument("--total-seconds", type=float, help="planned seconds of all runs (default: this run's)")
    parser.add_argument("--reserve", type=float, default=40.0, help="seconds kept for export and samples")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--init", type=Path, help="start from an exported weights folder (weights only)")
    parser.add_argument("--text", type=Path, required=True, help="the folder that `train text` exported to")
    parser.add_argument("--max-steps", type=int, help="schedule by steps, not by seconds (reproducible)")
    parser.add_argument("--stop-after", type=int, help="interrupt this run at that step")
    parser.add_argument("--preset", choices=sorted(DIT_PRESETS), default="default")
    parser.add_argument("--batch", type=int, default=64, help="clips a step")
    parser.add_argument("--bank", type=int, default=20_000, help="clips whose latents are kept on the device")
    parser.add_argument("--bank-seconds", type=float, default=45.0, help="stop filling the bank after so long")
    parser.add_argument("--encode-batch", type=int, default=16)
    parser.add_argument("--refresh-every", type=int, default=32, help="steps between two refreshes of the bank")
    parser.add_argument("--refresh", type=int, default=32, help="clips replaced at a refresh")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--small-until", type=float, default=0.5, help="share of the training at half the size")
    parser.add_argument(
        "--structured",
        action="store_true",
        help="half of each batch repeats the other half with Monarch attention (--batch: a multiple of 4)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--profile-steps", type=int, default=40, help="log every fifth of the first steps")
    parser.add_argument("--samples", type=int, default=8, help="held-out prompts on the sheet at the end")
    parser.add_argument("--sample-steps", type=int, default=20)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is up, then export a pipeline and draw samples with it; returns the report."""
    device = training.pick_device(args.device)
    training.tune_backend(device)
    torch.manual_seed(args.seed)
    log = training.JsonLog(args.out / "dit_log.jsonl")
    trainer = _Trainer(args, device, log)
    if args.resume:
        trainer.load(args.out / "dit_checkpoint.pt")
    trainer.bank.fill()
    trainer.train()
    return trainer.finish()


def sigmas_for(step: int, count: int, generator: torch.Generator, shift: float = FLOW_SHIFT) -> Tensor:
    """Noise levels (count,) in (0, 1): logit-normal on even steps, uniform on odd ones, both shifted towards noise."""
    if step % 2 == 0:
        u = torch.sigmoid(torch.randn(count, generator=generator))
    else:
        u = torch.rand(count, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


class LatentBank:
    """Normalised latents of rendered training clips and where their objects are, kept on the device in float16.

    Args:
        vae: the frozen autoencoder, float32, with measured latent statistics in its config.
        capacity: clips to hold.

    """

    def __init__(
        self, vae: Any, device: torch.device, log: training.JsonLog, *, capacity: int, batch: int, size: int, seed: int,
        seconds: float,
    ) -> None:  # fmt: skip
        self.vae, self.device, self.log = vae, device, log
        self.capacity, self.batch, self.size, self.seed, self.seconds = capacity, batch, size, seed, seconds
        self.next_clip = 0
        self._numbers = list(range(capacity))
        self.specs: list[ClipSpec] = []
        self._mean, self._std = latent_stats(vae, device)
        # A GPU's convolutions want channels last, a CPU's do not care.
        self._layout = training.set_layout(vae, channels_last=device.type == "cuda")
        self._oldest = 0
        side = size // 4
        frames = (NUM_FRAMES - 1) // 4 + 1
        self.latents = torch.empty(capacity, vae.config.z_dim, frames, side, side, dtype=torch.float16, device=device)
        self.outlines = torch.empty(capacity, frames, 2 * side, 2 * side, dtype=torch.float16, device=device)
        self._outline_times = frame_times()[::4]

    def _put(self, row: int, specs: list[ClipSpec]) -> None:
        """Render, encode and keep clips from a row on."""
        rows = slice(row, row + len(specs))
        self.latents[rows] = self.encode(specs).to(torch.float16)
        covered = occupancy(specs, self._outline_times, size=self.outlines.shape[-1], device=self.device)
        self.outlines[rows] = covered.to(torch.float16)

    @torch.no_grad()
    def encode(self, specs: list[ClipSpec]) -> Tensor:
        """Normalised latents (B, z, T, h, w) of freshly rendered clips."""
        video = render(specs, size=self.size, device=self.device).contiguous(memory_format=self._layout)
        with training.autocast(self.device):
            latents = encode_mean(self.vae, video)
        normalised: Tensor = (latents.float() - self._mean) / self._std
        return normalised

    def restore(self, clips: int, next_clip: int) -> None:
        """Make `fill` bring back the bank of an earlier run: clip n always lies in row n modulo the bank's size."""
        self.next_clip = next_clip
        self._numbers = [next_clip - 1 - (next_clip - 1 - row) % clips for row in range(min(clips, self.capacity))]

    def fill(self) -> None:
        """Fill the bank, or as much of it as the time allows."""
        start = last = time.monotonic()
        while len(self.specs) < len(self._numbers) and time.monotonic() - start < self.seconds:
            done = len(self.specs)
            specs = [sample_spec("train", self.seed, n) for n in self._numbers[done : done + self.batch]]
            self._put(done, specs)
            self.specs.extend(specs)
            training.synchronize(self.device)
            if time.monotonic() - last > 10:
                last = time.monotonic()
                self.log.write("bank", clips=len(self.specs), clips_per_second=len(self.specs) / (last - start))
        self.next_clip = max(self.next_clip, len(self.specs))
        self._oldest = self.next_clip % len(self.specs)
        sample = self.latents[: min(len(self.specs), 512)].float()
        self.log.write(
            "bank_full", clips=len(self.specs), took=time.monotonic() - start, mean=float(sample.mean()),
            std=float(sample.std()), memory_gb=training.gpu_memory_gb(self.device),
        )  # fmt: skip

    def refresh(self, count: int) -> None:
        """Replace the oldest clips by new ones."""
        count = min(count, len(self.specs) - self._oldest)
        if count <= 0:
            return
        specs = [sample_spec("train", self.seed, self.next_clip + i) for i in range(count)]
        self.next_clip += count
        self._put(self._oldest, specs)
        self.specs[self._oldest : self._oldest + count] = specs
        self._oldest = (self._oldest + count) % len(self.specs)


@dataclass(frozen=True)
class _Plan:
    """What steps `begin`, `begin` + 1, ... see: bank rows (S, B), noise levels (S, B), embeddings (S, B, L, D)."""

    begin: int
    rows: Tensor
    sigmas: Tensor
    text: Tensor

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        i = step - self.begin
        return self.rows[i], self.sigmas[i], self.text[i]


class _OutlineHead(nn.Module):
    """Reads from the tokens in the middle of the transformer where objects are; used in training alone.

    It makes the first blocks find out early, from noise and words, what is where: the idea of REPA (Yu et al., 2024),
    with the renderer's own knowledge in place of another network's.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(dim, elementwise_affine=False),
            nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, _OUTLINE_SIDE**2),
        )  # fmt: skip
        self._tokens: Tensor | None = None

    def listen_to(self, transformer: Any) -> None:
        """Keep what the middle block returns, compiled or not; call it again after (un)compiling the block."""
        block = transformer.blocks[min(_OUTLINE_BLOCK, len(transformer.blocks) - 1)]
        run = block._compiled_call_impl or block._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            self._tokens = run(*args, **kwargs)
            return self._tokens

        # Outside the compiled code: a hook would be traced into this block and keep it from sharing the others' code.
        block._compiled_call_impl = call

    def loss(self, covered: Tensor) -> Tensor:
        """Mean cross-entropy of the last call's tokens, read as coverage, against `covered` (B, T, h, w) in [0, 1]."""
        if self._tokens is None:
            raise RuntimeError("outlines: the transformer has not run since listen_to")
        target = F.pixel_unshuffle(covered, _OUTLINE_SIDE)
        batch, channels, rows, columns = target.shape
        patches = _OUTLINE_SIDE**2
        target = target.view(batch, channels // patches, patches, rows, columns).permute(0, 1, 3, 4, 2)
        read = self.layers(self._tokens).view(target.shape)
        self._tokens = None
        return F.binary_cross_entropy_with_logits(read.float(), target)


class _Trainer:
    def __init__(self, args: argparse.Namespace, device: torch.device, log: training.JsonLog) -> None:
        self.args, self.device, self.log = args, device, log
        vae = exported(args.vae, device).requires_grad_(False)
        dit_config, self.text_config = DIT_PRESETS[args.preset]
        self.dit_config = replace(dit_config, z_dim=vae.config.z_dim)
        self.transformer = build_transformer(self.dit_config).to(device).train()
        self.text_encoder = build_text_encoder(self.text_config).to(device).eval().requires_grad_(False)
        self.tokenizer = build_tokenizer()
        load_text_encoder(self.text_encoder, args.text)
        if args.init is not None:
            self._load_transformer(args.init)
        self.averaged = copy.deepcopy(self.transformer).eval()
        if args.structured:
            if args.batch % 4:
                raise ValueError(f"--batch: got {args.batch}; with --structured, valid are multiples of 4")
            halve_attention(self.transformer, frames=(NUM_FRAMES - 1) // 4 + 1)
        self.outline_head = _OutlineHead(self.dit_config.num_heads * self.dit_config.head_dim).to(device)
        self.ema = training.Ema([self.transformer], [self.averaged], args.ema)
        self.optimizer = torch.optim.AdamW(
            [*self.transformer.parameters(), *self.outline_head.parameters()],
            lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda",
        )  # fmt: skip
        self.guarded_step = training.GuardedStep(self.optimizer, max_norm=1.0)
        self.vae = vae
        self.clock = training.Clock(
            args.seconds, args.total_seconds or args.seconds, args.reserve,
            max_steps=args.max_steps, stop_after=args.stop_after,
        )  # fmt: skip
        self.step = self.clips_seen = self.distinct_before = 0
        self.last_loss = float("nan")
        self.bank = self._bank()
        self._plan: _Plan | None = None

    @property
    def size(self) -> int:
        """Side of the clips at this point: half the size first, where a step sees four times as many clips and what
        moves where is learned just as well.
        """
        size: int = self.args.size
        return size // 2 if self.clock.position(self.step) < self.args.small_until else size

    @property
    def batch(self) -> int:
        """Clips a step, so that every step has about as many tokens."""
        return int(self.args.batch * (self.args.size // self.bank.size) ** 2)

    @property
    def _copies(self) -> int:
        """How often a batch holds each of its clips, with the same noise and words."""
        return 2 if self.args.structured else 1

    def _bank(self) -> LatentBank:
        a, size = self.args, self.size
        batch = a.encode_batch * (a.size // size) ** 2
        return LatentBank(
            self.vae,
            self.device,
            self.log,
            capacity=a.bank,
            batch=batch,
            size=size,
            seed=a.seed,
            seconds=a.bank_seconds,
        )

    def _load_transformer(self, directory: Path) -> None:
        from diffusers import WanTransformer3DModel

        transformer = WanTransformer3DModel.from_pretrained(directory / "transformer").float()
        self.transformer.load_state_dict(transformer.state_dict())

    def train(self) -> None:
        tokens = math.prod(self.bank.latents.shape[2:]) // 4
        with training.fastest_attention(
            self.log, self.device, (self.batch, self.dit_config.num_heads, tokens, self.dit_config.head_dim)
        ):
            self._train()

    def _train(self) -> None:
        if self.args.compile:
            self._compile()
        else:
            self.outline_head.listen_to(self.transformer)
        self.clock.start()
        last_save = last_log = time.monotonic()
        logged = first = self.step
        running: list[tuple[Tensor, ...]] = []
        while not self.clock.over(self.step):
            if self.size != self.bank.size:
                self._grow()
                last_log, logged = time.monotonic(), self.step
                running.clear()
            if self.step % self.args.refresh_every == 0 and self.step > first:
                self.bank.refresh(self.args.refresh)
                self._plan = None
            running.append(self.train_step())
            if (self.step - first <= self.args.profile_steps and self.step % 5 == 0) or self.step % 100 == 0:
                self.last_loss, outlines, disagreement = self._means(running)
                running.clear()
                now = time.monotonic()
                steps = self.step - logged
                self.log.write(
                    "step", step=self.step, position=self.clock.position(self.step), loss=self.last_loss,
                    outlines=outlines, disagreement=disagreement, lr=self.optimizer.param_groups[0]["lr"],
                    seconds_per_step=(now - last_log) / steps,
                    clips_per_second=steps * self.batch / (now - last_log), size=self.bank.size,
                    memory_gb=training.gpu_memory_gb(self.device), skipped=self.guarded_step.skipped,
                )  # fmt: skip
                if self.guarded_step.skipped > 20:
                    raise FloatingPointError(f"training diverged at step {self.step}: loss {self.last_loss}")
                last_log, logged = now, self.step
            if time.monotonic() - last_save > self.args.checkpoint_every:
                self.save()
                last_save = time.monotonic()
        if running:
            self.last_loss = self._means(running)[0]
        self.save()

    @staticmethod
    def _means(losses: list[tuple[Tensor, ...]]) -> list[float]:
        """Mean over steps of each of their losses (waits for the device)."""
        return [float(torch.stack(values).mean()) for values in zip(*losses, strict=True)]

    def _grow(self) -> None:
        """Go on with clips of the whole size; filling their bank does not move the schedule."""
        began = time.monotonic()
        self.distinct_before += self.bank.next_clip
        del self.bank
        self.bank = self._bank()
        self.bank.fill()
        self._plan = None
        if self.args.compile:
            self._trial()
        self.clock.exclude(time.monotonic() - began)

    def _compile(self) -> None:
        """Compile the blocks and try them on one step; if that fails, say so and go on eagerly."""
        self.transformer.compile_repeated_blocks(dynamic=False)
        self.outline_head.listen_to(self.transformer)
        if not self._trial():
            for block in self.transformer.blocks:
                block._compiled_call_impl = None
            self.outline_head.listen_to(self.transformer)

    def _trial(self) -> bool:
        """Compile for this size by trying a step without an update; whether it worked."""
        worked = training.trial(self.log, "dit", self.device, lambda: self.losses()[0].backward())
        self.optimizer.zero_grad(set_to_none=True)
        return worked

    @torch.no_grad()
    def _plan_steps(self) -> _Plan:
        """Draw clips, captions and noise levels up to the next refresh, all fixed by the steps' numbers.

        Made for many steps at once, so that no step waits for the host.
        """
        every = self.args.refresh_every
        begin = self.step - self.step % every
        rows, prompts, sigmas = [], [], []
        # A smaller clip has fewer values to average noise over: less noise hides as much of it.
        shift = FLOW_SHIFT * self.bank.size / self.args.size
        copies = self._copies
        for step in range(begin, begin + every):
            rng = random.Random(self._seed(step))
            chosen = [rng.randrange(len(self.bank.specs)) for _ in range(self.batch // copies)]
            rows.append(chosen * copies)
            prompts += ["" if rng.random() < _EMPTY_CAPTION_SHARE else caption(self.bank.specs[i], rng) for i in chosen]
            generator = torch.Generator().manual_seed(self._seed(step))
            sigmas.append(sigmas_for(step, self.batch // copies, generator, shift).repeat(copies))
        with training.autocast(self.device):
            text = encode_prompts(self.tokenizer, self.text_encoder, prompts)
        return _Plan(
            begin, torch.tensor(rows, device=self.device), torch.stack(sigmas).to(self.device),
            text.view(every, self.batch // copies, *text.shape[1:]).repeat(1, copies, 1, 1),
        )  # fmt: skip

    def _seed(self, step: int) -> int:
        return int(self.args.seed * 1_000_003 + step)

    def losses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What this step minimises; its flow-matching loss, the cross-entropy of its outlines, and the mean squared
        difference of dense and Monarch attention's velocities (scalars).
        """
        if self._plan is None:
            self._plan = self._plan_steps()
        rows, sigma, text = self._plan.at(self.step)
        clean = self.bank.latents[rows].float()
        covered = self.bank.outlines[rows].float()
        generator = torch.Generator(self.device).manual_seed(self._seed(self.step))
        distinct = len(clean) // self._copies
        noise = torch.randn(clean[:distinct].shape, generator=generator, device=self.device)
        noise = noise.repeat(self._copies, 1, 1, 1, 1)
        mix = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise
        with training.autocast(self.device):
            velocity = self.transformer(noisy, sigma * 1000, text, return_dict=False)[0]
            outlines = self.outline_head.loss(covered)
        errors = (velocity.float() - (noise - clean)).square().mean(1)
        emphasis = max(0.0, min(1.0, (0.85 - self.clock.position(self.step)) / 0.35))
        weight = 1 + emphasis * _OBJECT_WEIGHT * F.avg_pool2d(covered, 2)
        objective = (errors * weight).mean() / weight.mean()
        if not self.args.structured:  # a tuning starts from a transformer that knows where things are
            objective = objective + emphasis * _OUTLINE_WEIGHT * outlines
        dense, structured = velocity.float().chunk(2) if self.args.structured else (velocity, velocity)
        disagreement = F.mse_loss(structured, dense)
        if self.args.structured:
            objective = objective + _AGREEMENT_WEIGHT * disagreement
        return objective, errors.mean().detach(), outlines.detach(), disagreement.detach()

    def train_step(self) -> tuple[Tensor, ...]:
        """One step; returns what `losses` measures (scalars on the device)."""
        for group in self.optimizer.param_groups:
            position = self.clock.position(self.step)
            group["lr"] = training.learning_rate(self.args.lr, position, self.step, warmup=200)
        objective, *measured = self.losses()
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self.guarded_step()
        self.step += 1
        self.clips_seen += self.batch
        self.ema.update(self.step)
        return tuple(measured)

    def save(self) -> None:
        training.save_checkpoint(
            self.args.out / "dit_checkpoint.pt",
            {
                "preset": self.args.preset,
                "transformer": self.transformer.state_dict(),
                "outline_head": self.outline_head.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "clips_seen": self.clips_seen,
                "distinct_before": self.distinct_before,
                "size": self.bank.size,
                "next_clip": self.bank.next_clip,
                "bank_clips": len(self.bank.specs),
                "elapsed": self.clock.elapsed(),
            },
        )
        self.log.write("checkpoint", step=self.step, elapsed=self.clock.elapsed())

    def load(self, path: Path) -> None:
        state = training.load_checkpoint(path, self.device)
        if state["preset"] != self.args.preset:
            raise ValueError(f"--preset: the checkpoint holds {state['preset']!r}, got {self.args.preset!r}")
        self.transformer.load_state_dict(state["transformer"])
        self.outline_head.load_state_dict(state["outline_head"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        training.conform_optimizer(self.optimizer)
        self.step, self.clips_seen, self.distinct_before = (
            state[name] for name in ("step", "clips_seen", "distinct_before")
        )
        self.clock.before = state["elapsed"]
        self.bank = self._bank()
        if self.bank.size == state["size"]:
            self.bank.restore(state["bank_clips"], state["next_clip"])
        self.log.write("resumed", step=self.step, elapsed=self.clock.before)

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Export the averaged weights with the autoencoder as one pipeline, and draw samples as a user would."""
        weights = self.args.out / "weights"
        training.set_layout(self.bank.vae, channels_last=False)
        vae, transformer, text = (copy.deepcopy(m) for m in (self.bank.vae, self.averaged, self.text_encoder))
        export_pipeline(weights, vae, transformer, text, self.tokenizer)
        summary: dict[str, Any] = {
            "trained": "transformer",
            "loss": self.last_loss,
            "preset": self.args.preset,
            "transformer": config_dict(self.dit_config),
            "text_encoder": config_dict(self.text_config),
            "transformer_parameters": sum(p.numel() for p in self.transformer.parameters()),
            "text_encoder_parameters": sum(p.numel() for p in self.text_encoder.parameters()),
            "steps": self.step,
            "clips": self.clips_seen,
            "distinct_clips": self.distinct_before + self.bank.next_clip,
            "seconds": self.clock.elapsed(),
            "structured": self.args.structured,
            "device": training.device_name(self.device),
            "before": self._report_of_init(),
            "folder_megabytes": sum(f.stat().st_size for f in weights.rglob("*") if f.is_file()) / 1e6,
        }
        (self.args.out / "dit_report.json").write_text(json.dumps(summary, indent=2) + "\n")
        for folder, name in zip((self.args.vae.parent, self.args.text), _REPORTS_BEFORE, strict=True):
            if (folder / name).is_file() and folder.resolve() != self.args.out.resolve():
                shutil.copy(folder / name, self.args.out / name)
        self.log.write("exported", **{k: v for k, v in summary.items() if isinstance(v, int | float | str)})
        if self.args.samples:
            del self.optimizer, self.bank.latents
            self._sample(weights)
        return summary

    def _report_of_init(self) -> dict[str, Any] | None:
        """The report of the training that made the weights that this one started from."""
        path = None if self.args.init is None else self.args.init / "training" / "dit_report.json"
        if path is None or not path.is_file():
            return None
        report: dict[str, Any] = json.loads(path.read_text())
        return report

    def _sample(self, weights: Path) -> None:
        from diffusers import WanPipeline

        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        pipeline = WanPipeline.from_pretrained(weights, dtype=dtype).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        specs = [sample_spec("heldout", 1, i) for i in range(self.args.samples)]
        prompts = [plain_caption(s) for s in specs]
        start = time.monotonic()
        frames = pipeline(
            prompts, height=self.args.size, width=self.args.size, num_frames=NUM_FRAMES, guidance_scale=4.0,
            num_inference_steps=self.args.sample_steps, max_sequence_length=MAX_TOKENS, output_type="pt",
            generator=[torch.Generator(self.device).manual_seed(i) for i in range(len(specs))],
        ).frames  # fmt: skip
        clips = frames.float().permute(0, 2, 1, 3, 4) * 2 - 1
        training.save_sheet(self.args.out / "dit_sheet.png", list(clips))
        self.log.write("samples", prompts=prompts, took=time.monotonic() - start, frames_per_second=FPS)
