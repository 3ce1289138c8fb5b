"""What a clip's self-attention computes and keeps, in operations and bytes, from the preset that it runs with."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.models.base import Grid, ModelEntry
from vmonarch_cli.presets import Preset, options_for
from vmonarch_kernels.cost import dense_flops, l_bytes, monarch_flops, residual_bytes


class Flops(BaseModel):
    """Self-attention floating-point operations of one clip, all dense and as planned (a multiply-add counts as two)."""

    model_config = ConfigDict(frozen=True)

    dense_call: int
    """One dense self-attention call of one layer."""
    structured_call: int
    """The same call as the preset computes it in most steps (warm, where it starts warm)."""
    dense: int
    """All calls of the clip, dense."""
    planned: int
    """All calls of the clip as planned: cold and warm calls, dense steps and dense layers counted as such."""


def branches_of(model: ModelEntry, guidance_scale: float) -> int:
    """Forwards of one denoising step (or samples of one forward): two where guidance compares two prompts, and those of
    other kinds of guidance.
    """
    if guidance_scale <= 1:
        return 1
    return (1 if model.embedded_guidance else 2) + model.extra_forwards


def count_flops(model: ModelEntry, grid: Grid, preset: Preset, steps: int, branches: int) -> Flops:
    """Self-attention operations of a clip; `branches` is the number of forwards per step (2 with guidance)."""
    dense_call = dense_flops(grid, model.heads, model.head_dim)
    dense = dense_call * model.layers * branches * steps
    if preset.attention == "dense":
        return Flops(dense_call=dense_call, structured_call=dense_call, dense=dense, planned=dense)

    def call(warm: bool) -> int:
        return monarch_flops(grid, model.heads, model.head_dim, **options_for(preset, grid[0], warm=warm).cost())

    structured_layers = max(0, model.layers - preset.dense_layers)
    structured_steps = max(0, steps - preset.dense_steps)
    # Every transformer starts cold once; without warm start every step is cold.
    cold_steps = min(model.transformers, structured_steps) if preset.warm_start else structured_steps
    warm_steps = structured_steps - cold_steps
    structured = structured_layers * (cold_steps * call(False) + warm_steps * call(True))
    remaining = (model.layers * steps - structured_layers * structured_steps) * dense_call
    return Flops(
        dense_call=dense_call,
        structured_call=call(preset.warm_start),
        dense=dense,
        planned=(structured + remaining) * branches,
    )


def kept_by(model: ModelEntry, grid: Grid, preset: Preset, guidance_scale: float) -> int:
    """Bytes that the transformer at work keeps from step to step, in all layers that run structured.

    One byte per entry of L (warm start), twice where other branches start from what the leading one started from; and
    per entry of the output (frame refresh), for every branch or once for all that share it.
    """
    options = options_for(preset, grid[0])
    if preset.attention == "dense":
        return 0
    layers = max(0, model.layers - preset.dense_layers)
    branches = branches_of(model, guidance_scale)
    call = l_bytes(grid, model.heads) * min(2, branches) if options.keeps_l else 0
    if options.refresh:
        call += residual_bytes(grid, model.heads, model.head_dim) * (1 if preset.shared_refresh else branches)
    return call * layers
