"""Trains the video autoencoder on rendered clips: single images first, then short clips, then whole ones.

Run it with `python -m vmonarch_cli.demo.training vae --out DIR --seconds 540`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.demo.clips import NUM_FRAMES, frame_times, render
from vmonarch_cli.demo.model import VAE_PRESETS, build_vae, config_dict, export_vae
from vmonarch_cli.demo.specs import sample_spec
from vmonarch_cli.demo.training import loop, still_image
from vmonarch_cli.demo.training.flags import Phase
from vmonarch_cli.demo.training.vae_quality import exported, losses, measure_latents, score_vae
from vmonarch_cli.errors import InputError
from vmonarch_cli.families.wan_vae import decode_raw, encode_moments
from vmonarch_cli.pipeline.device import device_name, pick_device

_INITIAL_LOGVAR = -5.0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is up, then evaluate, measure the latents and export; returns the final report."""
    device = pick_device(args.device or "auto")
    loop.tune_backend(device)
    torch.manual_seed(args.seed)
    log = loop.JsonLog(args.out / "vae_log.jsonl")
    trainer = AutoencoderTraining(args, device, log)
    trainer.choose_memory_format()
    if args.resume:
        trainer.load(args.out / "vae_checkpoint.pt")
    trainer.train()
    return trainer.finish()


class AutoencoderTraining:
    def __init__(self, args: argparse.Namespace, device: torch.device, log: loop.JsonLog) -> None:
        self.args, self.device, self.log = args, device, log
        self.config = VAE_PRESETS[args.preset]
        self.vae = build_vae(self.config).to(device)
        with torch.no_grad():
            # Start with little noise on the latents: at unit variance nothing passes through them.
            self.vae.quant_conv.bias[self.config.z_dim :] = _INITIAL_LOGVAR
        self.fixed_latents: tuple[list[float], list[float]] | None = None
        if args.init is not None:
            start = exported(args.init, device)
            self.vae.load_state_dict(start.state_dict())
        if args.decoder_only:
            if args.init is None:
                raise InputError("--decoder-only: got no --init, and a fresh encoder is worth nothing")
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
            self.fixed_latents = (start.config.latents_mean, start.config.latents_std)
        self.vae.train()
        self.averaged = copy.deepcopy(self.vae).eval()
        self.ema = loop.Ema([self.vae], [self.averaged], args.ema)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.vae.parameters() if p.requires_grad],
            lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=device.type == "cuda",
        )  # fmt: skip
        self.step = 0
        self.phase_start = 0
        self.guarded_step = loop.GuardedStep(self.optimizer, max_norm=0.5)
        self.clips_seen = 0
        total = args.total_seconds or args.seconds
        self.clock = loop.Schedule(
            args.seconds, total, args.reserve, max_steps=args.max_steps, stop_after=args.stop_after
        )
        self.history: list[dict[str, Any]] = []
        self.forward = self._forward

    def _forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, latent means and log-variances."""
        single = video.shape[2] == 1
        if single:
            moments = still_image.encode_moments(self.vae, video[:, :, 0])[:, :, None]
        else:
            moments = encode_moments(self.vae, video)
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-20.0, 10.0)
        latents = mean + torch.exp(0.5 * logvar) * noise
        if single:
            return still_image.decode_raw(self.vae, latents[:, :, 0])[:, :, None], mean, logvar
        return decode_raw(self.vae, latents), mean, logvar

    def phase(self) -> Phase:
        position = self.clock.position(self.step)
        phases: tuple[Phase, ...] = self.args.phases
        return next((p for p in phases if position < p.end), phases[-1])

    def batch(self, frames: int, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Clips (B, 3, F, H, W) and noise for their latents; both depend on the step alone."""
        if count is None:
            count = max(1, self.args.batch * NUM_FRAMES // frames)
            count = min(count, self.args.image_batch) if frames == 1 else count
        specs = [sample_spec("train", self.args.seed, self.clips_seen + i) for i in range(count)]
        self.clips_seen += count
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
        if frames == NUM_FRAMES:
            times = frame_times()[None].expand(count, -1)
        else:
            span = (frames - 1) / (NUM_FRAMES - 1)
            start = torch.rand(count, 1, generator=generator) * (1 - span)
            times = start + torch.linspace(0, span, frames)[None]
        video = render(specs, times, size=self.args.size, device=self.device)
        device_generator = torch.Generator(self.device).manual_seed(self.args.seed * 1_000_003 + self.step)
        side = self.args.size // 4
        shape = (count, self.config.z_dim, (frames - 1) // 4 + 1, side, side)
        noise = torch.randn(shape, generator=device_generator, device=self.device)
        return video, noise

    def train(self) -> None:
        self.clock.start()
        last_save = last_log = last_eval = time.monotonic()
        steps_logged, clips_logged = self.step, self.clips_seen
        current, phase_start = None, self.step
        while not self.clock.over(self.step):
            phase = self.phase()
            if phase != current:
                current, phase_start = phase, self.step
                self.phase_start = self.step
                self._prepare(phase)
            parts = self.train_step(phase)
            in_profile = self.step - phase_start <= self.args.profile_steps and self.step % 5 == 0
            if in_profile or self.step % 100 == 0:
                values = {k: float(v) for k, v in parts.items()}
                loop.synchronize(self.device)
                now = time.monotonic()
                steps = max(self.step - steps_logged, 1)
                self.log.write(
                    "step", step=self.step, position=self.clock.position(self.step), frames=phase.frames,
                    **values, seconds_per_step=(now - last_log) / steps,
                    clips_per_second=(self.clips_seen - clips_logged) / (now - last_log),
                    memory_gb=loop.gpu_memory_gb(self.device), skipped=self.guarded_step.skipped,
                )  # fmt: skip
                if self.guarded_step.skipped > 20:
                    raise FloatingPointError(f"training diverged at step {self.step}: {values}")
                last_log, steps_logged, clips_logged = now, self.step, self.clips_seen
            if time.monotonic() - last_save > self.args.checkpoint_every:
                if time.monotonic() - last_eval > self.args.eval_every:
                    self.evaluate()
                    last_eval = time.monotonic()
                self.save()
                last_save = last_log = time.monotonic()
                steps_logged, clips_logged = self.step, self.clips_seen
        self.save()

    def _prepare(self, phase: Phase) -> None:
        """Compile for a phase of clips; images are over before compiling for them would pay."""
        if not self.args.compile or phase.frames == 1:
            return
        start = time.monotonic()
        self.forward = torch.compile(self._forward, dynamic=False)
        if not loop.trial(self.log, f"vae, {phase.frames} frames", self.device, lambda: self._rehearse(phase.frames)):
            self.forward = self._forward
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.exclude(time.monotonic() - start)

    def _rehearse(self, frames: int, count: int | None = None) -> None:
        """One forward and backward pass that changes nothing but gradients."""
        clips_seen = self.clips_seen
        video, noise = self.batch(frames, count)
        self.clips_seen = clips_seen
        with loop.autocast(self.device):
            recon, mean, logvar = self.forward(self._laid_out(video), noise)
        losses(recon.float(), video, mean.float(), logvar.float(), kl_weight=self.args.kl, polish=False)[
            "loss"
        ].backward()

    def train_step(self, phase: Phase) -> dict[str, Tensor | float]:
        """One optimiser step; returns the parts of the loss and the learning rate."""
        position = self.clock.position(self.step)
        # Every phase warms up anew: single images leave the older temporal taps without gradient
        # statistics, so that Adam's first steps on clips would be as large as they get.
        lr = loop.learning_rate(self.args.lr, position, self.step - self.phase_start, warmup=200)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        video, noise = self.batch(phase.frames)
        with loop.autocast(self.device):
            recon, mean, logvar = self.forward(self._laid_out(video), noise)
        parts = losses(
            recon.float(),
            video,
            mean.float(),
            logvar.float(),
            kl_weight=self.args.kl,
            polish=position >= self.args.polish,
        )
        self.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        self.guarded_step()
        self.step += 1
        self.ema.update(self.step)
        return {**{k: v.detach() for k, v in parts.items()}, "lr": lr}

    def _laid_out(self, video: Tensor) -> Tensor:
        return video.contiguous(memory_format=self.video_format)

    video_format: torch.memory_format = torch.contiguous_format

    def choose_memory_format(self) -> None:
        """Time both layouts on a few eager steps and keep the faster one (or take what the flag says)."""
        choice = self.args.memory_format
        if choice == "auto" and self.device.type == "cuda":
            seconds = {name: self._time_format(name) for name in ("contiguous", "channels_last")}
            choice = min(seconds, key=lambda name: seconds[name])
            self.log.write("memory_format", chosen=choice, eager_seconds_per_step=seconds)
        self._set_format("contiguous" if choice == "auto" else choice)

    def _set_format(self, name: str) -> None:
        self.video_format = loop.set_layout(self.vae, channels_last=name == "channels_last")

    def _time_format(self, name: str) -> float:
        self._set_format(name)
        start = 0.0
        for i in range(5):
            if i == 2:
                loop.synchronize(self.device)
                start = time.monotonic()
            self._rehearse(17, 4)
            self.optimizer.zero_grad(set_to_none=True)
        loop.synchronize(self.device)
        return (time.monotonic() - start) / 3

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """PSNR of the averaged weights on fixed held-out 49-frame clips."""
        report, _, _ = score_vae(self.averaged, self.device, count=self.args.eval_clips, size=self.args.size)
        entry = {"step": self.step, "position": self.clock.position(self.step), **report}
        self.history.append(entry)
        self.log.write("eval", **entry)
        return report

    def save(self) -> None:
        loop.save_checkpoint(
            self.args.out / "vae_checkpoint.pt",
            {
                "preset": self.args.preset,
                "model": self.vae.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "clips_seen": self.clips_seen,
                **self.clock.state(),
                "history": self.history,
            },
        )
        self.log.write("checkpoint", step=self.step, elapsed=self.clock.elapsed())

    def load(self, path: Path) -> None:
        state = loop.load_checkpoint(path, self.device)
        if state["preset"] != self.args.preset:
            raise InputError(f"--preset: the checkpoint holds {state['preset']!r}, got {self.args.preset!r}")
        self.vae.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        loop.conform_optimizer(self.optimizer)
        self.step, self.clips_seen = state["step"], state["clips_seen"]
        self.clock.resume(state)
        self.history = state["history"]
        self.log.write("resumed", step=self.step, elapsed=self.clock.before)

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Measure the latents, score what was exported in the exported precision, and write everything."""
        mean, std = self.fixed_latents or measure_latents(
            self.averaged, self.device, count=self.args.latent_clips, size=self.args.size
        )
        self.averaged.register_to_config(latents_mean=mean, latents_std=std)
        export_vae(self.args.out / "vae", copy.deepcopy(self.averaged))
        as_shipped = exported(self.args.out / "vae", self.device)
        report, originals, recons = score_vae(as_shipped, self.device, count=self.args.eval_clips, size=self.args.size)
        pairs = [clip for pair in zip(originals[:8], recons[:8], strict=True) for clip in pair]
        loop.save_sheet(self.args.out / "vae_sheet.png", pairs, columns=2)
        summary: dict[str, Any] = {
            "vae": report,
            "preset": self.args.preset,
            "config": config_dict(self.config),
            "steps": self.step,
            "clips": self.clips_seen,
            "seconds": self.clock.elapsed(),
            "latents_mean": mean,
            "latents_std": std,
            "device": device_name(self.device),
        }
        (self.args.out / "vae_report.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.log.write("final", **report, steps=self.step, clips_seen=self.clips_seen)
        return summary
