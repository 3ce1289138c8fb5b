"""How long clips of a model are sampled, where its defaults are for shorter ones."""

from __future__ import annotations

from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from vmonarch_cli.demo import score
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

SHORT, LONG = ("own", 4.0), ("dpm++sde", 2.5)


def planned(**flags: object) -> Plan:
    return resolve(GenerateRequest(prompt="a red circle rising", **{"num_frames": 193, **flags}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"num_frames": 49}, SHORT),
        ({"num_frames": 93}, SHORT),
        ({"num_frames": 97}, LONG),
        ({}, LONG),
        ({"steps": 30}, LONG),
        ({"steps": 19}, SHORT),
        ({"sigmas": tuple(1 - i / 20 for i in range(20))}, SHORT),
        ({"sampler": "own"}, ("own", 2.5)),
        ({"sampler": "euler", "guidance_scale": 1.0}, ("euler", 1.0)),
        ({"guidance_scale": 4.0}, ("dpm++sde", 4.0)),
        ({"model": "wan2.1-1.3b", "steps": 50, "guidance_scale": 5.0}, ("own", 5.0)),
    ],
)
def test_they_get_noise_in_every_step_and_less_guidance(flags: dict[str, object], expected: tuple[str, float]) -> None:
    plan = planned(**flags)
    assert (plan.sampler, plan.guidance_scale) == expected


def test_a_given_video_keeps_the_sampler_that_it_is_noised_for(tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    imageio.mimwrite(video, [np.zeros((96, 96, 3), dtype=np.uint8)] * 193, fps=16)
    plan = planned(video=str(video), steps=40, strength=0.5)
    assert (plan.sampler, plan.guidance_scale) == SHORT


def test_the_plan_says_that_the_model_wants_it_so() -> None:
    settings = planned().settings()
    assert settings["sampler"] == {"value": "dpm++sde", "origin": "model default"}
    assert settings["guidance_scale"] == {"value": 2.5, "origin": "model default"}
    assert planned(num_frames=49).settings()["sampler"] == {"value": "own", "origin": "default"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--frames", "97"], LONG),
        (["--frames", "49"], SHORT),
        (["--frames", "97", "--steps", "4"], SHORT),
        (["--frames", "97", "--sampler", "own", "--guidance", "4"], SHORT),
    ],
)
def test_the_scorer_samples_as_the_program_does(
    flags: list[str], expected: tuple[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[score.Settings] = []

    def settings_of(weights: object, settings: score.Settings, *rest: object, **named: object) -> dict[str, object]:
        seen.append(settings)
        return {}

    monkeypatch.setattr(score, "score", settings_of)
    monkeypatch.setattr(score, "show", lambda result: None)
    score.main(flags)
    assert (seen[0].sampler, seen[0].guidance) == expected
