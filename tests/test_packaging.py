"""The wheel holds what the tree holds: every module, preset and weight, under the installed names."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    "vmonarch_cli": "vmonarch_cli",
    "kernels/vmonarch_kernels": "vmonarch_kernels",
    "presets": "vmonarch_presets",
}
DATA = (".py", ".toml", ".json", ".safetensors", ".typed", ".model", ".html", ".css")


def test_the_wheel_is_the_tree(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    # A copy, so that no build folder is left in the tree.
    source = tmp_path / "source"
    source.mkdir()
    tracked = [p for p in ROOT.iterdir() if p.name in {"pyproject.toml", "README.md", "LICENSE", "kernels", "presets"}]
    for path in [*tracked, ROOT / "vmonarch_cli"]:
        subprocess.run(["cp", "-r", path, source], check=True)
    build = "import setuptools.build_meta as b; b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    wheel = next(tmp_path.glob("vmonarch-*.whl"))
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in DATA and "__pycache__" not in path.parts
    }
    assert expected <= packed
    assert {name for name in packed if name.endswith(DATA)} == expected
    assert not any(name.startswith(("kernels/", "presets/", "tests/", "outputs/")) for name in packed)


def test_every_subpackage_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join([installed, *path.parent.relative_to(ROOT / folder).parts])
        for folder, installed in SOURCES.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == listed
