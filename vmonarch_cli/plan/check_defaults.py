"""What is wrong with the user's own defaults, value by value: what `resolve` would refuse, before anybody runs it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from vmonarch_cli.errors import VmonarchError
from vmonarch_cli.plan.defaults import fill, without
from vmonarch_cli.plan.request import GenerateRequest, Level
from vmonarch_cli.plan.resolve import CommandNeeds, refusal, the_one_named


def counting_levels(levels: tuple[Level, ...]) -> dict[str, Level]:
    """Field -> the place whose value counts where no flag is given; also where a recipe is named that there is not."""
    try:
        return fill(GenerateRequest(defaults=levels)).levels
    except VmonarchError:
        recipe = next(level for level in levels if "recipe" in level.values)
        return {"recipe": recipe, **fill(GenerateRequest(defaults=without(levels, {"recipe"}))).levels}


def problems(levels: tuple[Level, ...]) -> dict[str, str]:
    """Field -> a sentence, with the place of its value, for each that counts and is not valid. Empty exactly where a
    plan without flags is not refused for its defaults.

    A value is judged with all that are valid. Those that are judged by the model are not, where that is not valid.
    """
    counting = counting_levels(levels)
    left = set(counting)
    found: dict[str, str] = {}
    nobodys = _sentence(levels, counting, set())
    while (sentence := _sentence(levels, counting, left)) is not None and sentence != nobodys:
        name = _culprit(sentence, levels, counting, left)
        if name is None:
            break
        place = counting[name].source
        found[name] = sentence if place in sentence else f"{place}: {sentence}"
        left.remove(name)
        if name == "model":
            break
    return found


def _sentence(levels: tuple[Level, ...], counting: dict[str, Level], names: Set[str]) -> str | None:
    """What a plan with these of the defaults is refused for; None where it is not."""
    kept = []
    for level in levels:
        values = {name: value for name, value in level.values.items() if name in names and counting[name] is level}
        kept.append(replace(level, values=values))
    return refusal(GenerateRequest(defaults=tuple(kept)), CommandNeeds(needs_prompt=False, needs_source=False))


def _culprit(sentence: str, levels: tuple[Level, ...], counting: dict[str, Level], names: Set[str]) -> str | None:
    """The value that a sentence is about: without it there is none, or another; of several the one that it names."""
    able = [name for name in counting if name in names and _sentence(levels, counting, names - {name}) != sentence]
    return the_one_named(able, sentence)
