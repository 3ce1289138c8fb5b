"""Whether a batch decodes and writes one clip while it denoises the next: decided once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.memory import overlapped_peak
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.text import binary_size


@dataclass(frozen=True)
class Overlap:
    """The decision, and why it was taken, as a part of a sentence."""

    on: bool = False
    reason: str = ""


def overlap_of(plans: Sequence[Plan], machine: Machine, wanted: bool | None) -> Overlap:
    """The decision for plans of one model on a machine; `wanted` is what the user asked for, None for what suits.

    It suits where all weights stay on a GPU whose free memory takes the decoder beside the denoiser. On a CPU both
    compute on the same cores, so that nothing is gained.
    Raises InputError where it is asked for and cannot be.
    """
    if wanted is False:
        return Overlap(False, "as asked")
    obstacle = _obstacle(plans[0], machine)
    if obstacle is not None:
        if wanted:
            raise InputError(f"--overlap cannot be had: {obstacle}")
        return Overlap(False, obstacle)
    if not machine.on_gpu:
        return Overlap(True, "as asked") if wanted else Overlap(False, "on a CPU both would take the same cores")
    need = overlapped_peak(plans, machine.dtype, tiled=machine.tiles)
    words = f"about {binary_size(need)} of {binary_size(machine.free_bytes or 0)} free"
    if wanted:
        return Overlap(True, f"as asked: {words}")
    fits = machine.free_bytes is not None and need <= machine.free_bytes
    return Overlap(True, words) if fits else Overlap(False, f"both together do not fit: {words}")


def needs_vae(plan: Plan) -> bool:
    """Whether denoising a clip of the plan runs the VAE, which can then not decode another one meanwhile."""
    facts = PIPELINES[plan.pipeline]
    # VACE encodes an empty video where none is given.
    return bool(plan.given_frames or plan.video or facts.video_pipeline == facts.name)


def _obstacle(plan: Plan, machine: Machine) -> str | None:
    """Why one clip cannot be decoded while another is denoised, whatever the memory."""
    if PIPELINES[plan.pipeline].modular:
        return f"a {plan.pipeline} denoises and decodes in one sequence of blocks"
    if machine.offload != "none":
        return f"offload {machine.offload} moves the weights from one to the other"
    return None
