"""The rooms of the package depend on each other in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import flowpolicy

ROOT = Path(flowpolicy.__file__).parent
ROOMS = (
    "errors", "optional", "plugins", "ranges", "rounding", "settings", "texts", "files", "runs", "features",
    "spec", "data", "models", "flow", "policy", "execution", "evaluation", "acceleration", "pretraining",
    "distillation", "preferences", "finetuning", "control", "serving", "doctor", "overrides", "cli",
)  # fmt: skip
"""From the bottom up: a room imports those before it. ``plots`` draws what all of them find, and they import
it where they draw, since it needs matplotlib."""
TOP = "plots"
ENTRANCES = ("__init__", "__main__")


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules of the package that a file imports, and whether it does so when it is imported itself."""

    def walk(node: ast.AST, now: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and (child.module or "").partition(".")[0] == "flowpolicy":
                module = child.module or ""
                yield from (
                    (module if "." in module else f"{module}.{name.name}", now) for name in child.names
                )
            elif isinstance(child, ast.Import):
                yield from ((name.name, now) for name in child.names if name.name.startswith("flowpolicy."))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, now and not inside)

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), True))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


FILES = {
    ".".join(("flowpolicy", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in ROOT.rglob("*.py")
}


def test_every_room_has_its_place():
    assert {room(module) for module in FILES} == {*ROOMS, TOP, *ENTRANCES}


def test_rooms_import_only_those_below():
    order = {name: place for place, name in enumerate((*ROOMS, TOP))}
    wrong = []
    for module, path in FILES.items():
        mine = room(module)
        for other, now in imports(path):
            theirs = room(other)
            if mine in ENTRANCES or theirs in (mine, *ENTRANCES) or theirs not in order:
                continue
            if order[theirs] > order[mine] and (now or theirs != TOP):
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_module_is_imported_in_a_circle():
    graph = {
        module: {_file(other) for other, now in imports(path) if now} & FILES.keys() - {module}
        for module, path in FILES.items()
    }
    while free := [module for module, needs in graph.items() if not needs]:
        for module in free:
            del graph[module]
        for needs in graph.values():
            needs.difference_update(free)
    assert not graph, f"circles among {', '.join(sorted(graph))}"


def _file(module: str) -> str:
    """The file that an import reads: a module's, or a folder's own."""
    return module if module in FILES else f"{module}.__init__"
