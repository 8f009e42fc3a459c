"""The reference: a page for every public module of flowpolicy/ and envs/, in the folders of the code.

Nothing is listed by hand and nothing is imported: a new module has its page, and its place in the
navigation, because its file is there.
"""

from __future__ import annotations

import ast
import posixpath
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"flowpolicy": "flowpolicy", "flowpolicy_envs": "envs"}  # name on import: folder
_PATH = re.compile(r"`((?:flowpolicy|envs)(?:/\w+)+)(?:\.py|/)?`")
_DOTTED = re.compile(r"(?<!\[)`(flowpolicy(?:_envs)?(?:\.\w+)+)`")
_entries: set[str] = set()  # every module, function and class that has one
_names = tempfile.TemporaryDirectory()  # in it the packages have the names that they are imported by


@dataclass(frozen=True)
class Module:
    """A public module, read but not imported.

    Attributes:
        name: on import, such as ``flowpolicy.flow.shortcut``.
        file: its source.
    """

    name: str
    file: Path

    @property
    def is_package(self) -> bool:
        """Whether it holds other modules."""
        return self.file.name == "__init__.py"

    @property
    def page(self) -> str:
        """Its page, from docs/."""
        path = "reference/" + self.name.replace(".", "/")
        return f"{path}/index.md" if self.is_package else f"{path}.md"

    @cached_property
    def definitions(self) -> list[ast.FunctionDef | ast.ClassDef]:
        """The public functions and classes that it defines."""
        kinds = (ast.FunctionDef, ast.ClassDef)
        return [
            node
            for node in self._tree.body
            if isinstance(node, kinds) and not node.name.startswith("_") and not _is_overload(node)
        ]

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring."""
        return " ".join((ast.get_docstring(self._tree) or "").partition("\n\n")[0].split())

    @cached_property
    def _tree(self) -> ast.Module:
        return ast.parse(self.file.read_text(encoding="utf-8"))


def _is_overload(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether it only adds a signature to the function behind it."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def public_modules(package: str) -> list[Module]:
    """All of them, those of a package behind the package itself."""
    folder = ROOT / PACKAGES[package]
    found = []
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found.append(Module(".".join([package, *parts]), file))
    return sorted(found, key=lambda module: module.name)


def text(module: Module, modules: list[Module]) -> str:
    """The Markdown of its page: what mkdocstrings finds in it, and in a package's the modules in it."""
    lines = [f"::: {module.name}"]
    if module.is_package:  # what it takes from its modules is described there
        members = ", ".join(node.name for node in module.definitions)
        lines += ["    options:", f"      members: [{members}]"]
        inside = [other for other in modules if other.name.rpartition(".")[0] == module.name]
        lines += ["", "| module | |", "| --- | --- |"] if inside else []
        for other in inside:
            path = other.page.removeprefix(module.page.removesuffix("index.md"))
            lines.append(
                f"| [`{other.name.rpartition('.')[2]}`]({path}) | {other.summary.replace('|', '/')} |"
            )
    return "\n".join([f"---\ntitle: {module.name.rpartition('.')[2]}\n---", "", *lines, ""])


def navigation(module: Module, modules: list[Module]) -> dict[str, Any]:
    """Its entry: a page, or for a package a section that opens with the package's own page."""
    label = module.name.rpartition(".")[2]
    if not module.is_package:
        return {label: module.page}
    inside = [other for other in modules if other.name.rpartition(".")[0] == module.name]
    inside.sort(key=lambda other: not other.is_package)
    return {label: [module.page, *(navigation(other, modules) for other in inside)]}


def on_config(config: Any) -> Any:
    """Fill the navigation's entry ``reference/``, and tell mkdocstrings where the packages are."""
    entries = []
    for name, folder in PACKAGES.items():
        link = Path(_names.name, name)
        if not link.is_symlink():
            link.symlink_to(ROOT / folder)
        modules = public_modules(name)
        entries.append(navigation(modules[0], modules))
    section = next(entry for entry in config.nav if "Reference" in entry)
    section["Reference"] = entries
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_names.name]
    return config


on_config.mkdocs_priority = 100  # before mkdocstrings reads its settings


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    _entries.clear()
    for name in PACKAGES:
        modules = public_modules(name)
        for module in modules:
            _entries.update([module.name, *(f"{module.name}.{node.name}" for node in module.definitions)])
            files.append(File.generated(config, module.page, content=text(module, modules)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Link the code that a page names, by path or as it is imported, to its entry here."""

    def linked(found: re.Match[str]) -> str:
        name = re.sub("^envs", "flowpolicy_envs", found[1])
        for target in (f"reference/{name}.md", f"reference/{name}/index.md"):
            if files.get_file_from_path(target):
                return (
                    f"[{found[0]}]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')})"
                )
        return found[0]

    markdown = _PATH.sub(linked, markdown)
    return _DOTTED.sub(
        lambda found: f"[{found[0]}][{found[1]}]" if found[1] in _entries else found[0], markdown
    )
