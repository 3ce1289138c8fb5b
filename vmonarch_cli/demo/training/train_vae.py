"""Trains the video autoencoder on rendered clips: single images first, then short clips, then whole ones.

Run it with `python -m vmonarch_cli.demo.training vae --out DIR --seconds 540`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_cli.demo.clips import NUM_FRAMES, SIZE, frame_times, render
from vmonarch_cli.demo.model import VAE_PRESETS, build_vae, config_dict, export_vae
from vmonarch_cli.demo.specs import sample_spec
from vmonarch_cli.demo.training import loop as training
from vmonarch_cli.demo.training import still_image
from vmonarch_cli.families.wan_vae import decode_raw, encode_mean, encode_moments

_INITIAL_LOGVAR = -5.0


@dataclass(frozen=True)
class Phase:
    """Clips of `frames` frames until `end` (progress in [0, 1])."""

    frames: int
    end: float


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Phases from text such as "1:0.1,17:0.35,49:1"."""
    phases = tuple(Phase(int(part.split(":")[0]), float(part.split(":")[1])) for part in text.split(","))
    ends = [p.end for p in phases]
    if ends != sorted(ends) or ends[-1] < 1.0 or any((p.frames - 1) % 4 for p in phases):
        raise ValueError(f"--phases: got {text!r}, valid are rising ends up to 1 and frame counts 4 n + 1")
    return phases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train vae`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the log and vae/")
    parser.add_argument("--seconds", type=float, default=540.0, help="wall-clock limit of this run")
    parser.add_argument("--total-seconds", type=float, help="planned seconds of all runs (default: this run's)")
    parser.add_argument("--reserve", type=float, default=30.0, help="seconds kept for the final evaluation")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--init", type=Path, help="start from an exported vae folder (weights only)")
    parser.add_argument(
        "--decoder-only", action="store_true", help="leave the encoder of --init, and so every latent, as it is"
    )
    parser.add_argument("--max-steps", type=int, help="schedule by steps, not by seconds (reproducible)")
    parser.add_argument("--stop-after", type=int, help="interrupt this run at that step")
    parser.add_argument("--preset", choices=sorted(VAE_PRESETS), default="base24")
    parser.add_argument("--batch", type=int, default=4, help="clips of 49 frames a step; shorter ones in proportion")
    parser.add_argument("--image-batch", type=int, default=128, help="images a step at most")
    parser.add_argument(
        "--phases",
        type=parse_phases,
        default=parse_phases("1:0.17,49:1"),
        help="frames:end, ... with ends in [0, 1] of the whole training",
    )
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the KL term; more makes smoother latents")
    parser.add_argument("--polish", type=float, default=0.65, help="progress from which squared error dominates")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-format", choices=("auto", "contiguous", "channels_last"), default="channels_last")
    parser.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--eval-every", type=float, default=100.0, help="seconds, at a checkpoint")
    parser.add_argument("--eval-clips", type=int, default=16, help="held-out clips per evaluation")
    parser.add_argument("--latent-clips", type=int, default=128, help="clips for the latents' statistics")
    parser.add_argument("--profile-steps", type=int, default=40, help="log every fifth of a phase's first steps")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is up, then evaluate, measure the latents and export; returns the final report."""
    device = training.pick_device(args.device)
    training.tune_backend(device)
    torch.manual_seed(args.seed)
    log = training.JsonLog(args.out / "vae_log.jsonl")
    trainer = _Trainer(args, device, log)
    trainer.choose_memory_format()
    if args.resume:
        trainer.load(args.out / "vae_checkpoint.pt")
    trainer.train()
    return trainer.finish()


class _Trainer:
    def __init__(self, args: argparse.Namespace, device: torch.device, log: training.JsonLog) -> None:
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
                raise ValueError("--decoder-only: got no --init, and a fresh encoder is worth nothing")
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
            self.fixed_latents = (start.config.latents_mean, start.config.latents_std)
        self.vae.train()
        self.averaged = copy.deepcopy(self.vae).eval()
        self.ema = training.Ema([self.vae], [self.averaged], args.ema)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.vae.parameters() if p.requires_grad],
            lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=device.type == "cuda",
        )  # fmt: skip
        self.step = 0
        self.phase_start = 0
        self.guarded_step = training.GuardedStep(self.optimizer, max_norm=0.5)
        self.clips_seen = 0
        total = args.total_seconds or args.seconds
        self.clock = training.Clock(
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
                training.synchronize(self.device)
                now = time.monotonic()
                steps = max(self.step - steps_logged, 1)
                self.log.write(
                    "step", step=self.step, position=self.clock.position(self.step), frames=phase.frames,
                    **values, seconds_per_step=(now - last_log) / steps,
                    clips_per_second=(self.clips_seen - clips_logged) / (now - last_log),
                    memory_gb=training.gpu_memory_gb(self.device), skipped=self.guarded_step.skipped,
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
        if not training.trial(
            self.log, f"vae, {phase.frames} frames", self.device, lambda: self._rehearse(phase.frames)
        ):
            self.forward = self._forward
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.exclude(time.monotonic() - start)

    def _rehearse(self, frames: int, count: int | None = None) -> None:
        """One forward and backward pass that changes nothing but gradients."""
        clips_seen = self.clips_seen
        video, noise = self.batch(frames, count)
        self.clips_seen = clips_seen
        with training.autocast(self.device):
            recon, mean, logvar = self.forward(self._laid_out(video), noise)
        losses(recon.float(), video, mean.float(), logvar.float(), kl_weight=self.args.kl, polish=False)[
            "loss"
        ].backward()

    def train_step(self, phase: Phase) -> dict[str, Tensor | float]:
        """One optimiser step; returns the parts of the loss and the learning rate."""
        position = self.clock.position(self.step)
        # Every phase warms up anew: single images leave the older temporal taps without gradient
        # statistics, so that Adam's first steps on clips would be as large as they get.
        lr = training.learning_rate(self.args.lr, position, self.step - self.phase_start, warmup=200)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        video, noise = self.batch(phase.frames)
        with training.autocast(self.device):
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
        self.video_format = training.set_layout(self.vae, channels_last=name == "channels_last")

    def _time_format(self, name: str) -> float:
        self._set_format(name)
        start = 0.0
        for i in range(5):
            if i == 2:
                training.synchronize(self.device)
                start = time.monotonic()
            self._rehearse(17, 4)
            self.optimizer.zero_grad(set_to_none=True)
        training.synchronize(self.device)
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
        training.save_checkpoint(
            self.args.out / "vae_checkpoint.pt",
            {
                "preset": self.args.preset,
                "model": self.vae.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "clips_seen": self.clips_seen,
                "elapsed": self.clock.elapsed(),
                "history": self.history,
            },
        )
        self.log.write("checkpoint", step=self.step, elapsed=self.clock.elapsed())

    def load(self, path: Path) -> None:
        state = training.load_checkpoint(path, self.device)
        if state["preset"] != self.args.preset:
            raise ValueError(f"--preset: the checkpoint holds {state['preset']!r}, got {self.args.preset!r}")
        self.vae.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        training.conform_optimizer(self.optimizer)
        self.step, self.clips_seen = state["step"], state["clips_seen"]
        self.clock.before = state["elapsed"]
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
        training.save_sheet(self.args.out / "vae_sheet.png", pairs, columns=2)
        summary: dict[str, Any] = {
            "vae": report,
            "preset": self.args.preset,
            "config": config_dict(self.config),
            "steps": self.step,
            "clips": self.clips_seen,
            "seconds": self.clock.elapsed(),
            "latents_mean": mean,
            "latents_std": std,
            "device": training.device_name(self.device),
        }
        (self.args.out / "vae_report.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.log.write("final", **report, steps=self.step, clips_seen=self.clips_seen)
        return summary


def losses(
    recon: Tensor, video: Tensor, mean: Tensor, logvar: Tensor, *, kl_weight: float, polish: bool
) -> dict[str, Tensor]:
    """Training losses of a reconstruction; all tensors float32, videos (B, 3, F, H, W) in [-1, 1].

    Early on a robust error with image gradients, and squared error weighted up where a pixel differs from its frame's
    mean or from its own mean over time: objects cover little of a frame, and fast ones are the hardest to keep. In the
    polish phase plain squared error dominates, since PSNR is the bar.
    """
    squared = (recon - video).square()
    mse = squared.mean()
    robust = F.smooth_l1_loss(recon, video, beta=0.05)
    edges = (recon.diff(dim=-1) - video.diff(dim=-1)).abs().mean() + (
        recon.diff(dim=-2) - video.diff(dim=-2)
    ).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    if polish:
        loss = 25.0 * mse + 0.1 * robust + 0.1 * edges + kl_weight * kl
    else:
        away = (video - video.mean(dim=(-2, -1), keepdim=True)).abs().amax(dim=1, keepdim=True)
        moves = (video - video.mean(dim=2, keepdim=True)).abs().amax(dim=1, keepdim=True)
        loss = robust + 0.5 * edges + 2.0 * (squared * (1.0 + 2.0 * away + 2.0 * moves)).mean() + kl_weight * kl
    return {"loss": loss, "mse": mse, "psnr": -10.0 * torch.log10(mse / 4.0), "kl": kl, "scale": mean.std()}


@torch.no_grad()
def score_vae(
    vae: Any, device: torch.device, *, count: int = 16, size: int = SIZE
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Reconstruction quality on the first `count` held-out clips of 49 frames, in float32.

    Returns:
        PSNR in dB (mean over clips, and of the first, middle and last frame, with peak 1 for values in [0, 1]), the
        clips and their reconstructions (count, 3, 49, H, W) in [-1, 1] on the CPU.

    """
    originals, recons, per_clip = [], [], []
    for start in range(0, count, 4):
        specs = [sample_spec("heldout", 0, i) for i in range(start, min(start + 4, count))]
        video = render(specs, size=size, device=device)
        recon = decode_raw(vae, encode_mean(vae, video)).clamp(-1, 1)
        mse = ((recon - video) / 2).square().mean(dim=(1, 3, 4))
        per_clip.append(mse)
        originals.append(video.cpu())
        recons.append(recon.cpu())
    mse = torch.cat(per_clip).double()

    def decibel(values: Tensor) -> float:
        return float((-10 * torch.log10(values.clamp(min=1e-12))).mean())

    report = {
        "psnr": decibel(mse.mean(dim=1)),
        "psnr_worst_clip": float(-10 * torch.log10(mse.mean(dim=1).max())),
        "psnr_first": decibel(mse[:, 0]),
        "psnr_middle": decibel(mse[:, mse.shape[1] // 2]),
        "psnr_last": decibel(mse[:, -1]),
        "clips": count,
    }
    return report, torch.cat(originals), torch.cat(recons)


@torch.no_grad()
def measure_latents(vae: Any, device: torch.device, *, count: int = 128, size: int = SIZE) -> tuple[list[float], ...]:
    """Mean and standard deviation of every latent channel over training clips."""
    total = squares = torch.zeros(1, dtype=torch.float64, device=device)
    number = 0
    for start in range(0, count, 8):
        specs = [sample_spec("train", 1, i) for i in range(start, min(start + 8, count))]
        latents = encode_mean(vae, render(specs, size=size, device=device)).double()
        total = total + latents.sum(dim=(0, 2, 3, 4))
        squares = squares + latents.square().sum(dim=(0, 2, 3, 4))
        number += latents.numel() // latents.shape[1]
    mean = total / number
    std = (squares / number - mean.square()).clamp(min=1e-12).sqrt()
    return [round(v, 6) for v in mean.tolist()], [round(v, 6) for v in std.tolist()]


def exported(directory: Path, device: torch.device) -> Any:
    """The autoencoder as a user loads it, in float32."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(directory).float().to(device).eval()
