"""Every word the demo model knows, and what each means (no torch here: the CLI imports this to check prompts).

Colours are sRGB triples in [0, 1]. A word means exactly one thing; synonyms are listed beside the canonical name,
which is the first entry. Captions (`captions.py`) are built from these tables only, so `vocabulary()` is complete by
construction.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

RGB = tuple[float, float, float]

SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "ball", "dot"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop", "donut"),
    "cross": ("cross", "plus"),
}

COLOURS: dict[str, RGB] = {
    "red": (0.88, 0.13, 0.16),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (1.00, 0.86, 0.10),
    "green": (0.12, 0.64, 0.24),
    "cyan": (0.08, 0.78, 0.84),
    "blue": (0.13, 0.30, 0.92),
    "purple": (0.52, 0.16, 0.74),
    "pink": (1.00, 0.42, 0.70),
}

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
}

BACKGROUNDS: dict[str, RGB] = {
    "white": (0.93, 0.93, 0.92),
    "black": (0.07, 0.07, 0.09),
    "gray": (0.50, 0.52, 0.55),
    "cream": (0.95, 0.88, 0.72),
    "navy": (0.08, 0.12, 0.32),
    "light blue": (0.55, 0.75, 0.94),
    "light green": (0.66, 0.86, 0.66),
    "lavender": (0.74, 0.66, 0.91),
    "maroon": (0.40, 0.07, 0.13),
    "light pink": (0.97, 0.76, 0.80),
}

BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "white": ("white",),
    "black": ("black",),
    "gray": ("gray", "grey"),
    "cream": ("cream", "beige"),
    "navy": ("navy", "dark blue", "navy blue"),
    "light blue": ("light blue", "blue", "sky blue", "pale blue"),
    "light green": ("light green", "green", "mint", "pale green"),
    "lavender": ("lavender", "light purple", "purple", "pale purple"),
    "maroon": ("maroon", "dark red", "red"),
    "light pink": ("light pink", "pink", "pale pink"),
}

# Adjective and "with ..." forms of each background kind; plain is usually left unsaid.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": (("plain", "solid"), ()),
    "gradient": (("gradient", "shaded"), ("with a gradient", "with soft shading")),
    "striped": (("striped",), ("with stripes", "with soft stripes")),
    "checkered": (("checkered", "checkerboard"), ("with a checkered pattern", "with checks")),
}

SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium sized"),
    "large": ("large", "big", "huge"),
}

# Per motion: (finite forms, "-ing" forms, keyword forms).
MOTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "left to right": (
        (
            "moves from left to right",
            "moves left to right",
            "moves right",
            "moves to the right",
            "slides to the right",
            "travels from left to right",
            "drifts rightward",
            "glides from left to right",
            "goes right",
        ),
        (
            "moving from left to right",
            "moving left to right",
            "moving right",
            "moving to the right",
            "sliding to the right",
            "travelling from left to right",
            "drifting rightward",
            "gliding to the right",
            "going right",
        ),
        ("left to right", "rightward"),
    ),
    "right to left": (
        (
            "moves from right to left",
            "moves right to left",
            "moves left",
            "moves to the left",
            "slides to the left",
            "travels from right to left",
            "drifts leftward",
            "glides from right to left",
            "goes left",
        ),
        (
            "moving from right to left",
            "moving right to left",
            "moving left",
            "moving to the left",
            "sliding to the left",
            "travelling from right to left",
            "drifting leftward",
            "gliding to the left",
            "going left",
        ),
        ("right to left", "leftward"),
    ),
    "rising": (
        ("rises", "moves up", "moves upward", "climbs", "floats up", "goes up", "moves from bottom to top"),
        ("rising", "moving up", "moving upward", "climbing", "floating up", "going up", "moving from bottom to top"),
        ("rising", "upward"),
    ),
    "falling": (
        ("falls", "moves down", "moves downward", "drops", "sinks", "goes down", "moves from top to bottom"),
        ("falling", "moving down", "moving downward", "dropping", "sinking", "going down", "moving from top to bottom"),
        ("falling", "downward"),
    ),
    "bouncing": (
        ("bounces", "bounces up and down", "hops", "jumps up and down"),
        ("bouncing", "bouncing up and down", "hopping", "jumping up and down"),
        ("bouncing",),
    ),
    "circling": (
        ("circles", "moves in a circle", "circles around", "moves around in a circle", "orbits"),
        ("circling", "moving in a circle", "circling around", "moving around in a circle", "orbiting"),
        ("circling",),
    ),
    "spinning": (
        ("spins", "rotates", "turns", "spins in place", "rotates in place", "spins around"),
        ("spinning", "rotating", "turning", "spinning in place", "rotating in place", "spinning around"),
        ("spinning", "rotating"),
    ),
    "growing": (
        ("grows", "grows larger", "gets bigger", "expands", "gets larger"),
        ("growing", "growing larger", "getting bigger", "expanding", "getting larger"),
        ("growing",),
    ),
    "shrinking": (
        ("shrinks", "gets smaller", "becomes smaller", "contracts"),
        ("shrinking", "getting smaller", "becoming smaller", "contracting"),
        ("shrinking",),
    ),
    "zigzagging": (
        ("zigzags", "moves in a zigzag", "zigzags across", "weaves up and down across"),
        ("zigzagging", "moving in a zigzag", "zigzagging across", "weaving up and down across"),
        ("zigzagging", "zigzag"),
    ),
    "standing still": (
        ("stands still", "stays still", "does not move", "stays in place", "rests", "is still"),
        ("standing still", "staying still", "not moving", "staying in place", "resting"),
        ("still", "static", "standing still"),
    ),
}

PLACES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "above"),
    "bottom": ("at the bottom", "below"),
}

OPENINGS: tuple[str, ...] = (
    "",
    "",
    "",
    "",
    "",
    "a video of",
    "a clip of",
    "an animation of",
    "a short video of",
    "an animated",
    "video of",
    "there is",
)

# Function words and punctuation of the sentence patterns in captions.py.
GLUE: tuple[str, ...] = (
    "a", "an", "the", "and", "while", "with", "on", "over", "against", "before", "in front of", "is", "that", "which",
    "background", "backdrop", ",", ".",
)  # fmt: skip

ORDER: tuple[str, ...] = (" then", " and then", ", then", ", then", ", and then")
"""What joins one motion of an object to its next."""

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
MAX_TOKENS = 32
"""Longest prompt in tokens, the end token included; also the `max_sequence_length` to give the pipeline."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


def tokens(prompt: str) -> list[str]:
    """Lowercased words and single punctuation marks of a prompt, in order."""
    return _TOKEN.findall(prompt.lower())


@cache
def vocabulary() -> tuple[str, ...]:
    """All tokens that training uses, in a fixed order: the three special ones, then words sorted, then later words.

    Words that came later stand at the end, so that a trained token keeps its number.
    """
    phrases: list[str] = [*GLUE, *OPENINGS]
    for names in (SHAPES, COLOUR_WORDS, BACKGROUND_WORDS, SIZES, PLACES):
        for words in names.values():
            phrases.extend(words)
    for adjectives, tails in KINDS.values():
        phrases.extend((*adjectives, *tails))
    for finite, gerunds, keywords in MOTIONS.values():
        phrases.extend((*finite, *gerunds, *keywords))
    known = {token for phrase in phrases for token in tokens(phrase)}
    later = {token for phrase in ORDER for token in tokens(phrase)} - known
    return (PAD, EOS, UNKNOWN, *sorted(known), *sorted(later))


@cache
def _shipped_words() -> frozenset[str]:
    """Words that the tokenizer of the weights in this package knows; the trainings' own if it is not there."""
    path = Path(__file__).parent.parent / "demo" / "weights" / "tokenizer" / "tokenizer.json"
    try:
        return frozenset(json.loads(path.read_text())["model"]["vocab"])
    except OSError:
        return frozenset(vocabulary())


def unknown_words(prompt: str) -> list[str]:
    """Words of `prompt` that the demo model has never seen, in order of appearance, each once.

    Punctuation is ignored: the model has seen only some marks, and none changes what is drawn.
    """
    known = _shipped_words()
    unknown: list[str] = []
    for token in tokens(prompt):
        if token not in known and token not in unknown and re.match(r"\w", token):
            unknown.append(token)
    return unknown
