"""Numbers as a reader takes them in."""

from __future__ import annotations


def three_digits(value: float) -> str:
    """Three digits that count, all before the point: ``1383``, ``0.52``; ``1.2e-05`` if tiny or huge."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"
