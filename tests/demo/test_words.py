"""Vocabulary, specifications and captions: plain data, no torch."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count, islice

import pytest

from vmonarch_cli.demo.captions import caption, plain_caption
from vmonarch_cli.demo.specs import REACH, ClipSpec, Split, is_held_out, motions_of, sample_spec
from vmonarch_cli.models.demo_vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MAX_TOKENS,
    MOTIONS,
    SHAPES,
    tokens,
    unknown_words,
    vocabulary,
)


def all_specs(split: Split, seed: int, frames: int = 49) -> Iterator[ClipSpec]:
    """Endless clips of a split."""
    return (sample_spec(split, seed, index, frames) for index in count())


def test_prompts_are_checked_without_torch() -> None:
    code = (
        "import sys; from vmonarch_cli.demo import captions; "
        "from vmonarch_cli.models import demo_vocabulary; demo_vocabulary.unknown_words('a');"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_words_are_named_once_in_order() -> None:
    assert unknown_words("A purple DINOSAUR, riding a dinosaur to the left!") == ["dinosaur", "riding"]
    assert unknown_words("a red circle moves from left to right on a white background") == []
    assert unknown_words("") == []


def test_captions_use_known_words_only_and_every_word_is_used() -> None:
    rng = random.Random(0)
    seen: set[str] = set()
    for spec in (*islice(all_specs("train", 0), 15_000), *islice(all_specs("train", 0, 193), 500)):
        words = tokens(caption(spec, rng))
        assert len(words) < MAX_TOKENS
        seen.update(words)
    assert seen == set(vocabulary()[3:])


def test_captions_vary_and_are_reproducible() -> None:
    spec = sample_spec("train", 0, 1)
    assert len({caption(spec, random.Random(i)) for i in range(50)}) > 30
    assert caption(spec, random.Random(3)) == caption(spec, random.Random(3))


def test_later_words_stand_behind_those_that_were_trained_before() -> None:
    assert vocabulary()[178:] == ("zigzags", "then")


def test_captions_tell_motions_in_their_order() -> None:
    for spec in islice(all_specs("heldout", 0, 193), 100):
        text = plain_caption(spec)
        assert len(tokens(text)) < MAX_TOKENS
        assert set(tokens(text)) <= set(vocabulary())
        if len(spec.objects) == 1:
            parts = text.split(" on a ")[0].split(" then ")
            assert len(parts) == len(spec.objects[0].motions)
            for part, motion in zip(parts, spec.objects[0].motions, strict=True):
                assert any(part.endswith(words) for words in MOTIONS[motion][1]), text


def test_longer_clips_show_more_motions() -> None:
    def counts(frames: int) -> set[int]:
        specs = islice(all_specs("train", 4, frames), 300)
        return {len(item.motions) for spec in specs for item in spec.objects}

    assert counts(17) == counts(49) == counts(81) == {1}
    assert counts(97) == {1, 2}
    assert counts(145) == counts(193) == {1, 2, 3}


def test_motions_that_repeat_keep_their_speed_in_longer_clips() -> None:
    def turns(frames: int) -> list[float]:
        specs = islice(all_specs("train", 4, frames), 600)
        tracks = [item.tracks[0] for spec in specs for item in spec.objects if item.motions == ("spinning",)]
        return [abs(track.turns) for track in tracks]

    for frames, beats in ((17, 1), (49, 1), (193, 4)):
        assert 0.9 * beats <= min(turns(frames)) <= max(turns(frames)) <= 1.5 * beats


def test_plain_captions_name_everything() -> None:
    for spec in islice(all_specs("heldout", 0), 50):
        text = plain_caption(spec)
        assert unknown_words(text) == []
        assert len(tokens(text)) < MAX_TOKENS
        assert text.endswith(f"{spec.background} background")
        for item in spec.objects:
            assert f"{item.colour} {item.shape}" in text


def test_specs_depend_on_split_seed_and_index_alone() -> None:
    assert sample_spec("train", 5, 17) == sample_spec("train", 5, 17)
    assert sample_spec("train", 5, 17) != sample_spec("train", 5, 18)
    assert sample_spec("train", 5, 17) != sample_spec("train", 6, 17)


def test_training_never_shows_a_held_out_triple() -> None:
    for spec in islice(all_specs("train", 1), 2_000):
        assert not any(is_held_out(*triple) for item in spec.objects for triple in item.triples)
    for spec in islice(all_specs("heldout", 1), 200):
        assert any(is_held_out(*triple) for item in spec.objects for triple in item.triples)


def test_held_out_triples_are_few_and_cover_every_name() -> None:
    triples = [(s, c, m) for s in SHAPES for c in COLOURS for m in motions_of(s)]
    held_out = [t for t in triples if is_held_out(*t)]
    assert 0.05 < len(held_out) / len(triples) < 0.15
    for position, names in enumerate((SHAPES, COLOURS, MOTIONS)):
        assert {t[position] for t in held_out} == set(names)


def test_sampling_covers_the_data() -> None:
    specs = list(islice(all_specs("train", 2), 3_000))
    assert {s.background for s in specs} == set(BACKGROUNDS)
    assert {motion for s in specs for item in s.objects for motion in item.motions} == set(MOTIONS)
    assert {item.colour for s in specs for item in s.objects} == set(COLOURS)
    pairs = [s for s in specs if len(s.objects) == 2]
    assert 0.25 < len(pairs) / len(specs) < 0.35
    assert all(a.colour != b.colour for a, b in (s.objects for s in pairs))


def test_training_sees_more_of_what_is_hard_and_scoring_does_not() -> None:
    def share(split: Split, hard: Callable[[ClipSpec], bool], frames: int = 49) -> float:
        return sum(map(hard, islice(all_specs(split, 2, frames), 2_000))) / 2_000

    def pair(spec: ClipSpec) -> bool:
        return len(spec.objects) == 2

    def several(spec: ClipSpec) -> bool:
        return spec.motions > 1

    def spins(spec: ClipSpec) -> bool:
        return any("spinning" in item.motions for item in spec.objects)

    assert share("heldout", pair) == pytest.approx(0.15, abs=0.03)
    assert share("train", pair) > 1.5 * share("heldout", pair)
    assert share("train", spins) > 1.2 * share("heldout", spins)
    assert share("train", pair, 193) == pytest.approx(0.4, abs=0.03)
    assert share("heldout", pair, 193) == pytest.approx(0.15, abs=0.03)
    assert share("train", several, 193) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_straight_tracks_stay_in_the_frame(split: str) -> None:
    for spec in islice(all_specs(split, 3), 500):  # type: ignore[arg-type]
        for item in spec.objects:
            (t,) = item.tracks
            for x, y, r in ((t.x0, t.y0, t.r0), (t.x1, t.y1, t.r1)):
                assert abs(x) + t.orbit + REACH * r < 1.06
                assert abs(y) + t.orbit + abs(t.zigzag) + REACH * r < 1.06
