"""Texts that are longer than a model reads: what its tokenizers leave out, which the libraries do without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_TOKENIZERS = ("tokenizer", "tokenizer_2")
_OF_TRUNCATION = ("truncation", "padding", "max_length", "return_tensors", "return_length", "return_overflowing_tokens")
_SHOWN_WORDS = 30


@dataclass(frozen=True)
class LeftOut:
    """The end of a text that a text encoder does not get."""

    which: str
    """"prompt" or "negative prompt"."""
    words: str

    def sentence(self, *, short: bool = False) -> str:
        """What happened, with the words, or (``short``) the first of them."""
        words = self.words.split()
        text = " ".join(words[:_SHOWN_WORDS]) + " …" if short and len(words) > _SHOWN_WORDS else self.words
        return f"the {self.which} is longer than the model reads, and its last {len(words)} words are left out: {text}"


@contextmanager
def watched(
    pipeline: Any, prompt: str, negative_prompt: str, on_found: Callable[[LeftOut], None] = lambda part: None
) -> Iterator[list[LeftOut]]:
    """A list that fills with what the pipeline's tokenizers leave out of the two texts inside the block.

    ``on_found`` gets each part at once.
    """
    found: list[LeftOut] = []

    def report(words: str) -> None:
        of_prompt, of_negative = _part_of(prompt, words), _part_of(negative_prompt, words)
        if len(of_negative) > len(of_prompt):
            left_out = LeftOut("negative prompt", of_negative)
        else:
            left_out = LeftOut("prompt", of_prompt or words)
        if left_out not in found:
            found.append(left_out)
            on_found(left_out)

    before = {name: getattr(pipeline, name, None) for name in _TOKENIZERS}
    known = {name: tokenizer for name, tokenizer in before.items() if tokenizer is not None}
    for name, tokenizer in known.items():
        object.__setattr__(
            pipeline, name, _Watched(tokenizer, report)
        )  # the pipeline's own would note it in its config
    try:
        yield found
    finally:
        for name, tokenizer in known.items():
            object.__setattr__(pipeline, name, tokenizer)


class _Watched:
    """A tokenizer that compares every truncated text with the whole one."""

    def __init__(self, tokenizer: Any, report: Callable[[str], None]) -> None:
        self.__dict__.update(_tokenizer=tokenizer, _report=report, _whole=[], _last=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tokenizer, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._tokenizer, args, kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._tokenizer.apply_chat_template, args, kwargs)

    def _run(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = method(*args, **kwargs)
        text = args[0] if args else kwargs.get("text")
        if not kwargs.get("truncation"):
            # Kandinsky's pipeline asks for the whole first and cuts the text itself; others look at it afterwards.
            self.__dict__["_whole"] = [] if text == self._last else _rows(result)
            return result
        others = {name: value for name, value in kwargs.items() if name not in _OF_TRUNCATION}
        whole = _rows(method(*args, **others, truncation=False, padding=False))
        before = self._whole if len(self._whole) == len(whole) else whole
        for kept, ids, earlier in zip(_rows(result), whole, before, strict=True):
            longest = max(ids, earlier, key=len)
            if len(longest) > kwargs["max_length"]:
                differ = (i for i, (a, b) in enumerate(zip(longest, kept, strict=False)) if a != b)
                cut = next(differ, len(kept))
                self._report(self._tokenizer.decode(longest[cut:], skip_special_tokens=True).strip())
        self.__dict__.update(_whole=[], _last=text)
        return result


def _rows(result: Any) -> list[list[int]]:
    """Token ids of every text, without padding where the tokenizer marks it."""
    rows = _nested(result["input_ids"])
    mask = result.get("attention_mask")
    if mask is None:
        return rows
    return [[i for i, real in zip(*pair, strict=True) if real] for pair in zip(rows, _nested(mask), strict=True)]


def _nested(values: Any) -> list[list[int]]:
    """A tensor (texts, tokens), a list of lists, or the list of a single text as a list of lists."""
    found: list[Any] = values if isinstance(values, list) else values.tolist()
    return found if found and isinstance(found[0], list) else [found]


def _part_of(text: str, words: str) -> str:
    """As many of the words, from the first on, as are in the text; the rest is the end of a chat template."""
    found, plain = words.split(), " ".join(text.split()).lower()
    while found and " ".join(found).lower() not in plain:
        found.pop()
    return " ".join(found)
