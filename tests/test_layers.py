"""Imports run one way: each package stands on those below it, and the kernels know nothing of video models."""

from __future__ import annotations

import ast
from pathlib import Path

import layers
import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "kernels" / "vmonarch_kernels").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_the_kernels_import_neither_models_nor_the_command_line(path: Path) -> None:
    assert not imported(path) & {"vmonarch_cli", "vmonarch_presets", "diffusers", "transformers", "rich", "typer"}


def test_only_the_triton_files_import_triton() -> None:
    compiled = {"_hopper.py", "_hopper_backward.py", "_triton.py", "_triton_backward.py", "_triton_fused.py"}
    assert {path.name for path in KERNELS if "triton" in imported(path)} - compiled == {"ahead.py", "launch.py"}


def test_no_folder_named_kernels_is_a_package() -> None:
    """A top-level package of that name would hide the one that diffusers and transformers look for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_import_runs_upwards() -> None:
    assert layers.upward(layers.imports(layers.modules())) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert layers.circles(layers.imports(layers.modules())) == []


def test_every_module_is_in_a_layer() -> None:
    assert [name for name in layers.modules() if layers.level(name) is None] == ["vmonarch_cli"]


def test_every_package_says_what_it_is_for() -> None:
    faces = [path for path in layers.modules().values() if path.name == "__init__.py"]
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in faces)


def test_the_root_of_the_package_is_small() -> None:
    """A stranger reads the names at the root first."""
    entries = [path.name for path in (ROOT / "vmonarch_cli").iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= 22
