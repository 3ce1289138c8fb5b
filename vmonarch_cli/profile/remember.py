"""Keep what `profile model` found of whole clips, so that `vmonarch plan` can expect times from it."""

from __future__ import annotations

from collections.abc import Sequence

from vmonarch_cli.machine.hardware import device_key
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.plan.costs import count_flops
from vmonarch_cli.plan.history import Measurement, computed_fields, keep
from vmonarch_cli.plan.small_calls import repays_fusing
from vmonarch_cli.presets import Preset, at_steps, load_preset
from vmonarch_cli.profile.results import FUSED, ModelProfile, StepRow


def remember_profile(
    profile: ModelProfile, entry: ModelEntry, source: str, presets: Sequence[Preset], device: str, dtype: str
) -> None:
    """Keep what `profile model` found of whole clips; nothing of a compiled model, which `generate` does not make."""
    if profile.compiled or profile.decode_s is None:
        return
    measured = [(preset, _row(profile, preset, entry.hidden_dim)) for preset in presets]
    measured.append((load_preset("dense"), profile.fastest_dense))
    for preset, row in measured:
        if row is None or row.clip_s is None or row.step is None:
            continue
        attention_s = (row.share(profile.floor(row)) or 0) * row.clip_s
        if row.attention_s is not None:
            attention_s = row.clip_s * row.attention_s / row.step.median
        keep(
            Measurement(
                device=device_key(device),
                model=source,
                grid=profile.grid,
                branches=profile.forwards,
                preset=computed_fields(at_steps(preset, profile.clip_steps)),
                dtype=dtype,
                steps=profile.clip_steps,
                attention_s=attention_s,
                denoise_s=row.clip_s,
                rest_s=profile.decode_s + (profile.text_encode_s or 0),
                flops=count_flops(
                    *(entry, profile.grid, preset, profile.clip_steps, profile.forwards), others=_others(entry, profile)
                ).planned,
                peak_memory_bytes=row.peak_bytes,
            )
        )


def _row(profile: ModelProfile, preset: Preset, channels: int) -> StepRow | None:
    """The row of a preset as a run makes it: with fused blocks where these repay, warm where it starts so."""
    fused, name = f"{preset.name}, {FUSED}", preset.name
    if repays_fusing(profile.tokens, channels) and any(row.name == fused and row.step for row in profile.rows):
        name = fused
    return profile.row(name, "warm") or profile.row(name)


def _others(entry: ModelEntry, profile: ModelProfile) -> int:
    """Tokens of a call beside those of the grid."""
    width, height, num_frames = profile.size
    return entry.other_tokens(height, width, num_frames)
