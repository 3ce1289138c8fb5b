"""Trains the diffusion transformer by flow matching on cached latents, with a text encoder that no longer changes.

Run it with `python -m vmonarch_cli.demo.training dit --vae DIR/vae --text DIR --out DIR --seconds 480`. Clips are
rendered and encoded into a bank of latents on the GPU, which is refreshed a little every few steps; every use of a
clip gets a new caption. `--clips` mixes lengths and sizes: each step sees clips of one of them, as many as make up the
same number of tokens. The first part of the training sees clips of half the size, four times as many of them a step.

With `--structured`, half of every batch repeats the other half's clips with Monarch attention, as the paper tunes its
models, and the loss also asks that both halves agree: from the start or later, in all steps or in some, because that is
learned soon, and the other steps see twice the clips in half the time (`--structured-every 3`).

Under torchrun every process has clips of its own, the same number of the same length and size in each step; gradients
are their mean. What depends on the time is the first process's decision, made once a step. It alone writes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.attention.ahead import KernelsAhead
from vmonarch_cli.demo.model import (
    DIT_PRESETS,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    config_dict,
    export_pipeline,
)
from vmonarch_cli.demo.training import loop
from vmonarch_cli.demo.training.bank_set import BankSet
from vmonarch_cli.demo.training.compiled import CompiledBlocks
from vmonarch_cli.demo.training.flags import asked_for, check_structured
from vmonarch_cli.demo.training.middle_head import MiddleHead
from vmonarch_cli.demo.training.objective import Objective
from vmonarch_cli.demo.training.samples import draw_samples
from vmonarch_cli.demo.training.step_inputs import InputSource, StepInputs
from vmonarch_cli.demo.training.step_log import StepLog
from vmonarch_cli.demo.training.structured import halve_attention, kernels_ahead
from vmonarch_cli.demo.training.train_text import load_text_encoder
from vmonarch_cli.demo.training.vae_quality import exported
from vmonarch_cli.errors import InputError
from vmonarch_cli.machine.group import Group, joined
from vmonarch_cli.models.demo_vocabulary import vocabulary
from vmonarch_cli.pipeline.device import device_name, own_device, pick_device

_SEEDS_APART = 1000  # of the processes of a torchrun, between those of runs that go on from one another


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train until the time is up, then export a pipeline and draw samples with it; returns the report, None in the
    processes of a torchrun but the first.
    """
    device = pick_device(args.device or "auto")
    device = own_device() if device == torch.device("cuda") else device
    loop.tune_backend(device)
    with joined(device, host=True) as group:
        trainer = TransformerTraining(args, device, group)
        try:
            if args.resume:
                trainer.load(args.out / "dit_checkpoint.pt")
            trainer.fill_banks()
            trainer.train()
        finally:
            if trainer.ahead is not None:  # kernels that nobody waits for any more would keep the process from ending
                trainer.ahead.stop()
    return trainer.finish() if group.rank == 0 else None


class TransformerTraining:
    """One training, or what one process of a torchrun does of it."""

    def __init__(self, args: argparse.Namespace, device: torch.device, group: Group) -> None:
        check_structured(args)
        from diffusers import WanTransformer3DModel

        self.args, self.device, self.group = args, device, group
        self.log = log = loop.JsonLog(args.out / "dit_log.jsonl", process=group.rank)
        self.seed = args.seed + _SEEDS_APART * group.rank  # of the clips of this process
        torch.manual_seed(args.seed)  # weights are the same in all processes
        self.vae = vae = exported(args.vae, device).requires_grad_(False)
        dit_config, self.text_config = DIT_PRESETS[args.preset]
        self.dit_config = replace(dit_config, z_dim=vae.config.z_dim)
        self.transformer = build_transformer(self.dit_config).to(device).train()
        self.text_encoder = build_text_encoder(self.text_config).to(device).eval().requires_grad_(False)
        self.tokenizer = build_tokenizer()
        load_text_encoder(self.text_encoder, args.text)
        if args.init is not None:
            start = WanTransformer3DModel.from_pretrained(args.init / "transformer")
            self.transformer.load_state_dict(start.state_dict())
        self.averaged = copy.deepcopy(self.transformer).eval()
        self.middle_head = MiddleHead(self.dit_config.num_heads * self.dit_config.head_dim).to(device)
        if args.init is not None and (found := self.middle_head.load_beside(args.init)):
            log.write("middle_head", of=str(found))
        self.compiled = CompiledBlocks(self.transformer, self.middle_head, log, device)
        self.ema = loop.Ema([self.transformer], [self.averaged], args.ema)
        self.optimizer = torch.optim.AdamW(
            [*self.transformer.parameters(), *self.middle_head.parameters()],
            lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda",
        )  # fmt: skip
        self.guarded_step = loop.GuardedStep(self.optimizer, max_norm=1.0)
        # Autocast would keep norms and activations in float32 and be ten times as far from float32 as float16 is.
        self.encoder = copy.deepcopy(vae).half() if device.type == "cuda" else vae
        self.clock = loop.Schedule(
            args.seconds, args.total_seconds or args.seconds, args.reserve,
            max_steps=args.max_steps, stop_after=args.stop_after,
        )  # fmt: skip
        self.step = self.clips_seen = 0
        self.clock.start()
        self.over()
        self.steps_log = StepLog(log)
        self.banks = BankSet(args, self.encoder, device, log, seed=self.seed)
        self.banks.open(small=self.small)
        self.source = InputSource(
            self.tokenizer, self.text_encoder, device, batch=args.batch, first=args.clips[0], seed=self.seed,
            shared_seed=args.seed,
        )  # fmt: skip
        self.objective = Objective(self.transformer, self.middle_head, device)
        self._inputs: list[StepInputs] = []
        self.ahead: KernelsAhead | None = None

    def over(self) -> bool:
        """Whether the training ends before the next step, and else where that stands: the same in all processes."""
        self.position, over = self.group.agree(self.clock.position(self.step), self.clock.over(self.step))
        return bool(over)

    @property
    def small(self) -> bool:
        """Whether clips have half their size: a step sees four times as many, and motion is learned just as well."""
        return self.position < float(self.args.small_until)

    @property
    def halves(self) -> bool:
        """Whether half of each batch has Monarch attention at this point."""
        return self.args.structured is not None and self.position >= self.args.structured

    def fill_banks(self) -> None:
        """Render and encode what the banks hold. Meanwhile, what --structured runs on a GPU is compiled."""
        if self.args.structured is not None:
            sizes = [*self.args.clips]
            if self.args.structured < float(self.args.small_until):
                sizes += [bucket.halved() for bucket in sizes]
            shapes = self.source.halved_shapes(sizes)
            self.ahead = kernels_ahead(shapes, self.dit_config.num_heads, self.dit_config.head_dim, self.device)
        self.banks.fill()

    def train(self) -> None:
        bucket = max((bank.bucket for bank in self.banks.banks), key=lambda bucket: bucket.tokens)
        shape = self.source.clips(bucket), self.dit_config.num_heads, bucket.tokens, self.dit_config.head_dim
        with loop.fastest_attention(self.log, self.device, shape):
            self._train()

    def _train(self) -> None:
        if self.halves:
            self._halve()
        if self.args.compile:
            # One compilation for several lengths, and for both sizes.
            self.compiled.compile(dynamic=len(self.banks.banks) > 1 or self.banks.small)
        else:
            self.middle_head.listen_to(self.transformer)
        self._keep_compiled_if_right()
        self.clock.start()
        first, last_save = self.step, time.monotonic()
        self.steps_log.start(self.step, self.clips_seen)
        while not self.over():
            self._enter_phase()
            if self.step % self.args.refresh_every == 0 and self.step > first:
                self.banks.refresh(self.step // self.args.refresh_every)
                self._inputs = []
            self.steps_log.add(*self.train_step())
            if (self.step - first <= self.args.profile_steps and self.step % 5 == 0) or self.step % 100 == 0:
                self._log_steps()
            if time.monotonic() - last_save > self.args.checkpoint_every:
                self.save()
                last_save = time.monotonic()
        self.steps_log.mean()
        self.save()
        self.trained_until = time.monotonic()
        self.apart = self.group.apart([p.detach() for p in self.transformer.parameters()])
        self.distinct = round(self.group.mean(self.banks.distinct) * self.group.world)

    def _log_steps(self) -> None:
        """One line; FloatingPointError where too many steps had no finite gradient."""
        lr, skipped = self.optimizer.param_groups[0]["lr"], self.guarded_step.skipped
        state = {"position": self.position, "lr": lr, "memory_gb": loop.gpu_memory_gb(self.device), "skipped": skipped}
        self.steps_log.write(self.step, self.clips_seen, **state)
        if skipped > 20:
            raise FloatingPointError(f"training diverged at step {self.step}: loss {self.steps_log.loss}")

    def _enter_phase(self) -> None:
        """Clips of the whole size, Monarch attention or both once it is time, which does not move the schedule."""
        grows, halves = self.small != self.banks.small, self.halves and not self.source.halves_every
        if not grows and not halves:
            return
        began = time.monotonic()
        if grows:
            self.banks.open(small=self.small)
            self.banks.fill()
        if halves:
            self._halve()
        self._inputs = []
        self._keep_compiled_if_right()
        self.clock.exclude(time.monotonic() - began)
        self.steps_log.start(self.step, self.clips_seen)

    def _halve(self) -> None:
        """From here on, Monarch attention for half of a batch."""
        self.source = replace(self.source, halves_every=self.args.structured_every)
        self.objective.structured = halve_attention(self.transformer, frames=1)
        ahead: dict[str, Any] = {}
        if self.ahead is not None:
            began = time.monotonic()
            self.ahead.wait()
            self.compiled.seconds += time.monotonic() - began
            ahead = {"kernels": self.ahead.compiled, "kernels_took": self.ahead.seconds}
            ahead |= {"kernels_failed": str(self.ahead.failure)} if self.ahead.failure else {}
        self.log.write("structured", step=self.step, **ahead)

    def _keep_compiled_if_right(self) -> None:
        """Try a step of every bank without an update; compiled blocks that are wrong go. Then all processes meet."""

        def objective(which: int) -> Tensor:
            return self.losses(self.source.trial(self.step, which, self.banks.banks))[0]

        objectives = ((bank.bucket.name, partial(objective, i)) for i, bank in enumerate(self.banks.banks))
        self.compiled.keep_if_right(objectives, compare_first=self.source.halves_every > 0)
        self.optimizer.zero_grad(set_to_none=True)
        if self.group.world > 1:  # one that took longer than the first does not move the schedule
            self.log.write("met", step=self.step, waited=self.group.wait())

    def _next_inputs(self) -> StepInputs:
        """What this step sees; drawn for all steps up to the next refresh at once."""
        every, banks = self.args.refresh_every, self.banks.banks
        if not self._inputs:
            steps = range(self.step, self.step - self.step % every + every)
            self._inputs = self.source.draw([(s, self.source.bank_of(s, banks)) for s in steps], banks)
        return self._inputs.pop(0)

    def losses(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """`Objective` of this step on inputs."""
        seed = self.source.seed_of(self.step)
        return self.objective(self.banks.banks[inputs.bank], inputs, seed=seed, position=self.position)

    def train_step(self) -> tuple[str, dict[str, Tensor]]:
        """One step; returns the name of its bucket and what `losses` measured (scalars on the device)."""
        for group in self.optimizer.param_groups:
            group["lr"] = loop.learning_rate(self.args.lr, self.position, self.step, warmup=200)
        inputs = self._next_inputs()
        objective, measured = self.losses(inputs)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        # One that is not finite makes the mean so, too: all processes leave out the same steps.
        self.group.average([p.grad for p in self.guarded_step.parameters if p.grad is not None])
        self.guarded_step()
        self.step += 1
        self.clips_seen += len(inputs.rows) * self.group.world
        self.ema.update(self.step)
        return self.banks.banks[inputs.bank].bucket.name, measured

    def save(self) -> None:
        """Write the checkpoint, in the first process."""
        if self.group.rank:
            return
        state = {
            "preset": self.args.preset,
            "transformer": self.transformer.state_dict(),
            "middle_head": self.middle_head.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "clips_seen": self.clips_seen,
            **self.clock.state(),
            **self.banks.state(),
        }
        took = loop.save_checkpoint(self.args.out / "dit_checkpoint.pt", state)
        self.log.write("checkpoint", step=self.step, elapsed=state["elapsed"], took=took)

    def load(self, path: Path) -> None:
        state = loop.load_checkpoint(path, self.device)
        if state["preset"] != self.args.preset:
            raise InputError(f"--preset: the checkpoint holds {state['preset']!r}, got {self.args.preset!r}")
        self.transformer.load_state_dict(state["transformer"])
        self.middle_head.load_state_dict(state["middle_head"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        loop.conform_optimizer(self.optimizer)
        self.step, self.clips_seen = state["step"], state["clips_seen"]
        self.clock.resume(state)
        self.over()
        self.banks.restore(state, small=self.small)
        self.log.write("resumed", step=self.step, elapsed=self.clock.before)

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Export the averaged weights with the autoencoder as one pipeline, and draw samples as a user would."""
        weights = self.args.out / "weights"
        loop.set_layout(self.vae, channels_last=False)
        vae, transformer, text = (copy.deepcopy(m) for m in (self.vae, self.averaged, self.text_encoder))
        export_pipeline(weights, vae, transformer, text, self.tokenizer)
        self.middle_head.export(self.args.out)
        summary = self._summary(weights)
        (self.args.out / "dit_report.json").write_text(json.dumps(summary, indent=2) + "\n")
        loop.keep_report(self.args.vae.parent / "vae_report.json", self.args.out)
        loop.keep_report(self.args.text / "text_report.json", self.args.out)
        plain = {name: value for name, value in summary.items() if isinstance(value, int | float | str)}
        self.log.write("exported", **plain, spent=summary["spent"])
        if self.args.samples:
            del self.optimizer, self.banks, self.encoder
            draw_samples(weights, self.args, self.device, self.log)
        return summary

    def _spent(self) -> dict[str, float]:
        """Seconds of this run until now, by what they went into."""
        aside = {"banks": self.banks.seconds, "compilation": self.compiled.seconds}
        export = time.monotonic() - self.trained_until
        training = self.clock.elapsed() - self.clock.before - export
        return {"setup": self.clock.idle - sum(aside.values()), **aside, "training": training, "export": export}

    def _summary(self, weights: Path) -> dict[str, Any]:
        return {
            "trained": "transformer",
            "loss": self.steps_log.loss,
            "transformer": config_dict(self.dit_config),
            "text_encoder": config_dict(self.text_config),
            "transformer_parameters": sum(p.numel() for p in self.transformer.parameters()),
            "text_encoder_parameters": sum(p.numel() for p in self.text_encoder.parameters()),
            "words": len(vocabulary()),
            "steps": self.step,
            "clips": self.clips_seen,
            "distinct_clips": self.distinct,
            **asked_for(self.args),
            "seconds": self.clock.elapsed(),
            "spent": self._spent(),
            "processes": self.group.world,
            "processes_apart": self.apart,
            "structured": self.source.halves_every > 0,
            "device": device_name(self.device),
            "before": loop.report_of_init(self.args.init, "dit_report.json"),
            "folder_megabytes": sum(f.stat().st_size for f in weights.rglob("*") if f.is_file()) / 1e6,
        }
