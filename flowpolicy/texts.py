"""Texts as arrays of numbers, for what passes on nothing else: UTF-8 bytes, filled up with zeros."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONGEST_TEXT = 1000
"""UTF-8 bytes of one text."""


def text_bytes(text: str) -> NDArray[np.uint8]:
    """``(LONGEST_TEXT,)``; what is beyond that is cut off."""
    content = text.replace("\0", " ").encode("utf-8", "replace")[:LONGEST_TEXT]
    return np.frombuffer(content.ljust(LONGEST_TEXT, b"\0"), np.uint8)


def text_of(content: bytes) -> str:
    """The text of :func:`text_bytes`."""
    return content.partition(b"\0")[0].decode("utf-8", "replace")
