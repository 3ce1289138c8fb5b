"""From the flags of `generate --prompts-file` to a batch that is about to run; nothing is printed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmonarch_cli.batch.clips import PlannedClip, batch_folder, plan_clips
from vmonarch_cli.batch.faults import named_lines
from vmonarch_cli.batch.folder import Batch, Terms, open_batch
from vmonarch_cli.batch.prompts import read_prompts
from vmonarch_cli.batch.worker import on_own_device
from vmonarch_cli.errors import InputError
from vmonarch_cli.machine.torchrun import Rank
from vmonarch_cli.plan.request import GenerateRequest


@dataclass(frozen=True)
class BatchFlags:
    """The flags that only a batch has, as they came."""

    source: str
    """Path of the prompts file, or "-"."""
    format: str | None = None
    resume: bool | None = None
    retry_failed: bool = False
    max_failures: int | None = None
    retry_dense: bool = True
    overlap: bool | None = None
    """None: where it suits; see `pipeline/overlap.py`."""
    overwrite: bool = False

    @property
    def terms(self) -> Terms:
        """How to treat what the folder holds."""
        return Terms(self.resume, self.overwrite, self.retry_failed)


@dataclass(frozen=True)
class BatchPlan:
    """Every clip of a prompts file, checked; nothing is named or written yet."""

    clips: list[PlannedClip]
    folder: Path
    terms: Terms
    source: str
    notes: tuple[str, ...]
    """What the flags changed, and what the model says of itself; each once."""

    @property
    def warnings(self) -> list[str]:
        """What will work less well than the user may expect: each sentence once, with the lines that it is about."""
        lines: dict[str, list[int]] = {}
        for clip in self.clips:
            for sentence in clip.plan.warnings:
                lines.setdefault(sentence, []).append(clip.line)
        return [f"{named_lines(numbers)}: {sentence}" for sentence, numbers in lines.items()]

    def open(
        self,
        *,
        dry: bool = False,
        on_wait: Callable[[str], None] = lambda sentence: None,
        facts: Mapping[str, object] | None = None,
    ) -> Batch:
        """The batch in its folder (see `open_batch`); with `dry` nothing is written."""
        return open_batch(self.clips, self.folder, self.terms, self.source, dry=dry, on_wait=on_wait, facts=facts)


def plan_batch(request: GenerateRequest, flags: BatchFlags, rank: Rank) -> BatchPlan:
    """Read and check a prompts file; InputErrors with a sentence for each thing that is wrong."""
    if flags.max_failures is not None and flags.max_failures < 1:
        raise InputError(f"--max-failures takes a whole number from 1 up, got {flags.max_failures}")
    if rank.world > 1 and flags.terms.again:
        raise InputError("--overwrite and --no-resume begin a batch again, which one process must do, not torchrun")
    request = on_own_device(request, rank)
    clips, notes = plan_clips(request, read_prompts(flags.source, flags.format))
    notes = list(dict.fromkeys([*clips[0].plan.notes, *notes]))
    return BatchPlan(clips, batch_folder(request), flags.terms, flags.source, tuple(notes))
