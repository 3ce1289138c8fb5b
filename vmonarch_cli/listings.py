"""Tables of what there is: presets and their fields, models, and the resolved settings of a dry run."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmonarch_cli import memory
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.plan import Plan, count_flops, warm_bytes
from vmonarch_cli.presets import DEFAULT_PRESET, FIELD_DOCS, Preset, format_value
from vmonarch_cli.report import facts, flops_words
from vmonarch_cli.wording import binary_size, flops


def presets_table(presets: Sequence[Preset]) -> Table:
    """Name and sentence of each preset; the default is marked."""
    table = _table("preset", "what it is for")
    for preset in presets:
        name = Text(preset.name, style="bold")
        if preset.name == DEFAULT_PRESET:
            name.append(" (default)", "dim")
        table.add_row(name, Text(preset.description))
    return table


def preset_table(preset: Preset) -> Group:
    """Every field of a preset: value, unit, what is valid and one sentence."""
    table = _table("field", "value", "meaning")
    for name, doc in FIELD_DOCS.items():
        if name in ("name", "description"):
            continue
        value = format_value(getattr(preset, name))
        meaning = Text.assemble(doc.sentence, (f" Takes {doc.valid}.", "dim"))
        shown = Text.assemble((value, "cyan"), (f"\n{doc.unit}", "dim"))
        table.add_row(Text(name, style="bold"), shown, meaning)
    return Group(Text.assemble((preset.name, "bold"), f"  {preset.description}"), table)


def models_table(models: Sequence[ModelEntry]) -> Table:
    """What each model makes by default and what its self-attention costs, dense."""
    table = _table("model", "by default", "tokens", "attention", "weights")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for model in models:
        d = model.defaults
        grid = model.grid(d.height, d.width, d.num_frames)
        cost = count_flops(model, grid, Preset(name="dense", attention="dense"), 1, 2 if d.guidance_scale > 1 else 1)
        table.add_row(
            Text.assemble((model.alias, "bold"), "\n", (model.hub_id or "comes with vmonarch", "dim"), overflow="fold"),
            f"{d.width}x{d.height}\n{d.num_frames} frames",
            f"{grid[0] * grid[1] * grid[2]:,}",
            flops(cost.dense),
            binary_size(memory.weight_bytes(model, "bfloat16")),
        )
    table.caption = "attention: of one denoising step, dense; weights: in bfloat16"
    return table


def dry_run(plan: Plan) -> Group:
    """Every resolved setting with its origin, and what would be computed and written."""
    table = _table("setting", "value", "from")
    for name, entry in plan.settings().items():
        if name == "output":  # the files follow below
            continue
        value = _shown(entry["value"])
        style = "dim" if entry["origin"] in ("default", "model default") else "bold"
        table.add_row(name, Text(value, overflow="fold"), Text(entry["origin"], style=style))
    shape = " x ".join(str(n) for n in plan.grid)
    dtype = "float32" if plan.dtype == "auto" else plan.dtype
    need = memory.at_least(plan.model, plan.grid, plan.height, plan.width, plan.num_frames, dtype)
    rows: list[tuple[str, RenderableType]] = [
        ("grid", f"{shape} = {plan.tokens:,} tokens (latent frames x rows x columns)"),
        ("attention", flops_words(plan)),
        ("memory", f"at least {binary_size(need)} in {dtype} with all weights loaded"),
    ]
    if plan.preset.warm_start and plan.preset.attention != "dense":
        rows.append(("warm start", f"keeps up to {binary_size(warm_bytes(plan))} of L factors between steps"))
    rows += [("file", str(path)) for path in plan.outputs[:10]]
    if len(plan.outputs) > 10:
        rows.append(("", f"and {len(plan.outputs) - 10} more"))
    return Group(table, facts(rows))


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False, caption_justify="left")
    for title in titles:
        table.add_column(title)
    return table
