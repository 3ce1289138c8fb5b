"""Figures of a record in words that pages and tables share. No torch."""

from __future__ import annotations

from vmonarch_cli.clip.record_model import Record
from vmonarch_cli.timing import LOST_SUBJECT


def error_words(record: Record | None) -> str | None:
    """'0.027, up to 0.566 in step 1': median and largest error of the attention against dense; None if not measured."""
    whole = None if record is None else record.timing.whole
    worst = None if whole is None else whole.worst_step
    if whole is None or worst is None or worst.error is None or whole.error is None:
        return None
    return f"{whole.error:.3f}, up to {worst.error:.3f} in step {worst.index + 1}"


def lost_subject(record: Record | None) -> str | None:
    """The advice of a run whose first step was far off; None for any other."""
    whole = None if record is None else record.timing.whole
    return LOST_SUBJECT if whole is not None and whole.first_step_stands_out else None
