"""The operator of a control run: one of this package, or a function or class of the user's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from flowpolicy import plugins
from flowpolicy.control.operator import OPERATORS, Operator
from flowpolicy.control.operators import gamepad, keyboard, lerobot  # noqa: F401 - they register
from flowpolicy.control.operators.function import FunctionOperator
from flowpolicy.errors import ConfigError
from flowpolicy.settings import build, choose


def build_operator(choice: str | Mapping[str, Any]) -> Operator:
    """The operator of a name, or of ``{kind: name, ...}`` with settings of it; it is not started.

    ``module:name`` is a function of a :class:`~flowpolicy.control.operator.Moment`, or a class, whose
    arguments the settings are; from an installed module or a file of the present folder.

    Raises:
        ConfigError: there is no such operator, or a setting is not one of its.
    """
    settings = {"kind": choice} if isinstance(choice, str) else dict(choice)
    kind = str(settings.pop("kind", ""))
    if ":" in kind:
        return _own(kind, settings)
    plugins.load()
    cls = choose(OPERATORS, kind, "operator")
    return cast(Operator, build(cast(Any, cls), settings, "operator"))


def _own(kind: str, settings: Mapping[str, Any]) -> Operator:
    module, _, name = kind.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), name)
        if not isinstance(made, type) and not settings:
            return FunctionOperator(made)
        made = made(**settings)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"operator={kind} cannot be made ({error}); name a function or a class as module:name, of an "
            "installed module or a file of the present folder."
        ) from error
    lacking = [part for part in ("start", "read", "close") if not hasattr(made, part)]
    if lacking:
        raise ConfigError(
            f"operator={kind} lacks {', '.join(lacking)}; an operator has start, read and close."
        )
    return cast(Operator, made)
