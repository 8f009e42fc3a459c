"""Images as the files that they were compressed to: PNG, JPEG and their like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import first_line
from flowpolicy.errors import DataError
from flowpolicy.optional import optional

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_THREADS = 4


def decode_images(
    files: Sequence[bytes] | NDArray[np.object_], shape: tuple[int, ...], where: str
) -> NDArray[np.uint8]:
    """The images ``(files, height, width, channels)``, decoded side by side.

    Args:
        files: the content of one image file each.
        shape: that they are declared to have, ``(height, width, channels)``; nothing larger is decoded.
        where: they come from, for messages.

    Raises:
        DataError: no image, a damaged one, or one of another size; Pillow is not installed.
    """
    with optional(f"{where} needs Pillow to be decoded", "import", DataError):
        from PIL import Image
    Image.init()  # here, as threads would load the formats at the same time
    out = np.empty((len(files), *shape), np.uint8)

    def decode(number: int) -> None:
        try:
            with Image.open(io.BytesIO(files[number]), formats=_FORMATS) as image:
                size = image.height, image.width
                if image.mode[0] in "IF":
                    raise ValueError("more than 8 bits a pixel")
                if size == shape[:2]:  # before anything of it is decoded
                    out[number] = np.asarray(image.convert(_MODES[shape[2]])).reshape(shape)
                    return
        except Exception as error:  # Pillow raises a class for each way in which a file is broken
            raise DataError(
                f"{where} holds an image that cannot be decoded ({first_line(error)}); copy it again."
            ) from error
        raise DataError(
            f"{where} holds an image of {size[0]} x {size[1]} pixels and declares {shape[0]} x {shape[1]}; "
            "fix the one that is wrong."
        )

    with ThreadPoolExecutor(min(_THREADS, max(1, len(files)))) as pool:
        list(pool.map(decode, range(len(files))))
    return out
