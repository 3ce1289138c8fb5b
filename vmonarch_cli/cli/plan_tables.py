"""Tables of what there is: presets and their fields, models, and the resolved settings of a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmonarch_cli.cli.report import flops_words
from vmonarch_cli.cli.tables import facts, table
from vmonarch_cli.machine.hardware import device_key
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.plan.history import expect, resolved_dtype
from vmonarch_cli.plan.memory import at_least, kept_bytes, shape_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.presets import DEFAULT_PRESET, FIELD_DOCS, Preset, format_value
from vmonarch_cli.text import binary_size, seconds


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
    return Group(Text.assemble((preset.name, "bold"), f"  {preset.description}"), made)


def dry_run(plan: Plan) -> Group:
    """Every resolved setting with its origin, and what would be computed and written."""
    made = table("setting", "value", "from")
    for name, entry in plan.settings().items():
        if name == "output":  # the files follow below
            continue
        value = _shown(entry["value"])
        style = "dim" if entry["origin"] in ("default", "model default") else "bold"
        made.add_row(name, Text(value, overflow="fold"), Text(entry["origin"], style=style))
    shape = " x ".join(str(n) for n in plan.grid)
    dtype, need = resolved_dtype(plan), memory_bytes(plan)
    rows: list[tuple[str, RenderableType]] = [
        ("grid", f"{shape} = {plan.tokens:,} tokens (latent frames x rows x columns)"),
        ("attention", flops_words(plan)),
        ("memory", f"at least {binary_size(need)} in {dtype} with all weights loaded"),
    ]
    if kept_bytes(plan):
        rows.append(("kept", f"up to {binary_size(kept_bytes(plan))} of factors and corrections between steps"))
    rows.append(("time", _time_words(plan)))
    rows += [("file", f"{path} (replaced)" if path.exists() else str(path)) for path in plan.outputs[:10]]
    if len(plan.outputs) > 10:
        rows.append(("", f"and {len(plan.outputs) - 10} more"))
    return Group(made, facts(rows))


def estimates(plan: Plan) -> dict[str, Any]:
    """The memory and time that a plan will need, for JSON; "time" is None without a recorded clip to go by."""
    expected = expect(plan)
    return {
        "memory": {
            "at_least_bytes": memory_bytes(plan),
            "warm_state_bytes": kept_bytes(plan),
            "dtype": resolved_dtype(plan),
        },
        "time": None if expected is None else {**expected.to_json(), "all_clips_s": expected.clip_s * plan.num_videos},
        "replaced": [str(path) for path in plan.outputs if path.exists()],
    }


def memory_bytes(plan: Plan) -> int:
    """Bytes that a run of this plan needs at the very least, with all weights loaded."""
    return at_least(plan.model, shape_of(plan), resolved_dtype(plan))


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
