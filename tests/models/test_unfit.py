"""Pipelines that are not supported: a folder of one is refused with the reason, by the command line and in a script."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
from typer.testing import CliRunner

from vmonarch_cli import ModelError, enable_monarch
from vmonarch_cli.cli.app import app
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.unfit import UNFIT
from vmonarch_cli.text import with_article

pipelines = pytest.mark.parametrize("name", UNFIT)


@pipelines
def test_a_folder_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    index = "modular_model_index.json" if "Modular" in name else "model_index.json"
    (tmp_path / index).write_text(json.dumps({"_class_name": name, "transformer": ["diffusers", "Some"]}))
    words = ["generate", "-m", str(tmp_path), "-p", "a red circle", "-o", str(tmp_path / "x.mp4")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert said == f"error: {tmp_path} holds {with_article(name)}, which is not supported: {UNFIT[name]}"
    assert [path.name for path in tmp_path.iterdir()] == [index]


@pipelines
def test_a_script_gets_the_same_reason(name: str) -> None:
    pipeline = type(name, (), {"scheduler": object(), "transformer": object()})()
    with pytest.raises(ModelError, match=f"attention of {with_article(name)} cannot be swapped: {UNFIT[name]}"):
        enable_monarch(pipeline)


@pipelines
def test_diffusers_has_it_and_nobody_else_knows_it(name: str) -> None:
    assert hasattr(diffusers, name)
    assert name not in PIPELINES
