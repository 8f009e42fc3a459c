"""Why a file could not be read: the cause that the system or a library gave, as one sentence."""

from __future__ import annotations

import errno
from pathlib import Path

from flowpolicy.errors import DataError, FlowPolicyError

_LOCKED = ("unable to lock file", "unable to synchronously open file (file is already open")


def reading_error(
    error: BaseException, path: Path | str, what: str = "", remedy: str = "copy it again"
) -> FlowPolicyError:
    """The error to raise for ``error``, which reading ``path`` met.

    Args:
        error: what the system, h5py, pyarrow, zarr or another library raised.
        path: the file.
        what: the part of it, or what is wrong in general, for a cause that the system does not name.
        remedy: ends the sentence in that case.
    """
    if isinstance(error, FlowPolicyError):
        return error
    code = getattr(error, "errno", None) or _code_in(str(error))
    text = str(error).lower()
    if isinstance(error, MemoryError) or code == errno.ENOMEM or _is_allocation(error, text):
        return DataError(
            f"{path} needs more memory than there is; choose fewer keys, or use a machine with more."
        )
    if any(sign in text for sign in _LOCKED) or code in (errno.EAGAIN, errno.EDEADLK):
        return DataError(
            f"{path} is locked by another program that writes it; wait for it to end, or copy the file first."
        )
    if isinstance(error, PermissionError) or code in (errno.EACCES, errno.EPERM):
        return DataError(f"{path} may not be read by this user; change its permissions (chmod u+r).")
    if isinstance(error, FileNotFoundError) or code == errno.ENOENT:
        return DataError(f"There is no file {path}; check the path.")
    if code in (errno.EMFILE, errno.ENFILE):
        return DataError(f"{path} cannot be opened, since too many files are; raise the limit (ulimit -n).")
    if code in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO):
        return DataError(
            f"{path} cannot be read: the disk or the network behind it fails ({first_line(error)}); "
            "try again."
        )
    damage = what or "is damaged or of another format"
    return DataError(f"{path} {damage} ({first_line(error)}); {remedy}.")


def first_line(error: BaseException, limit: int = 160) -> str:
    """The gist of another library's error, its first sentence, to stand in brackets inside another one."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip().partition(". ")[0].rstrip(".:") if lines else ""
    text = text or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _code_in(text: str) -> int | None:
    """The number in h5py's ``..., errno = 13, ...``."""
    _, found, rest = text.partition("errno = ")
    digits = rest.partition(",")[0].strip()
    return int(digits) if found and digits.isdigit() else None


def _is_allocation(error: BaseException, text: str) -> bool:
    return type(error).__name__ in ("ArrowMemoryError", "_ArrayMemoryError") or "unable to allocate" in text
