"""The prompts that a model is tuned with, and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.demo_vocabulary import GLUE, tokens, vocabulary
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.warnings import of_demo
from vmonarch_cli.text import counted, shown

if TYPE_CHECKING:
    from vmonarch_cli.tune.clips import CaptionedClip

DEFAULT_PROMPTS = 64
"""Trajectories of the demo model, where no file of prompts says how many."""
DEFAULT_EVAL = 8
"""Held-out prompts."""


def split_prompts(clip: Plan, given: Sequence[str] | None, held_out: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prompts of the trajectories, held-out prompts), which have none in common."""
    if given is None:
        if clip.model.alias != DEMO_ALIAS:
            raise InputError(
                f"no prompts to tune {clip.model.alias} with: --prompts-file takes a file with one prompt per line"
            )
        return _demo_prompts(held_out, clip.num_frames)
    return held_apart(clip, given, held_out, "train")


def held_apart(clip: Plan, given: Sequence[str], held_out: int, use: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prompts to use, the last ones of them), all different; InputError where none is left to "train" with."""
    texts = checked_prompts(clip, given)
    if len(texts) <= held_out:
        raise InputError(
            f"--eval-prompts {held_out} leaves no prompt to {use} with: there {'is' if len(texts) == 1 else 'are'} "
            f"{counted(len(texts), 'different prompt')}, and at least {held_out + 1} are needed"
        )
    cut = len(texts) - held_out
    return tuple(texts[:cut]), tuple(texts[cut:])


def checked_prompts(clip: Plan, given: Sequence[str]) -> list[str]:
    """Different prompts of a file; InputError when there is none, or one of which the demo model knows no word."""
    texts = list(dict.fromkeys(checks.prompt(text) for text in given))
    if not texts:
        raise InputError("no prompts: --prompts-file takes a file with one prompt per line")
    _check_words(clip, texts)
    return texts


def split_clips(
    clip: Plan, found: Sequence[CaptionedClip], given: Sequence[str] | None, held_out: int | None
) -> tuple[tuple[CaptionedClip, ...], tuple[str, ...]]:
    """(clips to train with, held-out prompts).

    given: prompts of a file, which are then those that are held out; otherwise the captions of the last clips are, and
    no training uses these. held_out: how many, by default DEFAULT_EVAL, or a quarter of the clips where that is less.
    """
    clips = tuple(found)
    if given is not None:
        texts = list(dict.fromkeys(checks.prompt(text) for text in given))
        held = tuple(texts[: DEFAULT_EVAL if held_out is None else held_out])
    else:
        count = min(DEFAULT_EVAL, len(clips) // 4) if held_out is None else held_out
        if len(clips) <= count:
            raise InputError(
                f"--eval-prompts {count} leaves no clip to train with: there are {len(clips)}, and those that are held "
                "out are not trained with"
            )
        cut = len(clips) - count
        clips, held = clips[:cut], tuple(one.caption for one in clips[cut:])
    _check_words(clip, [*(one.caption for one in clips), *held])
    return clips, held


def _check_words(clip: Plan, texts: Sequence[str]) -> None:
    """Of the demo model: InputError for a prompt that names nothing it can draw."""
    if clip.model.alias != DEMO_ALIAS:
        return
    known = set(vocabulary())
    for text in texts:
        if not known.intersection(_words(text)):
            raise InputError(
                f"the demo model knows no word of the prompt {shown(text)}: it draws moving shapes, as in "
                f'"{checks.EXAMPLE_PROMPT}"'
            )


def unknown_words(clip: Plan, prompts: Sequence[str]) -> list[str]:
    """Of the demo model: words that it was not trained on."""
    return of_demo(clip.model, " ".join(prompts), (clip.height, clip.width, clip.num_frames))


def _words(text: str) -> set[str]:
    """Words of a prompt that name something."""
    return set(tokens(text)) - set(GLUE)


def _demo_prompts(held_out: int, frames: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions of clips of so many frames that the demo model was trained on, and those of its held-out clips."""
    import random

    from vmonarch_cli.demo.captions import caption, plain_caption
    from vmonarch_cli.demo.score import held_out_specs
    from vmonarch_cli.demo.specs import sample_spec

    training = [caption(sample_spec("train", 7, i, frames), random.Random(i)) for i in range(DEFAULT_PROMPTS)]
    return tuple(training), tuple(plain_caption(spec) for spec in held_out_specs(held_out, frames))
