"""Small pieces of sentences that several errors share."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence


def near(word: str, known: Iterable[str], cutoff: float = 0.5, names: Mapping[str, str] | None = None) -> str:
    """' (did you mean A or B?)' for the three closest known words, or an empty string.

    names: what to call a known word, where that is not the word itself; each name is given once.
    """
    close = difflib.get_close_matches(word[:100].lower(), list(known), n=6, cutoff=cutoff)
    words = list(dict.fromkeys(names[match] if names else match for match in close))[:3]
    return f" (did you mean {' or '.join(words)}?)" if words else ""


_STEERING = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x2028, 0x2029)))
"""Marks that turn the direction of text, and separators that break its lines."""


def printable(text: str) -> str:
    """The text with everything that could steer a terminal shown as its escape; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(sign if _is_plain(sign) else ascii(sign)[1:-1] for sign in text)


def one_line(value: str) -> str:
    """The text as it came; ValueError for one that could break a line of a table, a page or a record.

    For validators of pydantic, which take the error's words after the name of the field.
    """
    if not value.isprintable():
        raise ValueError(f"takes one printable line, got {shown(printable(value))}")
    return value


def _is_plain(sign: str) -> bool:
    return sign in "\n\t" or (unicodedata.category(sign) not in ("Cc", "Cs") and sign not in _STEERING)


def shown(value: object, limit: int = 60) -> str:
    """A value for a sentence: its repr on one line, cut to `limit` characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return "".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(count: int, noun: str) -> str:
    """'1 step', '4 steps'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def with_article(name: str) -> str:
    """'a WanPipeline', 'an AllegroPipeline', 'an LTXPipeline': the name of a class with its article."""
    spelt = re.match(r"[FHLMNRSX](?=[A-Z])", name)  # read letter by letter
    return f"an {name}" if name[:1] in "AEIOU" or spelt else f"a {name}"


def binary_size(count: float) -> str:
    """Bytes as '512 MiB' or '1.3 GiB'."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def flops(count: float) -> str:
    """Floating-point operations as '35.6 TFLOP' (T 1e12, G 1e9, P 1e15)."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= 0.9995 * size:
            value = f"{count / size:#.3g}".rstrip(".") if count < 999.5 * size else f"{count / size:.0f}"
            return f"{value} {unit}FLOP"
    return f"{count:.0f} FLOP"


def seconds(value: float) -> str:
    """A duration for people: '850 µs', '12.3 ms', '4.21 s', '3 min 12 s'."""
    # The bounds are those of the rounded figure: 999.6 ms have three digits as 1 s, and as 1e+03 ms else.
    if value < 0.9995e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms"
    if value < 99.95:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def clock(value: float) -> str:
    """Seconds as a clock shows them, rounded to whole ones: '0:08', '12:30', '1:02:03'."""
    minutes, rest = divmod(round(max(0.0, value)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def as_fast(ratio: float) -> str:
    """A ratio of times (the other's over ours) in words that read one way: '1.44x as fast', before 'as dense'."""
    return f"{ratio:.2f}x as fast"


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of an error's message; where it has none, `otherwise` or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else otherwise or type(error).__name__


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and so on to the first."""
    step: BaseException | None = error
    while step is not None:
        yield step
        step = step.__cause__ or step.__context__


def innermost_line(error: BaseException) -> str:
    """The first line of the first cause that was named: libraries wrap it in sentences that say less."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
