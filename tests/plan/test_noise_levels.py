"""Samplers and noise levels as flags give them: what they come to, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from vmonarch_cli.batch.prompts import read_prompts
from vmonarch_cli.errors import InputError
from vmonarch_cli.plan.noise_levels import read_sigmas
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve


def planned(model: str = "wan2.1-1.3b", **flags: Any) -> Plan:
    return resolve(GenerateRequest(model=model, prompt="a cat", **flags))


def test_a_list_is_the_schedule_and_the_number_of_steps() -> None:
    plan = planned(sigmas=(1.0, 0.9, 0.5))
    assert plan.noise_levels == (1.0, 0.9, 0.5)
    assert plan.noise_levels_forced
    assert (plan.steps, plan.flow_shift) == (3, None)
    assert plan.settings()["sigmas"] == {"value": (1.0, 0.9, 0.5), "origin": "flag"}


def test_a_sampler_spaces_its_steps_evenly_before_the_shift() -> None:
    plan = planned(sampler="euler", steps=4, flow_shift=5.0)
    assert plan.noise_levels == pytest.approx((1.0, 0.9375, 0.833333, 0.625), abs=1e-6)
    assert plan.settings()["sampler"]["value"] == "euler"


def test_the_own_sampler_by_name_changes_nothing() -> None:
    own, named = planned(steps=4), planned(steps=4, sampler="unipc")
    assert own.noise_levels == named.noise_levels
    assert not own.noise_levels_forced
    assert not named.noise_levels_forced
    assert planned("ltx-video").noise_levels is None


@pytest.mark.parametrize(
    ("model", "flags", "sentence"),
    [
        ("wan2.1-1.3b", {"sampler": "ddim"}, "--sampler takes own, unipc, euler, dpm"),
        ("wan2.1-1.3b", {"sigmas": (1.0, 0.5), "steps": 3}, "--sigmas has 2 noise levels and --steps is 3"),
        ("wan2.1-1.3b", {"sigmas": (0.5, 0.9)}, "takes noise levels that fall, got 0.9 after 0.5"),
        ("wan2.1-1.3b", {"sigmas": (0.5, 0.5)}, "takes noise levels that fall, got 0.5 after 0.5"),
        ("wan2.1-1.3b", {"sigmas": (1.5, 0.5)}, "takes noise levels above 0 and up to 1, got 1.5"),
        ("wan2.1-1.3b", {"sigmas": (1.0, float("nan"))}, "takes noise levels above 0 and up to 1, got nan"),
        ("wan2.1-1.3b", {"sigmas": (1.0, 0.0)}, "got 0: the 0 at the end is added"),
        ("wan2.1-1.3b", {"sigmas": (1.0, 0.5), "flow_shift": 3.0}, "--sigmas and --flow-shift both say"),
        ("cogvideox-2b", {"sampler": "euler"}, "--sampler cannot be set: the noise schedule of cogvideox-2b is not"),
        ("mochi-1", {"sigmas": (1.0, 0.5)}, "--sigmas cannot be set: the noise schedule of mochi-1 is not a flow"),
        ("ltx-video", {"sampler": "lcm"}, "--sampler lcm needs --flow-shift or --sigmas"),
    ],
)
def test_what_cannot_be_is_one_sentence(model: str, flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(model, **flags)
    assert sentence in caught.value.message


def test_a_text_of_numbers() -> None:
    assert read_sigmas("1, 0.75 0.5") == (1.0, 0.75, 0.5)
    for text in ("1,a", "", ",", "1,,0.5", "1,0.5,", ",1"):
        with pytest.raises(InputError, match="--sigmas takes"):
            read_sigmas(text)


def test_a_line_of_a_prompts_file_may_give_them(tmp_path: Any) -> None:
    file = tmp_path / "clips.jsonl"
    file.write_text(
        '{"prompt": "a", "sampler": "euler", "sigmas": [1, 0.5]}\n{"prompt": "b", "sigmas": "1,0.25"}\n'
        '{"prompt": "c", "sigmas": [1, "x"]}\n{"prompt": "d", "sigmas": [0.5, 1]}\n'
    )
    prompts = read_prompts(str(file))
    assert [line.fields.get("sigmas") for line in prompts.lines] == [(1.0, 0.5), (1.0, 0.25), None, None]
    assert prompts.lines[0].fields["sampler"] == "euler"
    assert [number for number, _ in prompts.faults] == [3, 4]
