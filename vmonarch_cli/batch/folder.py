"""Begin or go on with a batch in its folder: what the manifest knows, what is due again, and every clip's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmonarch_cli import __version__
from vmonarch_cli.batch.clips import PlannedClip, assign_names, in_running_order
from vmonarch_cli.batch.manifest import DONE, FAILED, SCHEMA, Manifest, ManifestEntry, happened, planned
from vmonarch_cli.clip.whole import damage
from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import latents_path


@dataclass(frozen=True)
class Terms:
    """How to treat what is there. resume: go on (None: when the manifest is of this request), or begin again."""

    resume: bool | None = None
    overwrite: bool = False
    retry_failed: bool = False

    @property
    def again(self) -> bool:
        """Whether clips that are done are made again."""
        return self.overwrite or self.resume is False


@dataclass(frozen=True)
class Batch:
    """A batch whose clips have names: `clips` by line; `before` is what the manifest said of them when it began."""

    folder: Path
    manifest: Manifest
    clips: list[PlannedClip]
    before: dict[str, ManifestEntry]
    notes: tuple[str, ...] = ()
    """Clips that were done and are made again, and why."""

    def in_running_order(self) -> list[PlannedClip]:
        return in_running_order(self.clips)


def open_batch(
    clips: Sequence[PlannedClip],
    folder: Path,
    terms: Terms,
    source: str,
    *,
    dry: bool = False,
    on_wait: Callable[[str], None] = lambda sentence: None,
    facts: Mapping[str, object] | None = None,
) -> Batch:
    """Give every clip its name, and say so in the manifest (with `dry` nothing is written).

    `on_wait` gets a sentence when another process keeps the manifest's lock for long, then and later. `facts`: what the
    manifest says of this run beside its version and source.

    Raises InputErrors where a line's name is taken, InputError where the folder holds another batch, OutputError
    where the manifest cannot be written.
    """
    if terms.resume and terms.overwrite:
        raise InputError("--resume keeps what is done and --overwrite makes it again: give one of them")
    manifest = Manifest(folder, on_wait)
    size = manifest.size()
    batch, events = _opened(clips, folder, terms, source, manifest)  # names are checked before a file is made
    if dry:
        return batch
    with manifest.locked():
        if manifest.size() != size:
            batch, events = _opened(clips, folder, terms, source, manifest)
        if terms.again:
            for clip in batch.clips:
                latents_path(clip.path).unlink(missing_ok=True)
        begun = {"event": "batch", "schema": SCHEMA, "version": __version__, "clips": len(clips), "source": source}
        begun |= facts or {}
        manifest.append_locked(begun, *events)
    manifest.must_exist = True
    return batch


def _opened(
    clips: Sequence[PlannedClip], folder: Path, terms: Terms, source: str, manifest: Manifest
) -> tuple[Batch, list[dict[str, Any]]]:
    """The batch, and the events that make the manifest agree with it."""
    entries = manifest.read()
    mine = [clip.key for clip in clips if clip.key in entries]
    if entries and not mine and not terms.again and not terms.resume:
        raise InputError(
            f"{folder} holds another batch, of {len(entries)} clips, none of which is in this request: choose another "
            "--output, or pass --resume to add these clips to it"
        )
    events: list[dict[str, Any]] = []
    if terms.resume is False and not terms.overwrite:
        events += [happened("forgotten", key) for key in mine]
        for key in mine:
            del entries[key]  # its file, where there is one, keeps the name taken
    clips = [_with_its_seed(clip, entries) for clip in clips]
    named = assign_names(clips, folder, entries, source, overwrite=terms.overwrite)
    notes: list[str] = []
    for clip in named:
        entry = entries.get(clip.key)
        if entry is None:
            entry = ManifestEntry(clip.key, clip.path.name, clip.line, clip.plan.prompt, clip.plan.seed)
            entries[clip.key] = entry
            events.append(planned(entry, owns_name=terms.overwrite))
            continue
        lost = damage(clip.path) if entry.status == DONE and not terms.overwrite else None
        if lost is not None:
            notes.append(f"{clip.path} {lost}: it is made again")
        reset = "lost" if lost is not None else _reset(entry, terms)
        if reset:
            events.append(happened(reset, clip.key, owns_name=terms.overwrite))
            entry.status, entry.error = "planned", None
    before = {clip.key: entries[clip.key] for clip in named}
    return Batch(folder, manifest, named, before, tuple(notes)), events


def _with_its_seed(clip: PlannedClip, entries: Mapping[str, ManifestEntry]) -> PlannedClip:
    """The clip with the seed that an earlier run drew for it."""
    if not clip.plan.seed_was_drawn or clip.key not in entries:
        return clip
    return replace(clip, plan=clip.plan.model_copy(update={"seed": entries[clip.key].seed}))


def _reset(entry: ManifestEntry, terms: Terms) -> str | None:
    """The event that makes a clip due again because it was asked for, if it was."""
    if terms.overwrite or (entry.status == FAILED and terms.retry_failed):
        return "again"
    return None


def has_latents(clip: PlannedClip) -> bool:
    """Whether a clip waits to be decoded only."""
    return latents_path(clip.path).is_file()
