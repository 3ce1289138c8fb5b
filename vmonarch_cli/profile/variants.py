"""What `profile quality` compares: the shipped presets, one field varied at a time, and the paper's ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmonarch_cli.plan.setup import AdapterFile
from vmonarch_cli.plan.tuned import adapter_names
from vmonarch_cli.presets import Preset, load_preset, shipped_names
from vmonarch_cli.profile.peers import PEER, SparsePeer

SWEEPS = ("quick", "full", "paper")
PAIRED_FRAMES = 2

GENERIC_PROMPTS = (
    "A cat walks through tall grass towards the camera, golden evening light, shallow depth of field",
    "Waves roll onto a rocky shore under a cloudy sky, seen from above",
    "An old red tram turns a corner in a busy city street at night in the rain",
    "A potter shapes a bowl of wet clay on a spinning wheel, close-up of the hands",
    "A hot air balloon rises slowly over green hills at dawn, mist in the valleys",
    "A child in a yellow coat jumps into a puddle, water splashing in slow motion",
    "A train crosses a stone bridge over a deep gorge in autumn, wide shot",
    "Steam rises from a cup of coffee beside a window while snow falls outside",
)


@dataclass(frozen=True)
class Variant:
    """One row of the comparison."""

    name: str
    group: str
    preset: Preset
    is_preset: bool = False
    frames_per_block: int = 1
    """Latent frames that share one block of the factors; more than one runs eagerly (see `blocks`)."""
    tuned: AdapterFile | None = None
    """The adapter that the row runs with."""
    peer: SparsePeer | None = None
    """Sparse attention of another package, in the place of the preset's."""
    paper_psnr: float | None = None
    """PSNR against dense in dB that the paper reports for the same change on Wan2.1-1.3B, before tuning."""


def variants(sweep: str) -> list[Variant]:
    """The rows of a sweep by group, presets first, `exact` last; a setting that two groups share comes once.

    "no first" is without the first-frame recomputation, "frame pairs" has two frames to a block and two iterations.
    """
    found = [*_presets()] if sweep != "paper" else []
    if sweep in ("full", "paper"):
        found += _ablation()
    if sweep == "full":
        found += _fields()
    exact = Variant("exact", "preset", load_preset("exact"), is_preset=True)
    kept = _distinct([variant for variant in found if variant.name != exact.name])
    groups = list(dict.fromkeys(variant.group for variant in kept))
    return [*sorted(kept, key=lambda variant: groups.index(variant.group)), exact]


def with_adapters(found: Sequence[Variant], adapters: Sequence[AdapterFile]) -> list[Variant]:
    """The rows, and one more for each adapter with the preset that it was made for, below the row without it."""
    rows = list(found)
    for name, tuned in adapter_names(adapters).items():
        preset = tuned.adapter.made_for
        row = Variant(name, "preset", preset, is_preset=True, tuned=tuned)
        below = (
            i
            for i, other in enumerate(rows)
            if other.tuned is None and tuned.adapter.misfit(other.preset, tuned.adapter.steps) is None
        )
        rows.insert(next(below, -1) + 1, row)
    return rows


def with_peers(found: Sequence[Variant], peers: Sequence[SparsePeer]) -> list[Variant]:
    """The rows, and those of sparse attention of other packages before `exact`, which is the last."""
    rows = [Variant(peer.name, PEER, Preset(name=peer.name), peer=peer) for peer in peers]
    return [*found[:-1], *rows, *found[-1:]]


def _presets() -> list[Variant]:
    presets = [load_preset(name) for name in shipped_names()]
    return [Variant(p.name, "preset", p, is_preset=True) for p in presets if p.attention != "dense"]


def _ablation() -> list[Variant]:
    """The paper's own questions: how many iterations, with the first frame or not, one frame to a block or two."""
    reported = {1: 11.18, 2: 12.59}
    found = [
        Variant(_iterations(n), "iterations", _cold(num_steps=n), paper_psnr=reported.get(n), is_preset=False)
        for n in (1, 2, 3)
    ]
    found += [
        Variant(
            f"{_iterations(n)}, no first",
            "first frame",
            _cold(num_steps=n, first_frame=False),
            paper_psnr=11.65 if n == 2 else None,
        )
        for n in (1, 2, 3)
    ]
    found += [
        Variant(name, "frame pairs", _cold(first_frame=first), frames_per_block=PAIRED_FRAMES)
        for first, name in ((True, "frame pairs"), (False, "frame pairs, no first"))
    ]
    return found


def _fields() -> list[Variant]:
    found = [Variant(_iterations(4), "iterations", _cold(num_steps=4))]
    found += [Variant(f"2 iterations, band {w}", "band", _cold(band=w)) for w in (0, 1, 2)]
    found += [
        Variant("warm, no band" if w is None else f"warm, band {w}", "warm start", _warm(w)) for w in (None, 0, 1, 2, 3)
    ]
    found += [
        Variant(f"warm, band 0, refresh {n}", "frame refresh", _warm(0).model_copy(update={"refresh": n}))
        for n in (0.5, 1, 2, 3, 4)
    ]
    found += [Variant(f"paper, c_floor {c:g}", "c_floor", _cold(c_floor=c)) for c in (0.01, 0.5, 1.0)]
    for name, preset in (("paper", _cold()), ("balanced", load_preset("balanced"))):
        for steps in (2, 4, 8):
            dense = preset.model_copy(update={"dense_steps": steps})
            found.append(Variant(f"{name}, {steps} dense steps", "dense steps", dense))
    return found


def _iterations(count: int) -> str:
    return f"{count} iteration{'' if count == 1 else 's'}"


def _cold(**fields: object) -> Preset:
    return load_preset("paper").model_copy(update=fields)


def _warm(band: int | None) -> Preset:
    return load_preset("fast").model_copy(update={"band": band, "first_frame": True, "refresh": 0})


def _distinct(found: list[Variant]) -> list[Variant]:
    """The first of each setting; a dropped one hands on what the paper reports for it."""
    kept: dict[tuple[object, ...], Variant] = {}
    for variant in found:
        key = (repr(variant.preset.computed_fields()), variant.frames_per_block)
        if key not in kept:
            kept[key] = variant
        elif kept[key].paper_psnr is None and variant.paper_psnr is not None:
            first = kept[key]
            kept[key] = Variant(first.name, first.group, first.preset, first.is_preset, paper_psnr=variant.paper_psnr)
    return list(kept.values())
