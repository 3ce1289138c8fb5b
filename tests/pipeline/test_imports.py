"""Installed packages that do not fit each other: doctor imports what a run imports, and the first cause is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmonarch_cli.pipeline.imports import why_import_failed
from vmonarch_cli.text import innermost_line

_CODE = """
import json, sys
from vmonarch_cli.errors import ModelError
from vmonarch_cli.pipeline.doctor import EXAMINATIONS
from vmonarch_cli.pipeline.load import quiet_libraries
said = ""
try:
    quiet_libraries()
except ModelError as error:
    said = error.message
print(json.dumps([said, [finding.to_json() for finding in EXAMINATIONS["libraries"]()]]))
"""


def test_a_torchvision_that_does_not_fit_is_named_by_doctor_and_by_a_run(tmp_path: Path) -> None:
    """In a process of its own, whose torchvision fails to import as one for another torch does."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")\n'
    )
    (tmp_path / "torchvision-0.20.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.20.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    said, findings = json.loads(done.stdout)
    why = "operator torchvision::nms does not exist: torchvision 0.20.0 does not fit torch "
    cure = "pip uninstall torchvision (vmonarch does without), or install the version for this torch"
    assert said.startswith(f"the installed packages do not work together: {why}")
    assert said.endswith(cure)
    states = {finding["name"]: finding for finding in findings}
    assert states["torch"]["status"] == "ok"
    for name in ("transformers", "diffusers"):
        assert states[name]["status"] == "broken"
        assert states[name]["value"].startswith(f"cannot be imported: {why}")
        assert states[name]["value"].endswith(cure)


_SPEAKING = {
    "doctor": 'from vmonarch_cli.pipeline.doctor import EXAMINATIONS; EXAMINATIONS["libraries"]()',
    "a training": (
        "from vmonarch_cli.demo.training.__main__ import main; "
        'main(["text", "--out", "made", "--preset", "tiny", "--steps", "1", "--batch", "2"])'
    ),
}


@pytest.mark.parametrize("code", _SPEAKING.values(), ids=_SPEAKING)
def test_what_torchao_warns_of_when_it_is_imported_is_not_shown(tmp_path: Path, code: str) -> None:
    """On a machine without CUDA it cannot load its files for CUDA, and says so of each."""
    pytest.importorskip("torchao")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    logged = [line for line in done.stderr.splitlines() if not line.startswith('{"event"')]
    assert logged == []


def test_the_first_cause_is_what_is_said() -> None:
    try:
        try:
            raise ImportError("cannot import name 'HybridCache' from 'transformers' (/somewhere/__init__.py)")
        except ImportError as error:
            raise RuntimeError("Failed to import diffusers.loaders.peft (look up to see its traceback):") from error
    except RuntimeError as error:
        assert innermost_line(error).startswith("cannot import name 'HybridCache'")
        assert "; pip install --upgrade transformers may help" in why_import_failed(error)
