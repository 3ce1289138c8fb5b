"""A text that is longer than a model reads: the words that it does not get are named, and stand in the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import NEGATIVE, TINY

from vmonarch_cli.clip.events import ClipWarning, Event
from vmonarch_cli.clip.make import ClipMaker
from vmonarch_cli.families.registry import facts_of
from vmonarch_cli.pipeline.call import encode
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.pipeline.text_limits import watched
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

LONG = "blue square " + "a red circle moving left " * 220 + "right the right"

pytestmark = pytest.mark.usefixtures("one_thread")


# Those whose pipeline's own call encodes the prompt; MiniMax-H3's tokenizer cuts off none.
_IN_THE_CALL = ("hunyuan-video-i2v", "minimax-h3", "minimax-h3-image")


@pytest.mark.parametrize("name", [name for name in TINY if name not in _IN_THE_CALL])
def test_every_family_names_the_words_that_it_leaves_out(name: str) -> None:
    pipeline = TINY[name].build()
    for prompt, negative, which in ((LONG, NEGATIVE, {"prompt"}), ("a red circle", NEGATIVE, set())):
        with watched(pipeline, prompt, negative) as found:
            encode(pipeline, prompt, negative, 4.0, 16)
        assert {part.which for part in found} == which
        for part in found:
            assert part.words.endswith("right the right")
            assert "blue" not in part.words
            assert part.words in LONG


def test_a_negative_prompt_is_told_apart() -> None:
    pipeline = TINY["wan"].build()
    with watched(pipeline, "a red circle", LONG) as found:
        encode(pipeline, "a red circle", LONG, 4.0, 16)
    (part,) = found
    assert part.which == "negative prompt"
    assert part.sentence().startswith("the negative prompt is longer than the model reads, and its last ")


@pytest.mark.parametrize("name", ["wan", "hunyuan-video-i2v"])
def test_a_clip_warns_and_its_latents_remember(name: str, tmp_path: Path) -> None:
    tiny, folder = TINY[name], tmp_path / name
    tiny.build().save_pretrained(folder, safe_serialization=True)
    flags: dict[str, Any] = {"height": tiny.height, "width": tiny.width, "num_frames": tiny.num_frames}
    if "image" in tiny.options:
        tiny.options["image"].save(tmp_path / "first.png")
        flags["image"] = str(tmp_path / "first.png")
    plan = resolve(GenerateRequest(model=str(folder), prompt=LONG, steps=1, device="cpu", preset="paper", **flags))
    events: list[Event] = []
    maker = ClipMaker(plan, check_machine(plan), on_event=events.append)
    with torch.no_grad():
        denoised = maker.denoise(plan, 0)
    assert facts_of(maker._pipeline).text_with_image == (name == "hunyuan-video-i2v")
    assert any("right the right" in sentence for sentence in denoised.warnings)
    shown = [event.sentence for event in events if isinstance(event, ClipWarning)]
    assert len(shown) == len(denoised.warnings)
    assert all(len(sentence) < 400 for sentence in shown)
