"""Figures as words."""

from __future__ import annotations

import pytest

from vmonarch_cli.text import flops, one_line, seconds


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.00085, "850 µs"),
        (0.00099951, "1 ms"),
        (0.0123, "12.3 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1 s"),
        (4.21, "4.21 s"),
        (99.949, "99.9 s"),
        (99.96, "1 min 40 s"),
        (192.0, "3 min 12 s"),
    ],
)
def test_a_duration_never_has_an_exponent(value: float, words: str) -> None:
    assert seconds(value) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (3.56e13, "35.6 TFLOP"),
        (9.9949e14, "999 TFLOP"),
        (9.9996e14, "1.00 PFLOP"),
        (9.9951e17, "1000 PFLOP"),
        (12, "12 FLOP"),
    ],
)
def test_neither_has_a_count_of_operations(count: float, words: str) -> None:
    assert flops(count) == words


def test_one_sentence_for_a_text_that_is_more_than_one_printable_line() -> None:
    """Names of presets, sources of recipes and labels of adapters are held to it."""
    assert one_line("a [b] é") == "a [b] é"
    for text in ("two\nlines", "\x1b[2J", "\u202e"):
        with pytest.raises(ValueError, match=r"^takes one printable line, got '.*'$"):
            one_line(text)
