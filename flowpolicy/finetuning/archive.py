"""Zip archives that may come from a stranger: what we do not write is not opened, and no bomb unpacked."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from flowpolicy.errors import CheckpointError
from flowpolicy.files.reading import MOST_JSON, open_regular

_MOST_INFLATED = 10  # times its packed size; save() does not pack, and weights hardly shrink
_MOST_DIRECTORY = 4096  # bytes of an archive's table of contents, which has two entries


@contextlib.contextmanager
def archive_of(source: Path | IO[bytes], names: Collection[str]) -> Iterator[zipfile.ZipFile]:
    """The file or stream as an archive of exactly the members ``names``, of plausible sizes.

    Raises:
        CheckpointError: it is something else, or turns out to be damaged in the block.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_regular(source)) if isinstance(source, Path) else source
        try:
            _check_directory(stream, source)
            archive = stack.enter_context(zipfile.ZipFile(stream))
            members = archive.infolist()
            if sorted(info.filename for info in members) != sorted(names):
                raise no_model(source)
            for info in members:
                if info.flag_bits & 1:
                    raise CheckpointError(f"{source} is encrypted; unpack it and give it without a password.")
                is_known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                if not is_known or info.file_size > _MOST_INFLATED * info.compress_size + MOST_JSON:
                    raise CheckpointError(
                        f"{source} unpacks to far more than save() writes, or is packed in another way; give "
                        "the file that save() wrote."
                    )
            yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise no_model(source) from error


def no_model(source: object) -> CheckpointError:
    """The refusal of a file that is no archive of ours."""
    return CheckpointError(
        f"{source} is no ReinFlow model, or a damaged one; give the file that save() wrote."
    )


def _check_directory(stream: IO[bytes], source: object) -> None:
    """Refuse an archive with a large table of contents: zipfile reads all of it at once."""
    end = stream.seek(0, 2)
    stream.seek(max(0, end - 65_557))  # a comment may follow the table's end
    tail = stream.read()
    start = tail.rfind(b"PK\5\6")
    if start < 0 or int.from_bytes(tail[start + 12 : start + 16], "little") > _MOST_DIRECTORY:
        raise no_model(source)
    stream.seek(0)
