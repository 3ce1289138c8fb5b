"""Models that an adapter may be used with beside the one that it is tuned on: distilled students of the same base.

What tuning changes can be added to a model whose weights came from the same ones. Nothing in the weights says that they
did, so the user does, and the shapes must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.hub import snapshot_at_hand
from vmonarch_cli.models.registry import DEMO_ALIAS, find_model
from vmonarch_cli.models.tuned import fingerprint, shapes_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.text import printable

_MOST = 20


def same_base(clip: Plan, names: Sequence[str], *, full: bool) -> dict[str, str]:
    """Name or folder -> fingerprint of every model of `--also-for`; InputError for one that no adapter of the clip's
    model could be used with. ModelError for a name that is no model.
    """
    if not names:
        return {}
    if full:
        raise InputError(
            "--also-for goes with a LoRA, and --full writes whole weights, which would replace those of the other "
            "model: leave out one of the two"
        )
    if len(names) > _MOST:
        raise InputError(f"--also-for takes up to {_MOST} models, got {len(names)}")
    own = _folder(clip.model_source, clip.revision, clip.model.alias)
    shapes, found = shapes_of(own), {}
    for text in names:
        entry, source = find_model(text)
        name = DEMO_ALIAS if entry.alias == DEMO_ALIAS else source
        folder = _folder(source, None, text)
        other, stamp = shapes_of(folder), fingerprint(folder)
        if stamp == fingerprint(own):
            raise InputError(f"--also-for {printable(text)} has the very weights that are tuned: leave it out")
        odd = next((key for key in {**shapes, **other} if shapes.get(key) != other.get(key)), None)
        if odd is not None:
            here, there = (f"as {had[odd]}" if odd in had else "not at all" for had in (shapes, other))
            raise InputError(
                f"--also-for {printable(text)} is no model of the same base: {clip.model.alias} has "
                f"{printable(odd)} {here}, and it has that {there}"
            )
        found[name] = stamp
    return found


def _folder(source: str, revision: str | None, name: str) -> Path:
    """Where a model's weights are on this machine; InputError where they are not."""
    folder = Path(source).expanduser()
    found = folder if folder.is_dir() else snapshot_at_hand(source, revision)
    if found is None:
        raise InputError(
            f"--also-for compares weights, and those of {printable(name)} are not on this machine yet: a first clip "
            "with it downloads them"
        )
    return found
