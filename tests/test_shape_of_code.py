"""Bounds that keep the code readable: parameters of a function, lines of a module, and one place that prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vmonarch_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_PARAMETERS = 8
MAX_LINES = 350
SINK = PACKAGE / "cli" / "output.py"
SCRIPTS = PACKAGE / "demo"
"""`python -m` programs of their own, which the command line does not run."""
ENTRY = PACKAGE / "__main__.py"
"""Has one line to write when an interrupt comes before the sink is imported."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name with its line, number of parameters) of every function and lambda; self and cls do not count."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = [argument for argument in found if argument.arg not in ("self", "cls")]
            yield f"{getattr(node, 'name', 'lambda')} (line {node.lineno})", len(own)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_takes_more_than_eight_parameters(path: Path) -> None:
    assert [name for name, count in functions(path) if count > MAX_PARAMETERS] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def printing(path: Path) -> Iterator[str]:
    """Every place that writes to a standard stream or makes a rich Console."""
    for node in ast.walk(ast.parse(path.read_text())):
        words = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if words in ("print", "typer.echo", "typer.secho", "sys.stdout", "sys.stderr", "Console", "sys.__stdout__"):
            yield f"{words} (line {node.lineno})"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p not in (SINK, ENTRY) and SCRIPTS not in p.parents], ids=name_of
)
def test_only_the_sink_prints(path: Path) -> None:
    assert list(printing(path)) == []


def test_the_sink_is_seen_to_print() -> None:
    """What the test above looks for is what the sink does."""
    assert {words.split()[0] for words in printing(SINK)} >= {"sys.stdout", "sys.stderr", "Console"}


def test_no_public_class_name_is_used_twice() -> None:
    """A name means one thing, so that a search for it leads to one place."""
    places: dict[str, list[str]] = {}
    for path in (*MODULES, *sorted((ROOT / "kernels" / "vmonarch_kernels").glob("*.py"))):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name_of(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
