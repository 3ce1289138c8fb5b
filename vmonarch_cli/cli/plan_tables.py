"""Tables of what there is: presets and their fields, models, and the resolved settings of a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmonarch_cli.cli.report import adapter_words, flops_ratio, flops_words, lora_rows, quantize_rows
from vmonarch_cli.cli.schedule_tables import cost_table, schedule_rows
from vmonarch_cli.cli.tables import facts, table
from vmonarch_cli.machine.hardware import device_key
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.plan.history import expect, resolved_dtype, will_use_gpu
from vmonarch_cli.plan.memory import (
    Footprint,
    kept_bytes,
    largest_footprint,
    lighter_peaks,
    overlapped_peak,
    totals,
)
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.resolve import MODEL_DEFAULT
from vmonarch_cli.plan.setup import COMPUTED
from vmonarch_cli.plan.small_calls import small_words
from vmonarch_cli.plan.small_calls_here import as_it_will_run, runs_small, small_limit
from vmonarch_cli.presets import DEFAULT_PRESET, FIELD_DOCS, Preset, format_value
from vmonarch_cli.text import binary_size, seconds
from vmonarch_kernels.dense_facts import PACKAGES, installed


def presets_table(presets: Sequence[Preset]) -> Table:
    """Name and sentence of each preset; the default is marked."""
    made = table("preset", "what it is for")
    for preset in presets:
        name = Text(preset.name, style="bold")
        if preset.name == DEFAULT_PRESET:
            name.append(" (default)", "dim")
        elif preset.name == DEMO.defaults.preset:
            name.append(" (demo model's default)", "dim")
        made.add_row(name, Text(preset.description))
    return made


def preset_table(preset: Preset) -> Group:
    """Every field of a preset: value, unit, what is valid and one sentence."""
    made = table("field", "value", "meaning")
    for name, doc in FIELD_DOCS.items():
        if name in ("name", "description"):
            continue
        value = format_value(getattr(preset, name))
        meaning = Text.assemble(doc.sentence, (f" Takes {doc.valid}.", "dim"))
        shown = Text.assemble((value, "cyan"), (f"\n{doc.unit}", "dim"))
        made.add_row(Text(name, style="bold"), shown, meaning)
    return Group(Text.assemble((preset.name, "bold"), f"  {preset.description}"), made, cost_table(preset))


def dry_run(plan: Plan, vram: float | None = None) -> Group:
    """Every resolved setting with its origin, and what would be computed and written; `vram`: GiB of a card."""
    made = table("setting", "value", "from")
    made.columns[0].overflow = "fold"
    for name, entry in plan.settings().items():
        if name == "output":  # the files follow below
            continue
        value = entry["value"]
        if name == "tuned" and entry["origin"] == MODEL_DEFAULT:
            value = Path(value).name
        value = _shown(value)
        style = "dim" if entry["origin"] in ("default", "model default") else "bold"
        made.add_row(name, Text(value, overflow="fold"), Text(entry["origin"], style=style))
    shape = " x ".join(str(n) for n in plan.grid)
    small = _small_rows(plan)
    work = flops_words(as_it_will_run(plan))
    rows: list[tuple[str, RenderableType]] = [
        ("grid", f"{shape} = {plan.tokens:,} tokens (latent frames x rows x columns)"),
        *others_row(plan),
        *([] if plan.preset_reason is None else [("preset auto", plan.preset_reason)]),
        ("attention", work),
        *([] if small else schedule_rows(plan.step_costs)),
        *dense_rows(plan),
        *_fused_rows(plan),
        *small,
        *_quantize_rows(plan),
        *(("adapter", words) for words in adapter_words(plan)),
        ("sigmas", _sigma_words(plan)),
        *lora_rows(plan),
        *memory_rows(memory_of([plan], vram), [plan]),
    ]
    if kept_bytes(plan):
        rows.append(("kept", f"up to {binary_size(kept_bytes(plan))} of factors and corrections between steps"))
    rows.append(("time", _time_words(plan)))
    rows += [("file", f"{path} (replaced)" if path.exists() else str(path)) for path in plan.outputs[:10]]
    if len(plan.outputs) > 10:
        rows.append(("", f"and {len(plan.outputs) - 10} more"))
    return Group(made, facts(rows))


def others_row(plan: Plan) -> list[tuple[str, RenderableType]]:
    """What the self-attention of a packed sequence has beside the grid; nothing of other models."""
    count, given = plan.other_tokens, len(plan.given_frames)
    if not count:
        return []
    frames = "" if not given else " and of the given frame" if given == 1 else f" and of {given} given frames"
    return [("beside it", f"{count:,} tokens of sound{frames}, and those of the prompt: exact in every call")]


def dense_rows(plan: Plan) -> list[tuple[str, RenderableType]]:
    """What will compute the calls that run dense: one row where there is a choice, on a GPU or by name."""
    wanted = plan.setup.dense_attention
    if wanted == "auto" and not will_use_gpu(plan):
        return []
    found = {name: package for name, package in PACKAGES.items() if installed(name)}
    if wanted == "auto":
        best = next((name for name, package in found.items() if package.recommended), None)
        words = "sdpa" if best is None else f"{_package_words(best)} where it takes this GPU, otherwise sdpa"
    else:
        missing = wanted in PACKAGES and wanted not in found
        words = f"{wanted}, which is not installed here" if missing else _package_words(wanted)
    return [("dense calls", f"by {words}")]


def _fused_rows(plan: Plan) -> list[tuple[str, RenderableType]]:
    """That the blocks will be fused: one row where a GPU will run them so."""
    asked = plan.fuses_unasked if plan.setup.fuse is None else plan.setup.fuse
    if not asked or not will_use_gpu(plan):
        return []
    return [("blocks", "fused between their products, where Triton runs on this GPU; --no-fuse keeps the stock ones")]


def _small_rows(plan: Plan) -> list[tuple[str, RenderableType]]:
    """That all calls will run dense because they are small, as far as the GPU's name says so; otherwise no row."""
    if not runs_small(plan):
        return []
    return [("small calls", small_words(plan.tokens, small_limit(plan), asked=plan.setup.dense_below is not None))]


def _quantize_rows(plan: Plan) -> list[tuple[str, RenderableType]]:
    """As in the header of a run, and where this machine would refuse to run it so, that it would."""
    facts_of = COMPUTED.get(plan.setup.quantize or "")
    rows = quantize_rows(plan)
    if facts_of is None or will_use_gpu(plan):
        return rows
    least = ".".join(map(str, facts_of.capability))
    return [
        (name, f"{words}; not here, without an NVIDIA GPU of compute capability {least} or later")
        for name, words in rows
    ]


def _package_words(name: str) -> str:
    """'fa4 (flash-attn-4 4.0.0)'; a backend of torch by its name alone."""
    package = PACKAGES.get(name)
    if package is None:
        return name
    quantised = ", quantised" if package.quantised else ""
    return f"{name} ({package.distribution} {package.version}{quantised})"


def _sigma_words(plan: Plan) -> str:
    """The noise levels of the steps, the middle of a long list left out."""
    if plan.noise_levels is None:
        return "the model's own schedule, which is known when it runs"
    shown = [f"{sigma:.3f}" for sigma in plan.noise_levels]
    if len(shown) > 12:
        shown = [*shown[:6], "...", *shown[-4:]]
    return " ".join(shown)


def estimates(plan: Plan, vram: float | None = None) -> dict[str, Any]:
    """The memory and time that a plan will need, for JSON; "time" is None without a recorded clip to go by."""
    expected = expect(plan)
    return {
        "memory": {**_memory_json(memory_of([plan], vram)), "warm_state_bytes": kept_bytes(plan)},
        "time": None if expected is None else {**expected.to_json(), "all_clips_s": expected.clip_s * plan.num_videos},
        "replaced": [str(path) for path in plan.outputs if path.exists()],
    }


def totals_rows(plans: Sequence[Plan], vram: float | None = None) -> list[tuple[str, RenderableType]]:
    """What all clips of a batch take together; `plans` are of the clips that are still to be made."""
    sums = totals([as_it_will_run(plan) for plan in plans], _clip_seconds)
    clips = f"for {sums.clips} clip{'s' if sums.clips > 1 else ''}"
    if sums.seconds is None:
        time = f"no record of this model on {device_key(plans[0].device)} yet: a first clip makes one"
    else:
        time = f"about {seconds(sums.seconds)} {clips}, from earlier clips on this machine"
    return [
        ("attention", flops_ratio(sums.planned_flops, sums.dense_flops, clips)),
        *memory_rows(memory_of(plans, vram), plans),
        ("time", time),
    ]


def overlap_rows(
    plans: Sequence[Plan], wanted: bool | None, vram: float | None = None
) -> list[tuple[str, RenderableType]]:
    """Whether clips of a batch will be decoded beside the next one's denoising, as far as a plan can know; `wanted`: as
    asked for. No row for a single clip.
    """
    if len(plans) < 2:
        return []
    memory = memory_of(plans, vram)
    if wanted is False:
        words = "none, as asked"
    elif not memory.on_gpu:
        words = "a clip is decoded while the next is denoised, as asked" if wanted else "none on a CPU"
    else:
        need = overlapped_peak(plans, memory.dtype)
        words = f"about {binary_size(need)} of the card to decode a clip while the next is denoised"
        if memory.free is not None:
            words += ", fits" if need <= memory.free else ", does not fit"
    return [("overlap", words)]


def totals_json(plans: Sequence[Plan], vram: float | None = None) -> dict[str, Any] | None:
    """The same for JSON; None where no clip is left to make."""
    if not plans:
        return None
    sums = totals([as_it_will_run(plan) for plan in plans], _clip_seconds)
    return {
        "clips": sums.clips,
        "flops": {"dense": sums.dense_flops, "planned": sums.planned_flops},
        "seconds": sums.seconds,
        "memory": _memory_json(memory_of(plans, vram)),
    }


def _clip_seconds(plan: Plan) -> float | None:
    expected = expect(plan)
    return None if expected is None else expected.clip_s


def _memory_json(memory: Footprint) -> dict[str, Any]:
    card = {} if memory.free is None else {"vram_bytes": memory.free, "fits": list(memory.fitting)}
    return {
        "on": "gpu" if memory.on_gpu else "cpu",
        "peak_bytes": memory.peaks,
        **({"full_frames_peak_bytes": memory.whole} if memory.on_gpu else {}),
        "dtype": memory.dtype,
        **card,
    }


def memory_of(plans: Sequence[Plan], vram: float | None = None) -> Footprint:
    """The expected memory of plans of one model where they will run, or on a card of `vram` GiB."""
    first = plans[0]
    if vram is None:
        return largest_footprint(plans, resolved_dtype(first), on_gpu=will_use_gpu(first))
    dtype = "bfloat16" if first.dtype == "auto" else first.dtype
    return largest_footprint(plans, dtype, on_gpu=True, free=round(vram * 2**30))


def memory_rows(memory: Footprint, plans: Sequence[Plan]) -> list[tuple[str, RenderableType]]:
    """One row on a CPU; on a GPU one for each offload mode, with whether it fits where a card was named."""
    if not memory.on_gpu:
        return [("memory", f"about {binary_size(memory.peaks['none'])} of this machine in {memory.dtype}")]
    rows: list[tuple[str, RenderableType]] = []
    for mode, peak in memory.peaks.items():
        whole, free = memory.whole[mode], memory.free
        if free is None:
            tiles = f", {binary_size(whole)} where frames are not decoded in tiles" if whole > peak else ""
            rows.append((f"offload {mode}", f"about {binary_size(peak)} of the card in {memory.dtype}{tiles}"))
            continue
        in_tiles = peak <= free < whole
        fits = "does not fit" if peak > free else "fits, decoding in tiles" if in_tiles else "fits"
        size = binary_size(whole if whole <= free else peak)
        rows.append((f"offload {mode}", f"about {size} of the card in {memory.dtype}, {fits}"))
    if memory.free is not None:
        rows.append(("a card", f"of {binary_size(memory.free)}: {_advice(memory, plans)}"))
    return rows


def _advice(memory: Footprint, plans: Sequence[Plan]) -> str:
    if memory.fitting:
        return f"--offload auto takes {memory.fitting[0]} when all of it is free"
    lighter = lighter_peaks(plans, memory.dtype).items()
    change = next((words for words, peak in lighter if memory.free is not None and peak <= memory.free), None)
    other = "a smaller size, fewer frames or --quantize fp8-storage"
    return f"no offload mode fits; {f'--set {change} does, or ' if change else ''}choose {other}"


def _time_words(plan: Plan) -> str:
    expected = expect(plan)
    if expected is None:
        device = device_key(plan.device)
        return f"no record of this model on {device} yet: `vmonarch profile model`, or a first clip, makes one"
    words = f"about {seconds(expected.clip_s)} a clip"
    if plan.num_videos > 1:
        words += f", {seconds(expected.clip_s * plan.num_videos)} for {plan.num_videos}"
    basis = "measured on a clip like this" if expected.exact else "estimated from another clip"
    peak = f", peak {binary_size(expected.peak_memory_bytes)}" if expected.peak_memory_bytes else ""
    return f"{words} ({basis}, made on {expected.device} on {expected.recorded}{peak})"


def _shown(value: object) -> str:
    if value is None or value in ((), []):
        return "none"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if len(text) <= 48 else text[:45] + "..."
