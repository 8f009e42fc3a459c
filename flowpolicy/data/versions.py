"""Whether demonstrations were recorded under the simulator's version that is installed here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any


def version_warning(attributes: Mapping[str, Any]) -> str | None:
    """One sentence where robosuite here differs from ``env_version`` in its first two numbers; else None.

    Controllers, cameras and models changed between them: the same action then moves the arm otherwise.

    Args:
        attributes: of demonstrations, or the metadata of a policy that was trained on them.
    """
    recorded = attributes.get("env_version")
    if not isinstance(recorded, str):
        return None
    try:
        installed = importlib.metadata.version("robosuite")
    except importlib.metadata.PackageNotFoundError:
        return None
    if recorded.split(".")[:2] == installed.split(".")[:2]:
        return None
    return (
        f"these demonstrations were recorded under robosuite {recorded} and {installed} is installed here; "
        "a controller may answer the same actions otherwise, so replay a few before you trust them."
    )
