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
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_cli.demo.clips import NUM_FRAMES
from vmonarch_cli.demo.model import (
    DIT_PRESETS,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    config_dict,
    export_pipeline,
)
from vmonarch_cli.demo.training import loop
from vmonarch_cli.demo.training.latent_bank import LatentBank
from vmonarch_cli.demo.training.outlines import OutlineHead
from vmonarch_cli.demo.training.samples import draw_samples
from vmonarch_cli.demo.training.step_inputs import InputSource, StepInputs
from vmonarch_cli.demo.training.structured import halve_attention
from vmonarch_cli.demo.training.train_text import load_text_encoder
from vmonarch_cli.demo.training.vae_quality import exported
from vmonarch_cli.pipeline.device import device_name, pick_device

_OBJECT_WEIGHT = 4.0  # added to the loss's weight where an object covers everything
_OUTLINE_WEIGHT = 0.2  # of the outlines' cross-entropy against the flow-matching loss
_AGREEMENT_WEIGHT = 2.0  # of what dense and Monarch attention differ by, with --structured
_REPORTS_BEFORE = ("vae_report.json", "text_report.json")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is up, then export a pipeline and draw samples with it; returns the report."""
    device = pick_device(args.device or "auto")
    loop.tune_backend(device)
    torch.manual_seed(args.seed)
    log = loop.JsonLog(args.out / "dit_log.jsonl")
    trainer = TransformerTraining(args, device, log)
    if args.resume:
        trainer.load(args.out / "dit_checkpoint.pt")
    trainer.bank.fill()
    trainer.train()
    return trainer.finish()


class TransformerTraining:
    def __init__(self, args: argparse.Namespace, device: torch.device, log: loop.JsonLog) -> None:
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
        self.outline_head = OutlineHead(self.dit_config.num_heads * self.dit_config.head_dim).to(device)
        self.ema = loop.Ema([self.transformer], [self.averaged], args.ema)
        self.optimizer = torch.optim.AdamW(
            [*self.transformer.parameters(), *self.outline_head.parameters()],
            lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda",
        )  # fmt: skip
        self.guarded_step = loop.GuardedStep(self.optimizer, max_norm=1.0)
        self.vae = vae
        self.clock = loop.Schedule(
            args.seconds, args.total_seconds or args.seconds, args.reserve,
            max_steps=args.max_steps, stop_after=args.stop_after,
        )  # fmt: skip
        self.step = self.clips_seen = self.distinct_before = 0
        self.last_loss = float("nan")
        self.bank = self._bank()
        self.source = InputSource(
            self.tokenizer, self.text_encoder, device, every=args.refresh_every, size=args.size, seed=args.seed
        )
        self._inputs: StepInputs | None = None

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
        with loop.fastest_attention(
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
                self._inputs = None
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
                    memory_gb=loop.gpu_memory_gb(self.device), skipped=self.guarded_step.skipped,
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
        self._inputs = None
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
        worked = loop.trial(self.log, "dit", self.device, lambda: self.losses()[0].backward())
        self.optimizer.zero_grad(set_to_none=True)
        return worked

    def losses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What this step minimises; its flow-matching loss, the cross-entropy of its outlines, and the mean squared
        difference of dense and Monarch attention's velocities (scalars).
        """
        if self._inputs is None:
            self._inputs = self.source.draw(self.step, self.bank, self.batch // self._copies, self._copies)
        rows, sigma, text = self._inputs.at(self.step)
        clean = self.bank.latents[rows].float()
        covered = self.bank.outlines[rows].float()
        generator = torch.Generator(self.device).manual_seed(self.source.seed_of(self.step))
        distinct = len(clean) // self._copies
        noise = torch.randn(clean[:distinct].shape, generator=generator, device=self.device)
        noise = noise.repeat(self._copies, 1, 1, 1, 1)
        mix = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise
        with loop.autocast(self.device):
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
            group["lr"] = loop.learning_rate(self.args.lr, position, self.step, warmup=200)
        objective, *measured = self.losses()
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self.guarded_step()
        self.step += 1
        self.clips_seen += self.batch
        self.ema.update(self.step)
        return tuple(measured)

    def save(self) -> None:
        loop.save_checkpoint(
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
        state = loop.load_checkpoint(path, self.device)
        if state["preset"] != self.args.preset:
            raise ValueError(f"--preset: the checkpoint holds {state['preset']!r}, got {self.args.preset!r}")
        self.transformer.load_state_dict(state["transformer"])
        self.outline_head.load_state_dict(state["outline_head"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        loop.conform_optimizer(self.optimizer)
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
        loop.set_layout(self.bank.vae, channels_last=False)
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
            "device": device_name(self.device),
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
            draw_samples(weights, self.args, self.device, self.log)
        return summary

    def _report_of_init(self) -> dict[str, Any] | None:
        """The report of the training that made the weights that this one started from."""
        path = None if self.args.init is None else self.args.init / "training" / "dit_report.json"
        if path is None or not path.is_file():
            return None
        report: dict[str, Any] = json.loads(path.read_text())
        return report
