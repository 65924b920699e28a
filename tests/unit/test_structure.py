"""The package is one road: imports point one way, and nothing imports what rests on it."""

from __future__ import annotations

import ast
from pathlib import Path

import sglang_harness

PACKAGE = Path(sglang_harness.__file__).parent

#: Each part of the package may import those before it, and no other. An import for types alone or
#: inside a function counts as any other: a reader follows both.
ORDER = (
    ("errors",),
    ("_base",),
    ("spec", "verdict", "checkpoint"),
    ("oracle", "memory", "report"),
    ("runtime",),
    ("client", "peer"),
    ("traffic", "weights"),
    ("server",),
    ("suite", "sharing", "container", "kit"),
    ("upkeep",),
    ("run", "options"),
    ("gpu_check",),
    ("pytest_plugin", "cli"),
    ("__main__",),
)

#: What 'import sglang_harness' offers; a name is imported when it is first used.
FRONT = "sglang_harness"


def modules() -> dict[str, Path]:
    """Every module by its name without the package's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        first, _, rest = node.module.partition(".")
        if first != "sglang_harness":
            continue
        for name in node.names:
            inner = f"{rest}.{name.name}".strip(".")
            found.add(inner if inner in known else rest)
    return found


def part(module: str) -> str:
    return module.split(".")[0] or FRONT


def test_every_part_of_the_package_has_its_place_in_the_order():
    placed = [name for floor in ORDER for name in floor]
    assert sorted(placed) == sorted({part(module) for module in modules()} - {FRONT})
    assert len(placed) == len(set(placed))


def test_no_import_points_up_or_sideways():
    known = modules()
    floor = {name: number for number, names in enumerate(ORDER) for name in names}
    wrong = [
        f"{module} imports {imported}"
        for module, path in known.items()
        for imported in sorted(imports(path, known))
        if part(module) != part(imported)
        and FRONT not in (part(module), part(imported))
        and floor[part(imported)] >= floor[part(module)]
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    graph = {module: imports(path, known) - {module} for module, path in known.items()}
    circles = []
    for start in graph:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for following in graph.get(stack.pop(), set()):
                if following == start:
                    circles.append(start)
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    assert sorted(set(circles)) == []
