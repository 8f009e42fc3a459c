"""Images in a store: whole numbers from 0 to 255, and how they are compressed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import DataError
from flowpolicy.optional import optional
from flowpolicy.settings import require

CODECS = ("zstd", "jpeg2000")
_JPEG2000_LEVEL = 50  # as Diffusion Policy writes its own


def is_whole_uint8(values: NDArray[Any]) -> bool:
    """Whether uint8 holds these values as they are."""
    if values.dtype == np.uint8:
        return True
    return bool(((values >= 0) & (values <= 255) & (values == np.round(values))).all())


def register_codecs() -> bool:
    """Let zarr decode JPEG 2000, PNG and their like; False where imagecodecs is not installed."""
    try:
        from imagecodecs.numcodecs import register_codecs as register
    except ImportError:
        return False
    register(verbose=False)
    return True


def image_codec(name: str) -> Any | None:
    """A numcodecs codec for one image at a time; None for ``zstd``, which is every array's.

    ``zstd`` loses nothing and is smallest for drawn images; ``jpeg2000`` is lossy, and smallest for rendered
    and camera images. Both open in Diffusion Policy.

    Raises:
        DataError: imagecodecs is not installed.
    """
    require(name in CODECS, "image_codec", name, f"one of {', '.join(CODECS)}")
    if name == "zstd":
        return None
    with optional("image_codec=jpeg2000 needs imagecodecs", "images", DataError):
        from imagecodecs.numcodecs import Jpeg2k
    register_codecs()
    return Jpeg2k(level=_JPEG2000_LEVEL)
