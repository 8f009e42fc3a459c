"""Files and folders that appear whole or not at all, whatever kills the process or fills the disk."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from flowpolicy.errors import FlowPolicyError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that becomes ``path`` when the block ends without error.

    An existing ``path`` is swapped out in one system call where the platform has one (Linux), so that a
    reader finds the old folder or the new one and never neither. On any error the temporary folder is
    removed and ``path`` is left as it was. One writer at a time: what an earlier, killed one left is removed.

    Raises:
        FlowPolicyError: when the disk is full or the place is not writable.
    """
    path = Path(path)
    with _beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        _swap_in(temporary, path)


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces ``path`` when the block ends without error.

    The temporary name keeps the suffix of ``path``, since writers choose a format by it. One writer at a
    time: what an earlier, killed one left is removed.
    """
    path = Path(path)
    with _beside(path) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A free name beside ``path``; whatever still has it after the block is removed."""
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{glob.escape(path.stem)}.tmp-*{glob.escape(path.suffix)}"):
            _remove(stale)  # left by a writer that was killed
        yield temporary
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; a full disk is the OSError that it is and not the library's own exception."""
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(stored, str(path), metadata=metadata)
    except SafetensorError as error:
        is_full = "No space" in str(error)
        raise OSError(errno.ENOSPC if is_full else errno.EIO, str(error)) from error


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named ``prefix.<rest>``, by ``<rest>``."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's moments by name, for a safetensors file; its settings are not among them."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{name}": value for i, moments in state.items() for name, value in moments.items()}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the moments of :func:`optimizer_tensors`, without their prefix, into an optimiser of Adam's kind.

    Raises:
        ValueError: moments of a parameter that there is not, or that are missing, negative or misshapen.
    """
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {str(index): index for index in range(len(parameters))}
    for name, tensor in tensors.items():
        text, _, moment = name.partition(".")
        if text not in numbers or moment not in _MOMENTS:
            raise ValueError(f"no moment of a parameter is called '{name[:80]}'")
        index = numbers[text]
        parameter = parameters[index]
        if tensor.shape != (() if moment == "step" else parameter.shape) or not tensor.is_floating_point():
            raise ValueError(f"moment '{name}' has another shape or type than its parameter")
        if moment != "exp_avg" and not (tensor >= 0).all():
            raise ValueError(f"moment '{name}' is negative")
        if moment != "step":
            # A fused optimiser walks through memory: a moment has to lie there as its parameter does.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        state.setdefault(index, {})[moment] = tensor
    if not all(moments.keys() == _MOMENTS for moments in state.values()):
        raise ValueError("a parameter lacks one of its moments")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write_json(path: Path | str, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON, atomically; non-finite numbers become null, as JSON has none."""
    text = json.dumps(_json_ready(content), indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_table(columns: Mapping[str, Any], path: Path | str) -> Path:
    """Write arrays of one length as a CSV file, atomically, a column each."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    return Path(path)


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _json_ready(value.tolist())
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _swap_in(temporary: Path, path: Path) -> None:
    """Put ``temporary`` in the place of ``path``; afterwards ``temporary`` holds the old content, if any."""
    if not path.exists():
        temporary.rename(path)
        return
    if not path.is_dir():
        raise FlowPolicyError(f"{path} is a file where a folder is to be written; choose another path.")
    if sys.platform.startswith("linux"):
        exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if exchange is not None:
            names = os.fsencode(temporary), os.fsencode(path)
            if exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
                return
    # No atomic exchange here: two renames, the old folder kept until the new one stands.
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file, or every file of a folder and the folder itself, to the disk."""
    _flush([path, *path.rglob("*")] if path.is_dir() else [path])


def sync_since(folder: Path, moment_ns: int) -> int:
    """Flush what was written in a folder at ``moment_ns`` or later to the disk; the moment to go on from."""
    now = time.time_ns() - int(1e9)  # file systems stamp coarsely
    _flush([item for item in (folder, *folder.rglob("*")) if item.stat().st_mtime_ns >= moment_ns])
    return now


def _flush(targets: Iterable[Path]) -> None:
    for target in targets:
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync on folders
                raise
        finally:
            os.close(descriptor)


def _explained(error: OSError, path: Path) -> FlowPolicyError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FlowPolicyError(
            f"The disk is full: {path} was not written and what stood there before is intact."
        )
    return FlowPolicyError(f"{path} cannot be written ({error.strerror or error}); choose a writable place.")
