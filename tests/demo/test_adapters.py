"""The adapters that come with the demo model: they are for its weights and presets, small, and used where they fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from vmonarch_cli.models.demo import WEIGHTS
from vmonarch_cli.models.tuned import check_base, read_adapter
from vmonarch_cli.pipeline.doctor import EXAMINATIONS
from vmonarch_cli.pipeline.tuned import write_adapter
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.tuned import brought
from vmonarch_cli.presets import load_preset

FILES = brought(WEIGHTS)


def planned(**flags: object) -> Plan:
    return resolve(GenerateRequest(model="demo", prompt="a red circle", **flags))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_for_these_weights_and_its_preset_as_it_is_now(path: Path) -> None:
    said = read_adapter(path)
    check_base(said, str(path), WEIGHTS)
    assert path.stem == said.preset_name or path.stem.startswith(f"{said.preset_name}-")
    assert said.misfit(load_preset(said.preset_name), said.steps) is None
    before, after = said.gain or (0.0, 0.0)
    assert after < before
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    assert {part.get_dtype() for part in parts.values()} == {"F16"}
    ranks = {part.get_shape()[0] for name, part in parts.items() if "lora_A" in name}
    assert ranks == {said.training["rank"]} == {said.training["alpha"]}


def test_they_leave_the_package_small() -> None:
    assert len(FILES) == 4
    folder = WEIGHTS.parent
    files = [path for name in ("weights", "tuned") for path in (folder / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32e6


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "fast"),
        ({"preset": "paper"}, "paper"),
        ({"preset": "balanced"}, "balanced"),
        ({"num_frames": 193}, None),
        ({"preset": "balanced", "num_frames": 193}, None),
        ({"preset": "fast", "steps": 4, "guidance_scale": 1.0}, "fast-4-steps"),
        ({"preset": "fast", "steps": 4}, None),
        ({"preset": "balanced", "steps": 4, "guidance_scale": 1.0}, None),
        ({"preset": "balanced", "steps": 4}, None),
        ({"preset": "balanced", "steps": 8}, None),
        ({"preset": "quality"}, None),
        ({"preset": "dense"}, None),
        ({"tuned": "none"}, None),
    ],
)
def test_the_one_that_fits_is_used_and_named(flags: dict[str, object], name: str | None) -> None:
    plan = planned(**flags)
    assert plan.tuned is None if name is None else plan.tuned is not None and Path(plan.tuned.path).stem == name
    may_have_one = flags.get("tuned") != "none" and flags.get("preset", "fast") in ("fast", "balanced")
    assert (plan.tuned_note is not None) == (name is None and may_have_one)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (
            {"num_frames": 97, "guidance_scale": 4.0},
            "the model's adapter for fast was made for 49 frames, and this run has 97",
        ),
        (
            {"steps": 8},
            "the model's adapters for fast were made for 4 steps with guidance 1 and 20 steps with guidance 4; this "
            "run has 8 steps with guidance 4",
        ),
    ],
)
def test_where_none_fits_it_or_all_are_named(flags: dict[str, object], note: str) -> None:
    plan = planned(**flags)
    assert plan.tuned is None
    assert plan.tuned_note == note


@pytest.mark.parametrize(("frames", "nearest"), [(97, 49), (145, 193)])
def test_of_several_lengths_the_nearest_is_named(
    frames: int, nearest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = next(path for path in FILES if path.stem == "fast")
    long = tmp_path / "fast-193.safetensors"
    said = read_adapter(short)
    write_adapter(long, load_file(short), said.model_copy(update={"num_frames": 193}))
    monkeypatch.setattr("vmonarch_cli.plan.tuned.brought", lambda folder, preset: [short, long])
    plan = planned(num_frames=frames, guidance_scale=4.0)
    assert plan.tuned is None
    expected = f"the model's nearest adapter for fast was made for {nearest} frames, and this run has {frames}"
    assert plan.tuned_note == expected


def test_doctor_names_them() -> None:
    found = [finding for finding in EXAMINATIONS["demo model"]() if finding.name == "demo adapter"]
    assert [finding.status for finding in found] == ["ok"] * 4
    assert "made for paper, 20 steps, guidance 4, 49 frames" in [finding.value for finding in found]
