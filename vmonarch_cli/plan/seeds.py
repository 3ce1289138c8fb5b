"""Seeds that a user gives, and those that are drawn for a user who wants any."""

from __future__ import annotations

import secrets

from vmonarch_cli.errors import InputError
from vmonarch_cli.text import shown

RANDOM = -1
"""What `--seed` takes for a seed that is drawn; "random" says the same."""
MAX_SEED = 2**63 - 1
DRAWN = ", drawn"
"""Ends the origin of a seed that was drawn."""
_DRAWN_BELOW = 2**31


def read_seed(text: str | int) -> int:
    """A seed as `--seed` gives it; InputError for anything but a whole number or "random"."""
    if is_random(text):
        return RANDOM
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--seed takes a whole number, got {shown(text)}") from None


def is_random(value: object) -> bool:
    """Whether a text is the word for a seed that is drawn."""
    return isinstance(value, str) and value.strip().lower() == "random"


def check_seed(value: int | None) -> int | None:
    """The seed, where there is one and it is to be drawn or within range; InputError otherwise."""
    if value is not None and not RANDOM <= value <= MAX_SEED:
        valid = f"a whole number from 0 to {MAX_SEED}, or -1 for a random one"
        raise InputError(f"--seed takes {valid}, got {shown(value)}")
    return value


def check_last_seed(seed: int, clips: int) -> None:
    """InputError where `clips` clips from a seed on, each with the next one, leave the range."""
    if seed + clips - 1 > MAX_SEED:
        raise InputError(
            f"--seed takes a whole number from 0 to {MAX_SEED - clips + 1} for {clips} clips, which have seeds that "
            f"follow it, got {shown(seed)}"
        )


def draw_seed() -> int:
    """A random seed, short enough to be typed: below 2**31."""
    return secrets.randbelow(_DRAWN_BELOW)
