"""Step caches keep what belongs to a guidance branch with that branch, and nothing from clip to clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loading import facts_of, load
from tiny_families import TINY, latents_of

from vmonarch_cli.clip import make
from vmonarch_cli.models.base import CACHES
from vmonarch_cli.pipeline import apply_setup
from vmonarch_cli.pipeline.call import call
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.presets import Preset

BRANCHED = ["wan", "wan-vace", "skyreels-v2", "hunyuan-video-1.5", "motif-video", "ltx-2", "kandinsky-6"]
"""Families whose step has several forwards, and in whose pipelines caches run."""
STEPS = 12

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """What every forward of a clip got and returned, in order."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.calls: list[tuple[dict[str, Any], Any, torch.Tensor]] = []

    def __enter__(self) -> Recorder:
        self.handle = self.pipeline.transformer.register_forward_hook(self.record, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def record(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert not args
        self.calls.append((dict(kwargs), self.pipeline.current_timestep, first(output)))


def first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output.sample
    return tensor


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        (name, cache)
        for name in BRANCHED
        for cache in CACHES
        if (cache != "first-block" or name in ("wan", "wan-vace")) and (cache != "taylorseer" or name != "kandinsky-6")
    ],
)
def test_a_branch_is_what_it_would_be_alone(
    folders: dict[str, Path], name: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forwards of one branch, run again without the others between them, give the same outputs."""
    assert cache in facts_of(folders[name]).caches
    monkeypatch.setattr(apply_setup, "FIRST_BLOCK_THRESHOLD", 0.8)  # steps of a random model differ more
    pipeline = load(folders[name], setup=Setup(offload="none", cache=cache))
    transformer, branches = pipeline.transformer, TINY[name].forwards
    with Recorder(pipeline) as recorder:
        latents_of(pipeline, TINY[name], steps=STEPS)
    assert len(recorder.calls) == branches * STEPS
    for number in range(branches):
        transformer._reset_stateful_cache()
        for kwargs, timestep, output in recorder.calls[number::branches]:
            pipeline._current_timestep = timestep
            with torch.no_grad(), transformer.cache_context("alone"):
                torch.testing.assert_close(first(transformer(**kwargs)), output)


@pytest.mark.parametrize("name", BRANCHED)
def test_pab_skips_a_step_in_all_branches_or_in_none(folders: dict[str, Path], name: str) -> None:
    tiny, pipeline = TINY[name], load(folders[name], setup=Setup(offload="none", cache="pab"))
    with swapped(pipeline, Preset(name="paper")) as session:
        latents_of(pipeline, tiny, steps=STEPS)
    assert {step.calls for step in session.steps} == {0, tiny.layers * tiny.forwards}


@pytest.mark.parametrize("cache", CACHES)
def test_a_clip_that_was_stopped_leaves_nothing_in_the_cache(
    folders: dict[str, Path], cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply_setup, "FIRST_BLOCK_THRESHOLD", 0.8)
    tiny, pipeline = TINY["wan"], load(folders["wan"], setup=Setup(offload="none", cache=cache))
    embeddings = make.encode(pipeline, "a red circle", "a blue square", 4.0, 16)
    seen: list[int] = []

    def stop(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        if index == 6:
            raise KeyboardInterrupt
        return tensors

    def clip(callback: Any = None) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (tiny.height, tiny.width, tiny.num_frames)
        options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "generator": generator}
        with torch.no_grad():
            return call(pipeline, embeddings, shape, callback_on_step_end=callback, **options)

    alone = clip()
    with pytest.raises(KeyboardInterrupt):
        clip(stop)
    assert seen[-1] == 6
    assert torch.equal(clip(), alone)
