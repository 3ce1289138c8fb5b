"""What training takes of memory, whether layers are computed twice to save some, and what would fit."""

from __future__ import annotations

from vmonarch_cli.errors import ModelError
from vmonarch_cli.machine.memory import available_bytes
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.costs import kept_by
from vmonarch_cli.plan.memory import weight_bytes
from vmonarch_cli.text import binary_size
from vmonarch_cli.tune.request import TunePlan

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WIDE, _MIDDLE = 16, 3
"""Tensors as wide as the residual stream, and as the feed-forward's middle, that a block keeps for its gradients."""
_COPIES = 20
"""Bytes of each number that is trained: value, gradient, average and the optimiser's two, in float32."""
_ROOMY = 0.4
"""Share of the free memory up to which nothing is computed twice."""


def training_bytes(plan: TunePlan, dtype: str, num_frames: int, *, checkpointing: bool) -> int:
    """Estimate of the peak: weights, what is trained and its optimiser, what the preset keeps, and activations."""
    clip, model = plan.clip, plan.clip.model
    grid = model.grid(clip.height, clip.width, num_frames)
    # Both forwards of a guided step are kept until their common loss.
    tokens = plan.batch * plan.forwards * grid[0] * grid[1] * grid[2]
    block = tokens * (_WIDE * model.hidden_dim + _MIDDLE * model.ffn_dim) * _BYTES[dtype]
    layers = model.layers - clip.preset.dense_layers
    held = block + layers * tokens * model.hidden_dim * _BYTES[dtype] if checkpointing else layers * block
    copies_kept = 1 + plan.forwards if checkpointing else 1  # each forward's layers start again from what it found
    kept = plan.batch * kept_by(model, grid, clip.preset, clip.guidance_scale) * copies_kept
    widths = 8 * model.hidden_dim + 2 * (model.hidden_dim + model.ffn_dim)
    trained = model.transformers * (model.transformer_params if plan.full else layers * plan.rank * widths)
    copies = trained * _COPIES // (plan.world if plan.full else 1)  # processes share all weights out among them
    return weight_bytes(model, dtype) + copies + held + kept


def free_bytes(machine: Machine) -> int:
    """Free memory of the device, before the model is loaded."""
    if not machine.on_gpu:
        return available_bytes()
    import torch

    return int(torch.cuda.mem_get_info(torch.device(machine.device))[0])


def needs_checkpointing(plan: TunePlan, free: int, dtype: str) -> bool:
    """Whether layers are better computed again in the backward pass than kept."""
    return training_bytes(plan, dtype, plan.clip.num_frames, checkpointing=False) > _ROOMY * free


def check_memory(plan: TunePlan, free: int, machine: Machine) -> None:
    """ModelError that says what would fit, when training cannot."""
    clip = plan.clip
    need = training_bytes(plan, machine.dtype, clip.num_frames, checkpointing=True)
    if need <= free:
        return
    raise ModelError(
        f"too little memory to tune {clip.model.alias} at {clip.width}x{clip.height} with {clip.num_frames} frames and "
        f"--batch {plan.batch} in {machine.dtype}: it needs about {binary_size(need)} and {machine.device_name} has "
        f"{binary_size(free)} free: {_what_fits(plan, free, machine.dtype)}"
    )


def _what_fits(plan: TunePlan, free: int, dtype: str) -> str:
    frames = plan.clip.num_frames
    one = training_bytes(plan, dtype, frames, checkpointing=True) / plan.batch  # weights are counted as if shared
    if plan.batch > 1 and one <= free:
        return "--batch 1 would fit"
    model = plan.clip.model
    counts = model.axes()[0]
    while frames > 1:
        frames -= 1
        if counts.holds(frames) and training_bytes(plan, dtype, frames, checkpointing=True) <= free:
            return f"--num-frames {frames} would fit"
    return "no clip of this size would fit; choose a smaller --size, a narrower --dtype or a smaller model"
