"""What a batch shows: what it would do, a line per clip, failures, and where things stand; nothing prints here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from vmonarch_cli.batch.clips import PlannedClip
from vmonarch_cli.batch.events import OverlapDone
from vmonarch_cli.batch.folder import Batch, has_latents
from vmonarch_cli.batch.manifest import DONE, FAILED, PLANNED, ManifestEntry
from vmonarch_cli.cli.tables import table
from vmonarch_cli.pipeline.overlap import Overlap
from vmonarch_cli.text import seconds
from vmonarch_cli.timing import ClipResult


@dataclass(frozen=True)
class Overlapped:
    """Whether clips were decoded beside the next one's denoising, and for how long."""

    decided: Overlap
    ended: OverlapDone | None = None

    @property
    def hidden(self) -> str:
        """'the batch took 41.2 s; 8.3 s of decoding and writing went on beside denoising, which slows both down'; empty
        where nothing did.
        """
        if self.ended is None or not self.ended.hidden_s:
            return ""
        took, hidden = seconds(self.ended.seconds), seconds(self.ended.hidden_s)
        return (
            f"the batch took {took}; {hidden} of decoding and writing went on beside denoising, which slows both down"
        )

    def to_json(self) -> dict[str, Any]:
        """The decision, and seconds of the whole run and of what was hidden, where there was overlap."""
        return {**asdict(self.decided), **({} if self.ended is None else asdict(self.ended))}


def overlap_line(overlap: Overlap) -> str:
    """'overlap: a clip is decoded while the next is denoised (about 9 GiB of 139 GiB free)', or why not."""
    if overlap.on:
        return f"overlap: a clip is decoded and written while the next one is denoised ({overlap.reason})"
    return f"overlap: none ({overlap.reason})"


def batch_table(batch: Batch) -> Table:
    """A row per clip: where it comes from, what it is, and what is to be done about it."""
    made = table("line", "file", "seed", "clip", "steps", "preset", "to do")
    known = batch.manifest.read()
    for clip in batch.clips:
        plan = clip.plan
        drawn_later = plan.seed_was_drawn and clip.key not in known
        made.add_row(
            str(clip.line),
            Text(clip.path.name, overflow="fold"),
            "random" if drawn_later else str(plan.seed),
            f"{plan.width}x{plan.height}x{plan.num_frames}",
            str(plan.steps),
            plan.preset.name,
            to_do(clip, batch.before[clip.key]),
        )
    made.columns[1].ratio = 1
    for column in made.columns[2:]:
        column.no_wrap = True
    return made


def to_do(clip: PlannedClip, entry: ManifestEntry) -> str:
    """'make' or 'decode', or that it is 'done' or 'failed' and nothing will be done (without --retry-failed)."""
    if entry.status in (DONE, FAILED):
        return entry.status
    return "decode" if has_latents(clip) else "make"


def clip_line(result: ClipResult, count: int) -> str:
    """'clip 3 of 12: name.mp4, 41.2 s, attention 2.10x against dense'."""
    speedup = result.timing.attention_speedup
    gain = f", attention {speedup:.2f}x against dense" if speedup is not None else ""
    if gain and result.record.get("overlap", {}).get("steps_beside_decoding"):
        gain += " beside decoding"
    retries = result.record.get("retries") or ()
    tried = "".join(f", retried with {retry['with']}" for retry in retries)
    return f"clip {result.index + 1} of {count}: {result.path.name}, {seconds(result.timing.total_s)}{gain}{tried}"


def failure_table(batch: Batch, entries: Mapping[str, ManifestEntry]) -> Table:
    """A row per clip that failed: line, file and sentence."""
    made = table("line", "file", "why it failed")
    for clip in batch.clips:
        entry = entries.get(clip.key)
        if entry is not None and entry.status == FAILED:
            made.add_row(str(clip.line), Text(entry.name, overflow="fold"), Text(entry.error or "", overflow="fold"))
    return made


def failures(batch: Batch, entries: Mapping[str, ManifestEntry]) -> list[str]:
    """The same as one sentence each."""
    rows = [(clip.line, entries[clip.key]) for clip in batch.clips if clip.key in entries]
    return [f"line {line}: {entry.name}: {entry.error}" for line, entry in rows if entry.status == FAILED]


def standing(batch: Batch, entries: Mapping[str, ManifestEntry]) -> str:
    """'6 clips: 4 done (2 of them before), 1 failed, 1 not made (its latents are saved)'."""
    status = [(clip, entries[clip.key].status) for clip in batch.clips if clip.key in entries]
    done = [clip for clip, what in status if what == DONE]
    before = sum(batch.before[clip.key].status == DONE for clip in done)
    words = [f"{len(done)} done" + (f" ({before} of them before)" if before else "")]
    failed = sum(what == FAILED for _, what in status)
    if failed:
        words.append(f"{failed} failed")
    left = [clip for clip, what in status if what not in (DONE, FAILED)]
    if left:
        saved = sum(has_latents(clip) for clip in left)
        words.append(f"{len(left)} not made" + (f" ({saved} denoised, to be decoded)" if saved else ""))
    count = len(batch.clips)
    return f"{count} clip{'s' if count > 1 else ''}: {', '.join(words)}"


def batch_json(batch: Batch, entries: Mapping[str, ManifestEntry]) -> dict[str, Any]:
    """Every clip and what became of it."""
    return {
        "folder": str(batch.folder),
        "manifest": str(batch.manifest.path),
        "clips": [_clip_json(clip, entries.get(clip.key)) for clip in batch.clips],
    }


def _clip_json(clip: PlannedClip, entry: ManifestEntry | None) -> dict[str, Any]:
    return {
        "line": clip.line,
        "key": clip.key,
        "path": str(clip.path),
        "prompt": clip.plan.prompt,
        "seed": clip.plan.seed,
        "settings": clip.plan.settings(),
        "status": PLANNED if entry is None else entry.status,
        "error": None if entry is None else entry.error,
        "retries": [] if entry is None else entry.retries,
    }
