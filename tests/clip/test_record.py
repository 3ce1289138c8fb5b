"""What a record says, and the plan that makes its clip again."""

from __future__ import annotations

from pathlib import Path

import pytest
import records

from vmonarch_cli.clip.record import plan_again
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve


def plan_for(tmp_path: Path, model: str, **flags: object) -> Plan:
    asked = GenerateRequest(model=model, prompt="a cat", output=str(tmp_path / "x.mp4"), device="cpu")
    settings = {"height": 128, "width": 128, "num_frames": 17, "steps": 3, "preset": "balanced", **flags}
    return resolve(GenerateRequest(**{**vars(asked), **settings}))


@pytest.mark.parametrize("model", ["demo", "hunyuanvideo"])
def test_a_plan_made_again_counts_the_work_of_the_first(tmp_path: Path, model: str) -> None:
    """A model with embedded guidance runs one forward a step, whatever its guidance scale is."""
    plan = plan_for(tmp_path, model)
    again = plan_again(records.write(plan), None)
    assert again.flops == plan.flops
    assert (again.preset.name, again.grid, again.steps) == (plan.preset.name, plan.grid, plan.steps)
