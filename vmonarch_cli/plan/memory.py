"""What a run takes of memory: one model of it, for plans, tables, the choice of an offload mode, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmonarch_cli.models.base import ClipShape, Grid, ModelEntry
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.decoders import decoder_of
from vmonarch_cli.models.single_file import GGUF
from vmonarch_cli.plan.costs import kept_by
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.setup import COMPUTED, offload_modes
from vmonarch_cli.presets import apply_overrides, parse_assignment

OFFLOAD_WORDS = {
    "none": "all weights stay on the device",
    "model": "one component at a time is on the device",
    "group": "the VAE and a few transformer blocks at a time are on the device",
    "sequential": "one layer at a time is on the device",
}
"""The offload modes, the fastest first."""
LIGHTER = ("shared_refresh=true", "refresh=0")
"""Changes to a preset, as `--set` takes them, that keep less from step to step; the better results first."""
PROJECTIONS = {
    "WanTransformer3DModel": 0.98,
    "WanVACETransformer3DModel": 0.98,
    "SkyReelsV2Transformer3DModel": 0.98,
    "LTXVideoTransformer3DModel": 0.97,
    "LTX2VideoTransformer3DModel": 0.98,
    "AllegroTransformer3DModel": 0.98,
    "CogVideoXTransformer3DModel": 0.78,
    "CosmosTransformer3DModel": 0.85,
    "HunyuanVideoTransformer3DModel": 0.70,
    "HunyuanVideo15Transformer3DModel": 0.65,
    "MochiTransformer3DModel": 0.72,
    "Kandinsky5Transformer3DModel": 0.84,
    "Kandinsky6Transformer3DModel": 0.86,
    "MotifVideoTransformer3DModel": 0.72,
    "MiniMaxH3Transformer3DModel": 0.58,
}
"""Class -> share of a transformer's parameters in the projections of its blocks, which 8-bit arithmetic takes; the rest
is mostly what makes modulations. Counted on the classes of diffusers, rounded down."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_RESERVE = 500_000_000  # the CUDA context's libraries and the allocator's gaps
_PROCESS = 900 << 20  # a process that has imported the libraries, as measured


def weight_bytes(model: ModelEntry, dtype: str, *, to_decode: bool = False) -> int:
    """Bytes of all weights, or of those that decoding needs: in `dtype`, but the VAE in float32 where the family needs
    it.
    """
    wide = 0 if to_decode else model.transformer_params * model.transformers + model.text_encoder_params
    return wide * _BYTES[dtype] + model.vae_params * (4 if model.vae_float32 else _BYTES[dtype])


def transformer_bytes(model: ModelEntry, dtype: str, quantize: str | None = None) -> int:
    """Bytes of one transformer's weights in `dtype`, or as `--quantize` leaves them: stored in 8 bits all of them,
    computed in 8 bits the projections of its blocks.
    """
    narrow = 1.0 if quantize else 0.0
    if quantize in COMPUTED:
        narrow = PROJECTIONS[PIPELINES[model.pipeline].transformer]
    return round(model.transformer_params * (narrow + (1 - narrow) * _BYTES[dtype]))


def activation_bytes(model: ModelEntry, grid: Grid, dtype: str) -> int:
    """A lower bound of the transformer's working set: residual, q, k, v and output, and the feed-forward's middle."""
    tokens = grid[0] * grid[1] * grid[2]
    return tokens * (5 * model.hidden_dim + model.ffn_dim) * _BYTES[dtype]


def decode_bytes(shape: ClipShape) -> int:
    """A lower bound of decoding: the frames once in float32 and once in 8 bits."""
    height, width, num_frames = shape
    return num_frames * height * width * 3 * (4 + 1)


def decoding_bytes(model: ModelEntry, shape: ClipShape, dtype: str, vae_dtype: str = "auto") -> tuple[int, int]:
    """Estimated peak bytes of decoding a clip: of full frames, and of tiles.

    Of a VAE that was not measured both are 40 channels of one group of frames at full size beside the frames: whether
    it has tiles is not known.
    """
    width = _BYTES[dtype if not model.vae_float32 else "float32"] if vae_dtype == "auto" else _BYTES[vae_dtype]
    frames, peak = decode_bytes(shape), decoder_of(model, PIPELINES[model.pipeline].family)
    if peak is None:
        group = model.vae_temporal * shape[0] * shape[1] * 40 * width
        return frames + group, frames + group
    whole, tiles = peak.bytes(model, shape, width)
    return max(whole, frames), max(tiles, frames)


def at_least(model: ModelEntry, shape: ClipShape, dtype: str) -> int:
    """Bytes below which a run that keeps all weights in memory cannot succeed."""
    working = max(activation_bytes(model, model.grid(*shape), dtype), decode_bytes(shape))
    return weight_bytes(model, dtype) + working


def step_bytes(model: ModelEntry, shape: ClipShape, dtype: str, kept: int = 0) -> int:
    """Estimated bytes that a denoising step takes beside the weights; ``kept`` as in `peaks`."""
    activations = activation_bytes(model, model.grid(*shape), dtype)
    return kept + 2 * activations + model.transformer_params // model.layers * _BYTES[dtype]


def peaks(
    model: ModelEntry,
    shape: ClipShape,
    dtype: str,
    *,
    quantize: str | None = None,
    vae_dtype: str = "auto",
    tiled: bool = True,
    kept: int = 0,
) -> dict[str, int]:
    """Estimated peak bytes on the device in each offload mode, the fastest mode first.

    A step's working set is taken as twice the lower bound of `activation_bytes`; `decoding` says what decoding takes,
    which is in tiles unless `tiled` is false. ``kept``: bytes that attention keeps from step to step.
    """
    width_of = _BYTES[dtype]
    transformer = transformer_bytes(model, dtype, quantize)
    text = model.text_encoder_params * width_of
    vae = model.vae_params * (4 if model.vae_float32 else width_of)
    working = step_bytes(model, shape, dtype, kept)
    decoding = decoding_bytes(model, shape, dtype, vae_dtype)[1 if tiled else 0]
    layer = 4 * (transformer // model.layers)
    return {
        "none": transformer * model.transformers + text + vae + max(working, decoding) + _RESERVE,
        "model": max(text, transformer + working, vae + decoding) + _RESERVE,
        "group": vae + max(text // 4, layer + working, decoding) + _RESERVE,
        "sequential": max(text // 12, layer // 4 + working, vae // 4 + decoding) + _RESERVE,
    }


def shape_of(plan: Plan) -> ClipShape:
    """Height, width and frames of a plan's clips."""
    return plan.height, plan.width, plan.num_frames


def kept_bytes(plan: Plan) -> int:
    """Bytes that a clip keeps from step to step as planned; see ``kept_by``."""
    return kept_by(plan.model, plan.grid, plan.preset, plan.guidance_scale)


def peaks_of(plan: Plan, dtype: str, *, tiled: bool = True) -> dict[str, int]:
    """Estimated peak of each offload mode for a plan, the fastest mode first; it decodes in tiles where they need less,
    unless `tiled` is false and the plan does not ask for them. Modes that cannot move its weights are left out: see
    `offload_modes`; with an adapter of whole weights, which are there beside the model's, all that move parts.
    """
    found = peaks(
        plan.model,
        shape_of(plan),
        dtype,
        quantize=plan.setup.quantize or (GGUF if (plan.setup.transformer or "").lower().endswith(GGUF) else None),
        vae_dtype=plan.setup.vae_dtype,
        tiled=tiled or plan.setup.vae_tiling,
        kept=kept_bytes(plan),
    )
    found = {mode: peak for mode, peak in found.items() if mode in offload_modes(plan.setup.quantize)}
    twice = [tuned for tuned in plan.setup.tuned if tuned.adapter.kind == "weights"]
    if not twice:
        return found
    more = plan.model.transformer_params * _BYTES[dtype] * len(twice)
    return {
        "none": found["none"] + more * plan.model.transformers,
        "model": found["model"] + more,
    }


@dataclass(frozen=True)
class Footprint:
    """The memory that clips of a plan are expected to take."""

    on_gpu: bool
    dtype: str
    peaks: dict[str, int]
    """Estimated peak bytes by offload mode, the fastest first: on the card, decoding in tiles where they need less, or
    of the process on a CPU, where nothing is offloaded, frames are decoded whole and the only mode is "none".
    """
    whole: dict[str, int]
    """The same without tiles that nobody asked for."""
    free: int | None = None
    """Bytes of the card that was asked about; None where none was named."""

    @property
    def fitting(self) -> tuple[str, ...]:
        """The modes whose peak fits the card that was asked about."""
        return tuple(mode for mode, peak in self.peaks.items() if self.free is not None and peak <= self.free)


def footprint(plan: Plan, dtype: str, *, on_gpu: bool, free: int | None = None) -> Footprint:
    """What a plan takes in `dtype`; `free`: bytes of a card to compare with."""
    whole = peaks_of(plan, dtype, tiled=False)
    if on_gpu:
        return Footprint(True, dtype, peaks_of(plan, dtype), whole, free)
    process = {"none": whole["none"] - _RESERVE + _PROCESS}
    return Footprint(False, dtype, process, process, free)


def largest_footprint(plans: Sequence[Plan], dtype: str, *, on_gpu: bool, free: int | None = None) -> Footprint:
    """What plans of one model that take turns need: of each mode the largest peak; `free` as in `footprint`."""
    each = [footprint(plan, dtype, on_gpu=on_gpu, free=free) for plan in plans]
    peaks = {mode: max(one.peaks[mode] for one in each) for mode in each[0].peaks}
    whole = {mode: max(one.whole[mode] for one in each) for mode in each[0].whole}
    return Footprint(on_gpu, dtype, peaks, whole, free)


@dataclass(frozen=True)
class Totals:
    """What all clips of a batch take together."""

    clips: int
    dense_flops: int
    """Self-attention operations, all dense."""
    planned_flops: int
    seconds: float | None
    """None where the time of a clip is not known."""


def totals(plans: Sequence[Plan], seconds_of: Callable[[Plan], float | None]) -> Totals:
    """Sums over plans, each of `num_videos` clips; seconds_of: expected seconds of one clip, None if not known."""
    times = [seconds_of(plan) for plan in plans]
    known = [time * plan.num_videos for time, plan in zip(times, plans, strict=True) if time is not None]
    return Totals(
        clips=sum(plan.num_videos for plan in plans),
        dense_flops=sum(plan.flops.dense * plan.num_videos for plan in plans),
        planned_flops=sum(plan.flops.planned * plan.num_videos for plan in plans),
        seconds=sum(known) if len(known) == len(plans) else None,
    )


def largest_peaks(plans: Sequence[Plan], dtype: str, *, tiled: bool = True) -> dict[str, int]:
    """Estimated peak of each offload mode for plans of one model that take turns: of each mode the largest; `tiled` as
    in `peaks_of`.
    """
    found = [peaks_of(plan, dtype, tiled=tiled) for plan in plans]
    return {mode: max(peak[mode] for peak in found) for mode in found[0]}


def overlapped_peak(plans: Sequence[Plan], dtype: str, *, tiled: bool = True) -> int:
    """Estimated peak bytes while a clip of one of the plans is decoded and one of another is denoised, with all the
    weights of their model on the device; `tiled` as in `peaks_of`.
    """
    steps = [step_bytes(plan.model, shape_of(plan), dtype, kept_bytes(plan)) for plan in plans]
    decoders = [
        decoding_bytes(plan.model, shape_of(plan), dtype, plan.setup.vae_dtype)[tiled or plan.setup.vae_tiling]
        for plan in plans
    ]
    alone = [peaks_of(plan, dtype, tiled=tiled)["none"] for plan in plans]
    weights = max(peak - max(taken) for peak, *taken in zip(alone, steps, decoders, strict=True))
    return weights + max(steps) + max(decoders) + _RESERVE  # each stream has gaps of its own


def lighter_peaks(plans: Sequence[Plan], dtype: str) -> dict[str, int]:
    """The same plans' least peak if their presets kept less, by the change to `--set`; empty where none keeps much."""
    if not any(plan.preset.refresh for plan in plans):
        return {}
    return {
        change: min(largest_peaks([_changed(plan, change) for plan in plans], dtype).values()) for change in LIGHTER
    }


def _changed(plan: Plan, assignment: str) -> Plan:
    name, value = parse_assignment(assignment)
    if not plan.preset.refresh:
        return plan
    return plan.model_copy(update={"preset": apply_overrides(plan.preset, {name: ("--set", value)})})
