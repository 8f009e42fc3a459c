"""Other projects' demonstrations, brought into a store: list, choose, read only that, check, write.

``import_demonstrations`` gives them in memory, ``import_to_store`` writes them block by block; ``FORMATS``
lists what is known. A format is one small file: it lists the columns that a source declares and reads blocks
of those that were chosen (:class:`flowpolicy.data.importers.source.Source`). Choosing, checking and writing
stand once, in ``choosing``, ``columns`` and ``pipeline``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from flowpolicy.data.causes import reading_error
from flowpolicy.data.importers.adroit import open_adroit
from flowpolicy.data.importers.aloha import open_aloha
from flowpolicy.data.importers.choosing import Choice
from flowpolicy.data.importers.d4rl import open_d4rl
from flowpolicy.data.importers.diffusion_policy import open_diffusion_policy
from flowpolicy.data.importers.hdf5 import is_group, open_hdf5
from flowpolicy.data.importers.lerobot import open_lerobot
from flowpolicy.data.importers.maniskill import open_maniskill
from flowpolicy.data.importers.minari import open_minari
from flowpolicy.data.importers.pipeline import Checks, Import, import_whole, transformed
from flowpolicy.data.importers.robomimic import open_robomimic
from flowpolicy.data.importers.source import Source
from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.data.store_writing import check_new, store_writer
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.settings import choose, unknown_key


@dataclass(frozen=True)
class Importer:
    """A format: what it is, how to open it, and with which options.

    Attributes:
        open: ``open(path, **options)`` gives a source in a ``with`` statement; its keyword arguments are the
            format's options.
        description: one line for people.
    """

    open: Callable[..., AbstractContextManager[Source]]
    description: str

    @property
    def options(self) -> list[str]:
        """Names of the keyword arguments of ``open`` beyond the path."""
        return list(inspect.signature(self.open).parameters)[1:]


FORMATS: dict[str, Importer] = {
    "diffusion_policy": Importer(
        open_diffusion_policy, "Diffusion Policy's zarr replay buffer, folder or zip"
    ),
    "robomimic": Importer(open_robomimic, "robomimic, robosuite or Isaac Lab HDF5 with data/demo_i groups"),
    "minari": Importer(open_minari, "Minari dataset: its folder, its HDF5 file, or an id"),
    "d4rl": Importer(open_d4rl, "flat HDF5 with observations, actions, terminals, timeouts"),
    "lerobot": Importer(open_lerobot, "LeRobot dataset: its folder (parquet) or a repository id"),
    "adroit": Importer(open_adroit, "pickled Adroit demonstrations, read without running them"),
    "aloha": Importer(open_aloha, "ALOHA or ACT: a folder of episode_<i>.hdf5, or one of them"),
    "maniskill": Importer(open_maniskill, "ManiSkill HDF5 with traj_i groups"),
}


def import_demonstrations(
    source: Path | str,
    format: str = "auto",
    *,
    rename: Mapping[str, str] | None = None,
    concatenate: Mapping[str, Sequence[str]] | None = None,
    action: str | Sequence[str] | None = None,
    kinds: Mapping[str, Any] | None = None,
    demo_transform: str | None = None,
    keys: Iterable[str] | None = None,
    action_bounds: Sequence[Any] | None = None,
    out_of_bounds: str = "refuse",
    allow_gaps: bool = False,
    continuous_quaternions: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Demonstrations:
    """Read demonstrations of any known format into memory, brought to the wanted keys, and check them.

    Columns go by their key or by the source's own, full name (``obs/object``, ``observation.state``). The
    steps are: list, rename, concatenate, choose, read, check; with a transform: list, rename, concatenate,
    read, transform, choose, check. What is not chosen is not read.

    Args:
        source: file, folder, or (Minari, LeRobot) dataset id.
        format: a name in ``FORMATS``, or ``auto``.
        rename: column -> new key.
        concatenate: new key -> columns whose flattened rows, side by side, make it; it replaces them.
        action: the column, or columns side by side, that make the action; None is the format's own.
        kinds: column -> kind (``image``, ``vector``, ``depth``, ``pose``, ...), where the source does not
            declare what it holds.
        demo_transform: dotted ``module:function`` from a dict of arrays to a dict of arrays, step by step.
        keys: the keys to keep beside ``action``, ``reward`` and the flags of episode ends; None: what the
            format takes by itself.
        action_bounds: (low, high), numbers or one for each dimension, that every action entry must lie in;
            None takes the source's, if any.
        out_of_bounds: what happens to actions outside: ``refuse`` or ``clip`` (their number is logged).
        allow_gaps: take episodes in which the times of the steps show a gap, with a warning.
        continuous_quaternions: undo changes between q and -q inside an episode.
        options: keyword arguments of the format's reader.

    Raises:
        DataError: whatever is wrong with the data, in one sentence.
        ConfigError: an unknown format or option.
    """
    request: Request = {
        "rename": rename, "concatenate": concatenate, "action": action, "kinds": kinds, "keys": keys,
        "action_bounds": action_bounds, "out_of_bounds": out_of_bounds, "allow_gaps": allow_gaps,
        "continuous_quaternions": continuous_quaternions,
    }  # fmt: skip
    choice, checks = _choice(request), _checks(request)
    with _opened(source, format, options) as opened:
        if demo_transform is None:
            return import_whole(opened, choice, checks, Import.in_memory)
        if not opened.clip:
            opened.bounds = None  # they are those of the action before the transform
        everything = dataclasses.replace(choice, keys=None)
        unbounded = dataclasses.replace(checks, action_bounds=None, out_of_bounds="refuse")
        demos = import_whole(opened, everything, unbounded, Import.in_memory)
    return transformed(demos, demo_transform, choice.keys, checks)


class Request(TypedDict, total=False):
    """The keyword arguments that :func:`import_demonstrations` describes."""

    rename: Mapping[str, str] | None
    concatenate: Mapping[str, Sequence[str]] | None
    action: str | Sequence[str] | None
    kinds: Mapping[str, Any] | None
    demo_transform: str | None
    keys: Iterable[str] | None
    action_bounds: Sequence[Any] | None
    out_of_bounds: str
    allow_gaps: bool
    continuous_quaternions: bool
    options: Mapping[str, Any] | None


def import_to_store(
    source: Path | str,
    out: Path | str,
    format: str = "auto",
    *,
    attributes: Mapping[str, Any] | None = None,
    zarr_format: int = 2,
    image_codec: str = "zstd",
    **request: Unpack[Request],
) -> Path:
    """Like :func:`import_demonstrations`, into a store, a block of rows at a time; returns its path.

    A ``demo_transform`` is given whole arrays, so that with one everything is held in memory.

    Args:
        source: file, folder, or (Minari, LeRobot) dataset id.
        out: the new store, a folder or a zip.
        format: a name in ``FORMATS``, or ``auto``.
        attributes: kept in the store beside those of the source.
        zarr_format: 2 or 3.
        image_codec: ``zstd`` or ``jpeg2000``.
        request: the other arguments of :func:`import_demonstrations`.

    Raises:
        FlowPolicyError: as there, or where the store cannot be written; nothing half-written stays behind.
    """
    path = check_new(out)
    writing: dict[str, Any] = {"zarr_format": zarr_format, "image_codec": image_codec}
    if request.get("demo_transform") is not None:
        demos = import_demonstrations(source, format, **request)
        return write_demonstrations(path, demos, attributes=attributes, **writing)

    def write(chosen: Import) -> None:
        with store_writer(path, chosen.num_steps, **writing) as writer:
            writer.attributes.update(chosen.attributes)
            for rows in chosen.blocks():
                writer.append(rows)
            writer.attributes.update({**chosen.attributes, **(attributes or {})})
            writer.finish(chosen.episode_ends)

    with _opened(source, format, request.get("options")) as opened:
        import_whole(opened, _choice(request), _checks(request), write)
    return path


def _choice(request: Request) -> Choice:
    keys = request.get("keys")
    return Choice(
        request.get("rename") or {},
        request.get("concatenate") or {},
        None if keys is None else list(keys),
        request.get("action"),
        request.get("kinds") or {},
    )


def _checks(request: Request) -> Checks:
    return Checks(
        request.get("action_bounds"),
        request.get("out_of_bounds", "refuse"),
        request.get("allow_gaps", False),
        request.get("continuous_quaternions", False),
    )


@contextlib.contextmanager
def _opened(source: Path | str, format: str, options: Mapping[str, Any] | None) -> Iterator[Source]:
    path = resolve_path(source)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is no ordinary file; give a file or a folder.")
    name = detect_format(source) if format == "auto" else format
    importer = choose(FORMATS, name, "format")
    for option in options or {}:
        if option not in importer.options:
            raise ConfigError(
                unknown_key(f"options.{option}", [f"options.{known}" for known in importer.options])
            )
    with importer.open(source, **(options or {})) as opened:
        opened.attributes.setdefault("imported_format", name)
        yield opened


def detect_format(source: Path | str) -> str:
    """The name in ``FORMATS`` that fits the file or folder.

    Raises:
        DataError: nothing there, or a format that cannot be told.
    """
    path = resolve_path(source)
    try:
        is_there = path.exists()
    except OSError as error:
        raise reading_error(error, path, "cannot be looked at") from error
    if not is_there:
        raise DataError(
            f"There is nothing at {source}; check the path, or say format=minari or lerobot for an id."
        )
    found = _folder_format(path) if path.is_dir() else _file_format(path)
    if found is None:
        raise DataError(
            f"{path} is of no format known here; say which of {', '.join(FORMATS)} it is with format=...."
        )
    return found


def _folder_format(path: Path) -> str | None:
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if (path / "data" / "main_data.hdf5").is_file() or (path / "main_data.hdf5").is_file():
        return "minari"
    if any((path / name).exists() for name in (".zgroup", "zarr.json", "meta/episode_ends")):
        return "diffusion_policy"
    if any(path.glob("episode_*.hdf5")):
        return "aloha"
    return None


def _file_format(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise reading_error(error, path, "cannot be read") from error
    if not head:
        raise DataError(f"{path} is empty; copy it again.")
    if head == b"\x89HDF\r\n\x1a\n":
        with open_hdf5(path) as content:
            names = set(content)
            is_nested = "observations" in names and is_group(content["observations"])
        if "data" in names:
            return "robomimic"
        if any(name.startswith("traj_") for name in names):
            return "maniskill"
        if "action" in names and is_nested:
            return "aloha"
        if any(name.startswith("episode_") for name in names):
            return "minari"
        return "d4rl" if "actions" in names else None
    if zipfile.is_zipfile(path) or head.startswith(b"PK"):
        return "diffusion_policy"
    if head[:1] == b"\x80" or path.suffix in (".pickle", ".pkl"):
        return "adroit"
    return None
