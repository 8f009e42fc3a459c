"""Names that docstrings refer to as Sphinx does, such as :class:`~flowpolicy.spec.PolicySpec`, as links."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import griffe

log = logging.getLogger("mkdocs.hooks.roles")  # what it warns of ends a strict build
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Replaces them when a package has been read: a name with an entry by a link, another one by code."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all docstrings of the package."""
        items = list(_items(pkg))
        classes = {item.name: item for item in items if item.is_class}
        for item in items:
            if item.docstring:
                text = item.docstring.value
                item.docstring.value = _ROLE.sub(lambda role, item=item: _link(role, item, classes), text)


def _items(item: griffe.Object) -> Iterator[griffe.Object]:
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from _items(member)


def _link(role: re.Match[str], item: griffe.Object, classes: dict[str, griffe.Object]) -> str:
    tilde, name = role.groups()
    code = f"`{name.rpartition('.')[2] if tilde else name}`"
    if name.partition(".")[0] in sys.stdlib_module_names | {"numpy", "torch"}:
        return code
    target = _found(item, name, classes)
    if target is None:
        log.warning("The docstring of %s refers to '%s', which does not exist.", item.path, name)
        return code
    is_public = not any(part.startswith("_") for part in target.path.split("."))
    return f"[{code}][{target.path}]" if is_public and target.has_docstring else code


def _found(item: griffe.Object, name: str, classes: dict[str, griffe.Object]) -> griffe.Object | None:
    """What ``name`` means in the docstring of ``item``: a full path, seen from there, or any class."""
    first, *rest = name.split(".")
    scope: griffe.Object | None = item
    while scope is not None and first not in scope.all_members:
        scope = scope.parent
    try:
        if scope is not None:
            target = scope.all_members[first]
        elif first in classes:
            target = classes[first]
        else:
            target, rest = item.modules_collection[name], []
        for part in rest:
            target = target.all_members[part]
        return target.final_target if target.is_alias else target
    except (KeyError, griffe.AliasResolutionError):
        return None
