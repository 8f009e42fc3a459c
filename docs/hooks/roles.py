"""Names that docstrings refer to as Sphinx does, such as :class:`~flowpolicy.spec.PolicySpec`, as links."""

from __future__ import annotations

import logging
import re
from typing import Any

import griffe

log = logging.getLogger("mkdocs.hooks.roles")  # what it warns of ends a strict build
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Replaces them when a package has been read: a public name by a link, a private one by code."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all docstrings of the package."""
        self._rewrite(pkg)

    def _rewrite(self, item: griffe.Object) -> None:
        if item.docstring:
            item.docstring.value = _ROLE.sub(lambda found: _link(item, *found.groups()), item.docstring.value)
        for member in item.members.values():
            if not member.is_alias:
                self._rewrite(member)


def _link(item: griffe.Object, tilde: str, name: str) -> str:
    code = f"`{name.rpartition('.')[2] if tilde else name}`"
    target = _found(item, name)
    if target is None:
        log.warning("The docstring of %s refers to '%s', which does not exist.", item.path, name)
        return code
    is_listed = not any(part.startswith("_") for part in target.path.split("."))
    return f"[{code}][{target.path}]" if is_listed else code


def _found(item: griffe.Object, name: str) -> griffe.Object | None:
    """What ``name`` means in the docstring of ``item``: a full path, or seen from there."""
    first, *rest = name.split(".")
    scope: griffe.Object | None = item
    while scope is not None:
        if first in scope.all_members:
            try:
                target = scope.all_members[first]
                for part in rest:
                    target = target.all_members[part]
                return target.final_target if target.is_alias else target
            except (KeyError, griffe.AliasResolutionError):
                return None
        scope = scope.parent
    try:
        target = item.modules_collection[name]
    except KeyError:
        return None
    return target.final_target if target.is_alias else target
