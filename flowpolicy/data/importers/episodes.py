"""The order of episodes."""

from __future__ import annotations

import re
from collections.abc import Sequence


def natural_order(names: Sequence[str]) -> list[str]:
    """Names sorted by the numbers in them, so that ``demo_10`` comes after ``demo_2``."""
    return sorted(
        names,
        key=lambda name: [
            (1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)
        ],
    )
