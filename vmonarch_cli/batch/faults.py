"""Everything that is wrong with a prompts file, gathered to be said at once."""

from __future__ import annotations

from collections.abc import Sequence

from vmonarch_cli.batch.lines import Prompts, located
from vmonarch_cli.errors import InputErrors

_MOST_NUMBERS = 10


class Faults:
    """Sentences about the lines of one file, those about its form among them."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._lines: dict[str, list[int]] = {}
        self._of_flags: set[str] = set()

    def add(self, line: int, sentence: str, *, of_flags: bool = False) -> None:
        """Note what is wrong with a line; `of_flags`: the flags alone would be wrong in the same way."""
        numbers = self._lines.setdefault(sentence, [])
        if not numbers or numbers[-1] != line:
            numbers.append(line)
        if of_flags:
            self._of_flags.add(sentence)

    def raise_any(self) -> None:
        """InputErrors with every sentence in the order of the lines, each once; nothing where all is well."""
        found = [(number, located(self._prompts.source, number, sentence)) for number, sentence in self._prompts.faults]
        found += [(numbers[0], self._worded(sentence, numbers)) for sentence, numbers in self._lines.items()]
        if found:
            raise InputErrors([sentence for _, sentence in sorted(found, key=lambda pair: pair[0])])

    def _worded(self, sentence: str, numbers: list[int]) -> str:
        # What is wrong with every line and with the flags alone is the flags' fault.
        if sentence in self._of_flags and len(set(numbers)) == len(self._prompts.lines):
            return sentence
        if len(set(numbers)) == 1:
            return located(self._prompts.source, numbers[0], sentence)
        return f"{self._prompts.source} {named_lines(numbers)}: {sentence}"


def named_lines(numbers: Sequence[int]) -> str:
    """'line 3', 'lines 3, 5': each once, the first ten of them and how many more there are."""
    each = list(dict.fromkeys(numbers))
    if len(each) == 1:
        return f"line {each[0]}"
    more = f" and {len(each) - _MOST_NUMBERS} more" if len(each) > _MOST_NUMBERS else ""
    return f"lines {', '.join(map(str, each[:_MOST_NUMBERS]))}{more}"
