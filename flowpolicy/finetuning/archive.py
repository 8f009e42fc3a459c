"""Zip archives that may come from a stranger: what we do not write is not opened, and no bomb unpacked."""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load, save
from torch import Tensor

from flowpolicy.errors import CheckpointError, FlowPolicyError
from flowpolicy.files.reading import MOST_JSON, StoredTensors, described_tensors, open_regular, parse_json
from flowpolicy.files.storage import atomic_file
from flowpolicy.settings import shown

FORMAT_VERSION = 1
CONFIG, TENSORS = "config.json", "model.safetensors"

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
    return CheckpointError(f"{source} is no saved model, or a damaged one; give the file that save() wrote.")


def write_archive(
    path: str | Path | IO[bytes], content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a model's description and tensors; a file appears whole or not at all."""
    if isinstance(path, (str, Path)):
        with atomic_file(with_suffix(path)) as temporary, temporary.open("wb") as stream:
            write_archive(stream, content, tensors)
        return
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(CONFIG, json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2) + "\n")
        archive.writestr(TENSORS, save(stored))


@contextlib.contextmanager
def read_archive(
    path: str | Path | IO[bytes], algorithm: str
) -> Iterator[tuple[dict[str, Any], StoredTensors]]:
    """The description of a model that ``algorithm`` saved, and its tensors, which are not read yet.

    Raises:
        CheckpointError: no such file, a damaged one, or one of something else.
    """
    source: Any = path
    if isinstance(path, (str, Path)):
        source = Path(path) if Path(path).exists() else with_suffix(path)
        if not source.exists():
            raise CheckpointError(f"There is no model at {source}; give the file that save() wrote.")
    with archive_of(source, {CONFIG, TENSORS}) as archive:
        if archive.getinfo(CONFIG).file_size > MOST_JSON:
            raise no_model(path)
        content = parse_json(
            archive.read(CONFIG), f"{CONFIG} of {path}", "model", "give the file that save() wrote"
        )
        version, found = content.pop("format_version", None), content.get("algorithm")
        if type(version) is not int:
            raise no_model(path)
        if found != algorithm or version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} is of {shown(found)} in format {version}, and this flowpolicy reads {algorithm} "
                f"up to {FORMAT_VERSION}; upgrade with: pip install -U flowpolicy."
            )
        info = archive.getinfo(TENSORS)
        with archive.open(info) as stream:
            stored = described_tensors(
                stream, info.file_size, str(path), lambda: dict(load(archive.read(info)))
            )
        yield content, stored


@contextlib.contextmanager
def taking_over(path: object) -> Iterator[None]:
    """Say in one sentence that tensors do not fit the model that their own file describes."""
    try:
        yield
    except FlowPolicyError:
        raise
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds tensors that do not fit its own config; the file is damaged."
        ) from error


def with_suffix(path: str | Path) -> Path:
    """``path``, with ``.zip`` where it has no suffix."""
    path = Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.zip")


def _check_directory(stream: IO[bytes], source: object) -> None:
    """Refuse an archive with a large table of contents: zipfile reads all of it at once."""
    end = stream.seek(0, 2)
    stream.seek(max(0, end - 65_557))  # a comment may follow the table's end
    tail = stream.read()
    start = tail.rfind(b"PK\5\6")
    if start < 0 or int.from_bytes(tail[start + 12 : start + 16], "little") > _MOST_DIRECTORY:
        raise no_model(source)
    stream.seek(0)
