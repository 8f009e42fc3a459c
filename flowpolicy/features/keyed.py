"""Modules under the names of observations, which may be any text."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Generic, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


class KeyedModules(nn.Module, Generic[M]):
    """A mapping of any non-empty key to a module, in the order given.

    PyTorch puts a module's name into an attribute and into the dotted names of its parameters. A key that
    cannot stand there (one with a dot, or ``type``, ``values``, ``forward``, ...) is escaped; any other one
    is the module's name as it is.
    """

    def __init__(self, modules: Mapping[str, M]) -> None:
        super().__init__()
        self._names = {key: _escaped(key) if self._is_taken(key) else key for key in modules}
        for key, module in modules.items():
            self.add_module(self._names[key], module)

    def __getitem__(self, key: str) -> M:
        return cast("M", self._modules[self._names[key]])

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def keys(self) -> KeysView[str]:
        """The keys, unescaped."""
        return self._names.keys()

    def items(self) -> ItemsView[str, M]:
        """Keys and modules."""
        return {key: self[key] for key in self._names}.items()

    def values(self) -> ValuesView[M]:
        """The modules."""
        return {key: self[key] for key in self._names}.values()

    def _is_taken(self, key: str) -> bool:
        return "." in key or key.startswith("%") or key == "_names" or hasattr(self, key)


def _escaped(key: str) -> str:
    return "%" + key.replace("%", "%25").replace(".", "%2E")
