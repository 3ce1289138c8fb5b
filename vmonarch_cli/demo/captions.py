"""Sentences for clips: many wordings of one specification, from the words of `vocabulary` (no torch here).

Everything said is true of the clip; what is left unsaid (size, background, its kind) is free.
"""

from __future__ import annotations

import random

from vmonarch_cli.demo.specs import ClipSpec, ObjectSpec
from vmonarch_cli.models.demo_vocabulary import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    KINDS,
    MAX_TOKENS,
    MOTIONS,
    OPENINGS,
    ORDER,
    PLACES,
    SHAPES,
    SIZES,
    tokens,
)

_CANONICAL_SHARE = 0.5  # how often a name is said by its first word
_PREPOSITIONS = ("on", "on", "on", "over", "against", "in front of", "before")


def caption(spec: ClipSpec, rng: random.Random, *, background: bool | None = None) -> str:
    """One description of a clip, at most `MAX_TOKENS` tokens with the end token.

    Args:
        spec: the clip.
        rng: chooses the wording.
        background: whether to name the background; None leaves it to chance.

    """
    while True:
        text = _sentence(spec, rng, rng.random() < 0.85 if background is None else background)
        if len(tokens(text)) < MAX_TOKENS:
            return text


def plain_caption(spec: ClipSpec) -> str:
    """The plainest full sentence about a clip: canonical words, background named, for scoring."""
    rng = random.Random(spec.seed)
    nouns = [_noun(o, rng, size=o.size is not None, canonical=True) for o in spec.objects]
    parts = [f"{noun} {_plain_motions(o)}" for noun, o in zip(nouns, spec.objects, strict=True)]
    kind = "" if spec.kind == "plain" else f"{spec.kind} "
    return f"{' and '.join(parts)} on a {kind}{spec.background} background"


def _verbs(item: ObjectSpec, form: int, rng: random.Random) -> str:
    """What an object does, in one of the forms of `MOTIONS`; of several motions, in their order."""
    said = rng.choice(MOTIONS[item.motions[0]][form])
    for motion in item.motions[1:]:
        joint = rng.choice(ORDER)
        said += f"{joint} {rng.choice(MOTIONS[motion][form])}"
    return said


def _plain_motions(item: ObjectSpec) -> str:
    if len(item.motions) == 1:
        return MOTIONS[item.motions[0]][1][0]
    # The shortest wording of each, or four motions would not fit into a prompt.
    return " then ".join(min(MOTIONS[motion][1], key=lambda words: len(tokens(words))) for motion in item.motions)


def _sentence(spec: ClipSpec, rng: random.Random, with_background: bool) -> str:
    if rng.random() < 0.08 and len(spec.objects) == 1:
        return _keywords(spec, rng, with_background)
    size = rng.random() < 0.5
    opening = rng.choice(OPENINGS)
    finite = rng.random() < 0.5 and not opening
    place = rng.random() < 0.4
    clauses = []
    for number, item in enumerate(spec.objects):
        noun = _noun(item, rng, size=size, definite=not opening and number == 0)
        if opening == "an animated" and number == 0:
            noun = noun.split(" ", 1)[1]
        if place and item.place is not None:
            noun += " " + rng.choice(PLACES[item.place])
        verb = _verbs(item, 0 if finite else 1, rng)
        if finite and rng.random() < 0.08:
            noun += rng.choice((" that", " which"))
        clauses.append(f"{noun} {verb}")
    order = list(range(len(clauses)))
    rng.shuffle(order)
    if opening == "an animated":
        order.sort()
    joint = rng.choice((" and ", " and ", " while ", ", ")) if len(clauses) > 1 else ""
    subject = joint.join(clauses[i] for i in order)
    head = f"{opening} {subject}".strip()
    if not with_background:
        return _stop(head, rng)
    pattern = rng.random()
    where = _where(spec, rng)
    if pattern < 0.62:
        return _stop(f"{head} {where}", rng)
    if pattern < 0.78:
        return _stop(f"{where}, {head}", rng)
    if pattern < 0.90 and len(spec.objects) == 1 and not finite:
        item = spec.objects[0]
        verb = _verbs(item, 1, rng)
        noun = _noun(item, rng, size=size, definite=not opening)
        if opening == "an animated":
            noun = noun.split(" ", 1)[1]
        return _stop(f"{opening} {noun} {where}{rng.choice((',', ''))} {verb}".strip(), rng)
    if spec.kind == "plain" or rng.random() < 0.5:
        colour = _pick(BACKGROUND_WORDS[spec.background], rng)
        return f"{head}. the {rng.choice(('background', 'backdrop'))} is {colour}."
    return _stop(f"{head}, {_colour_and_kind(spec, rng)} {rng.choice(('background', 'backdrop'))}", rng)


def _keywords(spec: ClipSpec, rng: random.Random, with_background: bool) -> str:
    item = spec.objects[0]
    words = [_noun(item, rng, size=rng.random() < 0.4).split(" ", 1)[1], _verbs(item, 2, rng)]
    if with_background:
        words.append(f"{_colour_and_kind(spec, rng)} background")
    return ", ".join(words)


def _noun(item: ObjectSpec, rng: random.Random, *, size: bool, definite: bool = False, canonical: bool = False) -> str:
    shape = SHAPES[item.shape][0] if canonical else _pick(SHAPES[item.shape], rng)
    colour = COLOUR_WORDS[item.colour][0] if canonical else _pick(COLOUR_WORDS[item.colour], rng)
    words = [colour, shape]
    if size and item.size is not None:
        words.insert(0, SIZES[item.size][0] if canonical else _pick(SIZES[item.size], rng))
    article = "the" if definite and rng.random() < 0.15 and not canonical else _article(words[0])
    return " ".join([article, *words])


def _where(spec: ClipSpec, rng: random.Random) -> str:
    preposition = rng.choice(_PREPOSITIONS)
    thing = rng.choice(("background", "background", "background", "backdrop"))
    tails = KINDS[spec.kind][1]
    if tails and rng.random() < 0.25:
        colour = _pick(BACKGROUND_WORDS[spec.background], rng)
        return f"{preposition} {_article(colour)} {colour} {thing} {rng.choice(tails)}"
    phrase = _colour_and_kind(spec, rng)
    return f"{preposition} {_article(phrase)} {phrase} {thing}"


def _colour_and_kind(spec: ClipSpec, rng: random.Random) -> str:
    colour = _pick(BACKGROUND_WORDS[spec.background], rng)
    share = 0.15 if spec.kind == "plain" else 0.75
    if rng.random() >= share:
        return colour
    kind = _pick(KINDS[spec.kind][0], rng)
    return f"{kind} {colour}" if rng.random() < 0.6 else f"{colour} {kind}"


def _pick(words: tuple[str, ...], rng: random.Random) -> str:
    return words[0] if rng.random() < _CANONICAL_SHARE else rng.choice(words)


def _article(word: str) -> str:
    return "an" if word[0] in "aeio" else "a"


def _stop(text: str, rng: random.Random) -> str:
    return text + "." if rng.random() < 0.3 else text
