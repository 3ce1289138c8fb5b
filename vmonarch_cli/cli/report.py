"""What `generate` shows: header, table of steps, summary; from plain data to rich renderables, nothing prints here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmonarch_cli.cli.schedule_tables import schedule_words
from vmonarch_cli.cli.spent import SpentBar
from vmonarch_cli.cli.tables import ABSENT, Column, facts, fitted, maybe, times
from vmonarch_cli.clip.record_parts import AudioFacts
from vmonarch_cli.models.lora_facts import is_local
from vmonarch_cli.models.lora_files import parse_lora
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.resolve import MODEL_DEFAULT
from vmonarch_cli.plan.setup import QUANTISED_DENSE, AdapterFile
from vmonarch_cli.text import binary_size, counted, flops, seconds
from vmonarch_cli.timing import LOST_SUBJECT, ClipResult, ClipTiming, Coverage, StepAttention
from vmonarch_kernels.cost import is_small

_TELLS = 0.01
"""Seconds of hidden work below which nobody needs to hear of it."""


def header(plan: Plan, machine: Machine) -> Table:
    """What is about to run, in seven lines, and one more each for an adapter and 8-bit weights."""
    shape, frames = " x ".join(str(n) for n in plan.grid), counted(plan.num_frames, "frame")
    return facts(
        [
            ("model", Text.assemble((plan.model.title, "bold"), f"  {_layers(plan)}")),
            ("clip", f"{plan.width}x{plan.height}, {frames} at {plan.fps} fps, {counted(plan.steps, 'step')}"),
            ("tokens", f"{plan.tokens:,} = {shape} (latent frames x rows x columns){_others(plan)}"),
            ("preset", Text.assemble((plan.preset.name, "bold"), f"  {preset_words(plan)}")),
            *([] if plan.preset_reason is None else [("auto", plan.preset_reason)]),
            *(("tuned", words) for words in adapter_words(plan)),
            ("device", f"{machine.device_name}, {machine.dtype}, attention by {_attention_words(plan, machine)}"),
            *quantize_rows(plan),
            ("attention", _work_words(plan, machine)),
            *small_rows(plan, machine),
            *lora_rows(plan),
            *([("memory", machine.memory)] if machine.memory else []),
        ]
    )


def _others(plan: Plan) -> str:
    return f", beside {plan.other_tokens:,} of sound and given frames" if plan.other_tokens else ""


def _attention_words(plan: Plan, machine: Machine) -> str:
    """'triton, dense calls by fa4, fused blocks by triton'; on a CPU nothing but torch's own runs dense calls."""
    structured, dense = machine.impl_of(plan.preset), machine.dense[0]
    by = machine.fused_of(plan)
    fused = "" if by is None else f", fused blocks by {by}"
    if _replays(plan, machine) and not machine.runs_dense(plan):
        fused += ", small calls replayed as CUDA graphs"
    if plan.setup.dense_attention == "auto" and not machine.on_gpu:
        return structured + fused
    named = f"{dense} (quantised)" if dense in QUANTISED_DENSE else dense
    return (f"{named} (dense)" if structured == "dense" else f"{structured}, dense calls by {named}") + fused


def adapter_words(plan: Plan) -> list[str]:
    """The adapter that a plan runs with, or why the model's own are not used; nothing where there are none."""
    if plan.tuned is not None:
        return [tuned_words(plan.tuned, plan.origins["tuned"])]
    return [] if plan.tuned_note is None else [f"none: {plan.tuned_note}"]


def small_notes(plans: Sequence[Plan], machine: Machine) -> list[str]:
    """The same of several plans, a sentence for each kind of call; for what prints no header."""
    found = (str(words) for plan in plans for _, words in small_rows(plan, machine))
    return list(dict.fromkeys(found))


def _work_words(plan: Plan, machine: Machine) -> str:
    """Operations of the clip's attention, and how the steps share them."""
    if machine.runs_dense(plan):
        return flops_words(plan.with_dense_costs())
    return f"{flops_words(plan)}; {schedule_words(plan.step_costs)}"


def small_rows(plan: Plan, machine: Machine) -> list[tuple[str, RenderableType]]:
    """Why all calls run dense where they are small: one row, none where they are not."""
    why = machine.why_dense(plan)
    if why is None:
        return []
    off = "" if plan.tuned is None else "; the adapter, which is for structured calls, is off"
    return [("small calls", why + off)]


def quantize_rows(plan: Plan) -> list[tuple[str, RenderableType]]:
    """What `--quantize` does to the transformer's weights: one row, none where it does nothing."""
    kind = plan.setup.quantize
    if kind is None:
        return []
    if plan.setup.linear_dtype is None:
        return [("weights", f"the transformer's wait in {kind.removesuffix('-storage')}: less memory, no gain in time")]
    return [("weights", f"projections of the blocks compute in {kind}, a scale for each token and each output channel")]


def _replays(plan: Plan, machine: Machine) -> bool:
    """Whether the structured calls are small, and launched together."""
    runs = machine.on_gpu and plan.setup.graphs and machine.impl_of(plan.preset) == "triton"
    return runs and is_small(plan.tokens, plan.model.heads)


def tuned_words(tuned: AdapterFile, origin: str) -> str:
    """An adapter's file, where it came from, and what it was made for."""
    if origin == MODEL_DEFAULT:
        return f"{Path(tuned.path).name} of the model, {tuned.adapter.words}"
    return f"{tuned.path}, {tuned.adapter.words}"


def lora_rows(plan: Plan) -> list[tuple[str, RenderableType]]:
    """One row for each LoRA file: its format, rank, alpha and place; a dry run does not look at those of the hub."""
    rows: list[tuple[str, RenderableType]] = [("lora", facts.words()) for facts in plan.loras]
    loras = [parse_lora(text) for text in plan.setup.loras]
    if len(plan.loras) < len(loras):
        rows += [("lora", f"{lora.source}, of the hub, scale {lora.scale:g}") for lora in loras if not is_local(lora)]
    return rows


def _layers(plan: Plan) -> str:
    both = f"{plan.model.transformers} x " if plan.model.transformers > 1 else ""
    return f"{both}{counted(plan.model.layers, 'layer')}, {counted(plan.model.heads, 'head')} x {plan.model.head_dim}"


def preset_words(plan: Plan) -> str:
    """The preset's fields in words, only those that matter to it."""
    preset = plan.preset
    if preset.attention == "dense":
        return "dense attention"
    iterations = _counted(preset.num_steps, "iteration")
    words = [f"warm start, {iterations} in the first step" if preset.warm_start else iterations]
    if preset.band is not None:
        frames = "own frame" if preset.band == 0 else f"{min(2 * preset.band + 1, plan.grid[0])} nearest frames"
        words.append(f"{frames} exact")
    if preset.first_frame:
        words.append("first frame exact")
    if preset.refresh:
        words.append(f"{preset.refresh:g} more frame{'' if preset.refresh == 1 else 's'} exact in turn")
    if preset.dense_steps:
        words.append(f"first {_counted(int(preset.dense_steps), 'step')} dense")
    if preset.dense_layers:
        words.append(f"first {_counted(preset.dense_layers, 'layer')} dense")
    return ", ".join(words)


def _counted(count: int, noun: str) -> str:
    """'1 step', '4 steps'; a bare noun after "first" reads well for one, too."""
    return noun if count == 1 and noun != "iteration" else f"{count} {noun}{'' if count == 1 else 's'}"


def flops_words(plan: Plan) -> str:
    """'94 GFLOP dense, 35 GFLOP as planned (2.7x less)' of a whole clip."""
    return flops_ratio(plan.flops.planned, plan.flops.dense, "per clip")


def flops_ratio(planned: int, dense: int, what: str) -> str:
    """'35 GFLOP per clip against 94 GFLOP dense (2.7x less)'; `what`: "per clip" or what else was counted."""
    if dense == planned:
        return f"{flops(dense)} {what}, all dense"
    ratio = f"{dense / planned:.1f}x less" if planned < dense else f"{planned / dense:.1f}x more"
    return f"{flops(planned)} {what} against {flops(dense)} dense ({ratio})"


def step_table(timing: ClipTiming | Sequence[StepAttention], width: int) -> Table:
    """One row per denoising step, a row of medians, and of a whole clip a row of its sums.

    The times of one column share their unit.
    """
    steps = timing.steps if isinstance(timing, ClipTiming) else timing
    step_unit, step_time = _time_column([s.step_s for s in steps])
    attention_unit, attention_time = _time_column([s.attention_s for s in steps] + [s.dense_s for s in steps])
    clip = _clip_cells(timing, step_time, attention_time) if isinstance(timing, ClipTiming) else {}

    def column(
        title: str, values: Sequence[float | None], shown: Callable[[float], str], rank: int, style: str = ""
    ) -> Column:
        known = [value for value in values if value is not None]
        median = shown(statistics.median(known)) if known else ""
        name = title.split("\n")[0]
        footer = f"{median}\n{clip.get(name, '')}" if clip else median
        cells = [ABSENT if value is None else shown(value) for value in values]
        return Column(title if "\n" in title else f"\n{title}", cells, footer, style, rank)

    speedups = [s.speedup if s.structured_calls else None for s in steps]
    columns = [
        Column("\nstep", [_step_cell(s) for s in steps], "median\nclip" if clip else "median"),
        Column("\nsigma", [maybe(s.sigma, "{:.3f}".format) for s in steps], "", "dim", rank=6),
        column(f"step\n{step_unit}", [s.step_s for s in steps], step_time, rank=3),
        column(f"attention\n{attention_unit}", [s.attention_s for s in steps], attention_time, rank=0),
        column("share", [s.attention_share for s in steps], _percent, rank=5),
        column(f"dense\n{attention_unit}", [s.dense_s for s in steps], attention_time, rank=4),
        replace(column("speedup", speedups, "{:.2f}x".format, rank=0), cells=[times(value) for value in speedups]),
        column("error", [s.error for s in steps], "{:.3f}".format, rank=2, style="dim"),
    ]
    return fitted(columns, width, show_footer=True, footer_style="bold")


def _step_cell(step: StepAttention) -> Text:
    mark = "" if step.structured_calls == step.calls else (" d" if step.structured_calls == 0 else " p")
    return Text.assemble(str(step.index + 1), (mark, "yellow"))


def _clip_cells(
    timing: ClipTiming, step_time: Callable[[float], str], attention_time: Callable[[float], str]
) -> dict[str, str]:
    """The sums of a whole clip, and the ratio of the sums; of the errors the largest."""
    steps_s = sum(step.step_s for step in timing.steps)
    dense, gain, worst = timing.dense_attention_s, timing.attention_speedup, timing.worst_step
    cells = {"step": step_time(steps_s), "attention": attention_time(timing.attention_s)}
    if steps_s > 0:
        cells["share"] = _percent(timing.attention_s / steps_s)
    if dense is not None and gain is not None:
        cells |= {"dense": attention_time(dense), "speedup": f"{gain:.2f}x"}
    if worst is not None and worst.error is not None:
        cells["error"] = f"{worst.error:.3f}"
    return cells


def step_legend(timing: ClipTiming | Sequence[StepAttention]) -> Text:
    """What the columns, rows and marks of a `step_table` mean, only those that occur."""
    steps = timing.steps if isinstance(timing, ClipTiming) else timing
    whole = isinstance(timing, ClipTiming)
    parts = []
    sampled = any(s.dense_s for s in steps)
    if sampled:
        parts.append("dense and error: on the tensors of a step's first forward, outside its time")
    ran_by = {s.dense_call_by for s in steps} - {None, "sdpa"}
    if ran_by:
        parts.append(f"dense: by {', '.join(sorted(map(str, ran_by)))}, the fastest that is installed")
    if any(s.structured_calls for s in steps):
        parts.append("median: of each column" + (", speedup and error of structured steps alone" if sampled else ""))
    if any(s.structured_calls for s in steps) and whole:
        ratio = ", their ratio, and the largest error" if sampled else ""
        parts.append(f"clip: sums of all steps{ratio}")
    if sampled and any(s.structured_calls and s.dense_s is None for s in steps) and whole:
        parts.append("dense of the clip: steps without a sample count by the mean of the samples")
    if any(0 < s.structured_calls < s.calls for s in steps):
        parts.append("p: some layers dense")
    if any(s.structured_calls == 0 for s in steps):
        parts.append("d: a dense step")
    return Text("; ".join(parts), style="dim")


def summary(result: ClipResult, load_s: float | None) -> Table:
    """What a clip cost and what the attention gained, end to end."""
    timing = result.timing
    rows: list[tuple[str, RenderableType]] = [("attention", _attention_line(timing))]
    rows.append(("end to end", _end_to_end(timing)))
    parts = [("text", timing.text_encode_s), ("denoise", timing.denoise_s), ("decode", timing.decode_s)]
    parts.append(("write", timing.write_s))
    spent = ", ".join(f"{name} {seconds(value)}" for name, value in parts)
    rows.append(("of which", spent))
    hidden = timing.hidden_write_s
    rows.append(
        ("spent", SpentBar(timing.parts, f"{seconds(hidden)} of writing beside decoding" if hidden > _TELLS else ""))
    )
    if load_s is not None:
        rows.append(("load", f"{seconds(load_s)} for the model, in no figure above but spent"))
    if timing.error is not None:
        rows.append(("error", _error_line(timing)))
    rows.append(("coverage", coverage_words(result.coverage)))
    if timing.first_call_s is not None:
        ahead = f"; {seconds(timing.hidden_compile_s)} more while the model loaded" if timing.hidden_compile_s else ""
        words = f"{seconds(timing.first_call_s)} with kernel compilation, in no figure above but spent{ahead}"
        rows.append(("first call", words))
    if timing.peak_memory_bytes is not None:
        kind = f" ({timing.peak_memory_kind})" if timing.peak_memory_kind else ""
        warm = f", of it {binary_size(timing.warm_state_bytes)} kept between steps" if timing.warm_state_bytes else ""
        rows.append(("memory", f"peak {binary_size(timing.peak_memory_bytes)}{kind}{warm}"))
    audio = result.record.get("audio")
    if audio is not None:
        beside = "" if audio["file"] == result.path.name else f", {result.path.with_name(audio['file'])}"
        rows.append(("sound", f"{AudioFacts.model_validate(audio).words}{beside}"))
    rows.append(("seed", str(result.seed)))
    rows.append(("record", str(result.record_path)))
    return facts(rows)


def _attention_line(timing: ClipTiming) -> Text:
    share = f" ({_percent(timing.attention_s / timing.denoise_s)} of denoising)" if timing.denoise_s > 0 else ""
    line = Text(f"{seconds(timing.attention_s)}{share}")
    if timing.attention_speedup is None:
        return line
    line.append(", ").append(times(timing.attention_speedup)).append(" against dense over the whole clip")
    if timing.attention_speedup < 1:
        line.append("; not worth it at this size", "yellow")
    return line


def _error_line(timing: ClipTiming) -> Text:
    """Median and largest error of the samples, and what to do where the first step stands out."""
    line = Text(f"{timing.error:.3f} relative L2 against dense attention, median of the samples")
    worst = timing.worst_step
    if worst is not None and worst.error is not None:
        line.append(f"; largest {worst.error:.3f} in step {worst.index + 1}")
    if timing.first_step_stands_out:
        line.append(f"; {LOST_SUBJECT}", "yellow")
    return line


def _end_to_end(timing: ClipTiming) -> Text:
    spent = timing.text_encode_s + timing.denoise_s + timing.decode_s + timing.write_s
    line = Text(seconds(spent))
    if timing.end_to_end_speedup is not None:
        line.append(", ").append(times(timing.end_to_end_speedup)).append(" against all dense, estimated")
    return line


def coverage_words(coverage: Coverage) -> str:
    """'304 of 320 self-attention calls structured; dense: 16 (dense_steps)'."""
    words = f"{coverage.structured:,} of {coverage.calls:,} self-attention calls structured"
    dense = ", ".join(f"{count:,} ({reason})" for reason, count in coverage.dense.items())
    return f"{words}; dense: {dense}" if dense else words


def clip_report(result: ClipResult, load_s: float | None, title: str, width: int) -> Group:
    """Table, legend and summary of one clip."""
    parts: list[RenderableType] = [Text(title, style="bold")] if title else []
    timing = result.timing
    parts += [step_table(timing, width), step_legend(timing), Text(), summary(result, load_s), Text()]
    return Group(*parts)


def interrupted_report(steps: Sequence[StepAttention], width: int) -> Group:
    """The steps of a clip that was not finished."""
    return Group(step_table(steps, width), step_legend(steps), Text())


def _time_column(values: Sequence[float | None]) -> tuple[str, Callable[[float], str]]:
    """One unit and number of decimals for a whole column, by its largest value."""
    top = max((value for value in values if value is not None), default=0.0)
    unit, scale = ("s", 1.0) if top >= 1 else ("ms", 1e3)
    decimals = 1 if top * scale >= 100 else 2
    return unit, lambda value: f"{value * scale:.{decimals}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
