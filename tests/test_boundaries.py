"""Imports run one way: the kernels know nothing of video models or the command line."""

from __future__ import annotations

import ast
from pathlib import Path

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
    assert {path.name for path in KERNELS if "triton" in imported(path)} == {"_hopper.py", "_triton.py", "launch.py"}


def test_no_folder_named_kernels_is_a_package() -> None:
    """A top-level package of that name would hide the one that diffusers and transformers look for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
