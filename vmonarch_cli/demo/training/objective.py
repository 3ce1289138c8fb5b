"""What a step of the transformer's training minimises.

Most of a clip is background, and what a caption says is mostly about the objects. Two things turn the training towards
them until they fade in its second half: the loss weighs more where objects are, and a small head (no part of the
exported pipeline) reads the objects' outlines and motions from the middle of the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_cli.demo.training import loop
from vmonarch_cli.demo.training.latent_bank import LatentBank
from vmonarch_cli.demo.training.middle_head import MiddleHead
from vmonarch_cli.demo.training.step_inputs import StepInputs
from vmonarch_cli.demo.training.structured import HalfStructured

_OBJECT_WEIGHT = 4.0  # added to the loss's weight where an object covers everything
_OUTLINES_WEIGHT = 0.2  # of the outlines that the middle head misses against the flow-matching loss
_MOTIONS_WEIGHT = 2.0  # of the motions, which are a tenth as large: whose turn it is, is hard to see in noise
_AGREEMENT_WEIGHT = 12.0  # of what dense and Monarch attention differ by, with --structured


@dataclass
class Objective:
    """The losses of a step.

    Args:
        transformer: what is trained.
        middle_head: what listens to it.
        device: where both are.
        structured: the attention of --structured, once it runs: in steps whose inputs are halved.

    """

    transformer: Any
    middle_head: MiddleHead
    device: torch.device
    structured: HalfStructured | None = None

    def __call__(
        self, bank: LatentBank, inputs: StepInputs, *, seed: int, position: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a step minimises; its flow-matching loss, the cross-entropies of its outlines and motions and, of
        halved inputs, the mean squared difference of dense and Monarch attention's velocities (scalars).

        Args:
            bank: that of the inputs.
            inputs: what the step sees.
            seed: of the noise.
            position: of the step in the training, in [0, 1].

        """
        clean = bank.latents[inputs.rows].float()
        covered = bank.outlines[inputs.rows].float()
        generator = torch.Generator(self.device).manual_seed(seed)
        copies = 2 if inputs.halved else 1
        noise = torch.randn((len(clean) // copies, *clean.shape[1:]), generator=generator, device=self.device)
        noise = noise.repeat(copies, 1, 1, 1, 1)
        mix = inputs.sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise
        if self.structured is not None:
            self.structured.frames, self.structured.on = clean.shape[2], inputs.halved
        with loop.autocast(self.device):
            velocity = self.transformer(noisy, inputs.sigmas * 1000, inputs.text, return_dict=False)[0].float()
            # Of the clips with dense attention alone: those with Monarch's are asked to agree with them.
            rows = inputs.rows[: len(clean) // copies]
            outlines, motions = self.middle_head.losses(covered[: len(rows)], bank.moving[rows].float())
        errors = (velocity - (noise - clean)).square().mean(1)
        emphasis = max(0.0, min(1.0, (0.85 - position) / 0.35))
        weight = 1 + emphasis * _OBJECT_WEIGHT * F.avg_pool2d(covered, 2)
        reading = _OUTLINES_WEIGHT * outlines + _MOTIONS_WEIGHT * motions
        objective = (errors * weight).mean() / weight.mean() + emphasis * reading
        measured = {"loss": errors.mean().detach(), "outlines": outlines.detach(), "motions": motions.detach()}
        if not inputs.halved:
            return objective, measured
        disagreement = F.mse_loss(*reversed(velocity.chunk(2)))
        return objective + _AGREEMENT_WEIGHT * disagreement, {**measured, "disagreement": disagreement.detach()}
