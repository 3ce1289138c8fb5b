"""The layers of the code, and what imports what: `python tests/support/layers.py` prints both and every breach.

A package stands on the layers below it and imports from nothing above. Imports inside functions count, and so do those
under TYPE_CHECKING: they are arrows to a reader, too. Within a package, modules form no circle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = {"vmonarch_cli": ROOT / "vmonarch_cli", "vmonarch_kernels": ROOT / "kernels" / "vmonarch_kernels"}
LAYERS: tuple[tuple[str, ...], ...] = (
    ("vmonarch_kernels",),
    (
        "vmonarch_cli.errors",
        "vmonarch_cli.text",
        "vmonarch_cli.untrusted",
        "vmonarch_cli.presets",
        "vmonarch_cli.timing",
    ),
    ("vmonarch_cli.machine",),
    ("vmonarch_cli.models", "vmonarch_cli.media"),
    ("vmonarch_cli.plan",),
    ("vmonarch_cli.attention",),
    ("vmonarch_cli.families",),
    ("vmonarch_cli.pipeline",),
    ("vmonarch_cli.demo",),
    ("vmonarch_cli.clip", "vmonarch_cli.tune"),
    ("vmonarch_cli.batch", "vmonarch_cli.profile", "vmonarch_cli.review"),
    ("vmonarch_cli.cli",),
    ("vmonarch_cli.library",),
    ("vmonarch_cli.__main__",),
)
"""From the ground up. Rooms of one layer do not import each other, but for those of the ground (see `ORDER`)."""
ORDER = ("errors", "text", "untrusted", "presets", "timing")
"""The modules of the ground, each of which may import those before it."""


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module; a package goes by its own name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, at any depth of the file.

    Not the root: Python imports it before any of its modules, and it loads none of them by itself.
    """
    return {name: set(_targets(path, known)) - {name, "vmonarch_cli"} for name, path in known.items()}


def _targets(path: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def room(module: str) -> str:
    """The entry of LAYERS that a module belongs to; the package itself and unlisted modules are their own."""
    listed = (name for layer in LAYERS for name in layer)
    return next((name for name in listed if module == name or module.startswith(f"{name}.")), module)


def level(module: str) -> int | None:
    """Layer of a module, from 0 at the ground; None for a module that no layer lists."""
    return next((number for number, layer in enumerate(LAYERS) if room(module) in layer), None)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """'A imports B' for each import that runs up, or sideways between two rooms of one layer."""
    found = []
    for source, targets in sorted(graph.items()):
        for target in sorted(targets):
            here, there = level(source), level(target)
            if here is None or there is None or there < here or room(source) == room(target):
                continue
            names = [room(name).removeprefix("vmonarch_cli.") for name in (source, target)]
            if there == here and all(name in ORDER for name in names) and ORDER.index(names[1]) < ORDER.index(names[0]):
                continue
            found.append(f"{source} imports {target}")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a loop (strongly connected components of two or more)."""
    reach = {name: _reachable(name, graph) for name in graph}
    groups = {
        frozenset([name, *(other for other in reach[name] if name in reach[other])]) for name in graph if reach[name]
    }
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(graph[name])
    return seen


def main() -> int:
    """Print every layer with its rooms and arrows, then what breaks the rules; the exit code counts breaches."""
    known = modules()
    graph = imports(known)
    for number, layer in reversed(list(enumerate(LAYERS))):
        for name in layer:
            members = [module for module in known if room(module) == name]
            lines = sum(len(known[module].read_text(encoding="utf-8").splitlines()) for module in members)
            below = sorted({room(target) for module in members for target in graph[module]} - {name})
            arrows = ", ".join(target.removeprefix("vmonarch_cli.") for target in below)
            print(f"{number:2d}  {name:24s} {len(members):3d} modules {lines:6,d} lines  -> {arrows}")
    breaches = upward(graph) + [f"circle: {', '.join(group)}" for group in circles(graph)]
    breaches += [f"{name} is in no layer" for name in known if level(name) is None and name != "vmonarch_cli"]
    print(*breaches or ["no upward import, no circle"], sep="\n")
    return len(breaches)


if __name__ == "__main__":
    raise SystemExit(main())
