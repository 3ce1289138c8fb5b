"""The scorer's clips under another sampler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vmonarch_cli.demo import score

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(weights: Path, sampler: str, batch: int, *, steps: int = 3) -> torch.Tensor:
    """Of the first two held-out prompts."""
    pipeline = score.load(weights, torch.device("cpu"))
    own = pipeline.scheduler
    settings = score.Settings(steps=steps, batch=batch, size=32, num_frames=5, sampler=sampler)
    made = score.generate(pipeline, score.held_out_specs(2, 5), settings)[0]
    assert pipeline.scheduler is own
    return made


@pytest.mark.parametrize("sampler", ["own", "euler", "dpm++"])
def test_a_sampler_without_noise_makes_the_same_clip_in_any_batch(weights: Path, sampler: str) -> None:
    alone, together = latents(weights, sampler, 1), latents(weights, sampler, 2)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    assert sampler == "own" or not torch.allclose(alone, latents(weights, "own", 1), atol=1e-3)


def test_a_sampler_that_adds_noise_makes_the_same_clip_again(weights: Path) -> None:
    first, second = latents(weights, "dpm++sde", 2), latents(weights, "dpm++sde", 2)
    assert torch.equal(first, second)
    assert not torch.allclose(first, latents(weights, "dpm++", 2), atol=1e-2)


def test_an_unknown_sampler_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        score.main(["--sampler", "dpm"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: --sampler takes own, unipc, euler, dpm++, dpm++sde, lcm, got 'dpm' (did you mean dpm++ or dpm++sde?)\n"
    )
