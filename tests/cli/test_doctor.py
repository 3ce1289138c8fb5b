"""`vmonarch doctor`: what it finds, and what it exits with."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.pipeline import doctor


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_doctor_finds_this_machine_well() -> None:
    result = call("doctor", "--json")
    printed = json.loads(result.stdout)
    names = {check["name"]: check for check in printed["checks"]}
    assert result.exit_code == (0 if printed["healthy"] else 1)
    for name in ("python", "torch", "diffusers", "transformers", "ffmpeg", "attention", "self-test torch"):
        assert names[name]["status"] == "ok", names[name]
    assert {"hub cache", "triton"} <= names.keys()


def test_doctor_exits_1_when_something_essential_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ffmpeg() -> list[doctor.Finding]:
        raise RuntimeError("No ffmpeg exe could be found.\nand more")

    monkeypatch.setattr(doctor, "EXAMINATIONS", {"python": doctor.EXAMINATIONS["python"], "ffmpeg": no_ffmpeg})
    result = call("doctor")
    assert result.exit_code == 1
    assert "RuntimeError: No ffmpeg exe could be found." in result.stdout
    assert "1 broken" in result.stdout
