"""Other projects' demonstrations, read into one shape and checked: one reader per format.

``import_demonstrations`` is the door; ``FORMATS`` lists what it knows. To add a format, write a
``read_<format>(path, ...) -> Demonstrations`` in a file of its own and enter it in ``FORMATS``.
"""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowpolicy.data.importers.adroit import read_adroit
from flowpolicy.data.importers.d4rl import read_d4rl
from flowpolicy.data.importers.diffusion_policy import read_diffusion_policy
from flowpolicy.data.importers.hdf5 import open_hdf5
from flowpolicy.data.importers.lerobot import read_lerobot
from flowpolicy.data.importers.minari import read_minari
from flowpolicy.data.importers.reshaping import (
    bounded_actions,
    concatenate_keys,
    rename_keys,
    select_keys,
    transform,
)
from flowpolicy.data.importers.robomimic import read_robomimic
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.settings import choose, unknown_key


@dataclass(frozen=True)
class Importer:
    """A format: what it is, how to read it, and how to read it with options.

    Attributes:
        read: ``read(path, **options) -> Demonstrations``; its keyword arguments are the format's options.
        description: one line for people.
    """

    read: Callable[..., Demonstrations]
    description: str

    @property
    def options(self) -> list[str]:
        """Names of the keyword arguments of ``read`` beyond the path."""
        return list(inspect.signature(self.read).parameters)[1:]


FORMATS: dict[str, Importer] = {
    "diffusion_policy": Importer(
        read_diffusion_policy, "Diffusion Policy's zarr replay buffer, folder or zip"
    ),
    "robomimic": Importer(read_robomimic, "robomimic or robosuite HDF5 with data/demo_i groups"),
    "minari": Importer(read_minari, "Minari dataset: its folder, its HDF5 file, or an id"),
    "d4rl": Importer(read_d4rl, "flat HDF5 with observations, actions, terminals, timeouts"),
    "lerobot": Importer(read_lerobot, "LeRobot dataset: its folder (parquet) or a repository id"),
    "adroit": Importer(read_adroit, "pickled Adroit demonstrations, read without running them"),
}


def import_demonstrations(
    source: Path | str,
    format: str = "auto",
    *,
    rename: Mapping[str, str] | None = None,
    concatenate: Mapping[str, Sequence[str]] | None = None,
    demo_transform: str | None = None,
    keys: Iterable[str] | None = None,
    action_bounds: Sequence[float] | None = None,
    out_of_bounds: str = "refuse",
    options: Mapping[str, Any] | None = None,
) -> Demonstrations:
    """Read demonstrations of any known format, bring them to the wanted keys, and check them.

    The steps are, in this order: read, rename, concatenate, transform, select, check.

    Args:
        source: file, folder, or (Minari, LeRobot) dataset id.
        format: a name in ``FORMATS``, or ``auto``.
        rename: old key -> new key.
        concatenate: new key -> keys whose flattened rows, side by side, make it; it replaces them.
        demo_transform: dotted ``module:function`` from a dict of arrays to a dict of arrays, step by step.
        keys: the keys to keep beside ``action``, ``reward`` and the flags of episode ends; None keeps all.
        action_bounds: (low, high) that every action entry must lie in; None takes the source's, if any.
        out_of_bounds: what happens to actions outside: ``refuse`` or ``clip`` (their number is logged).
        options: keyword arguments of the format's reader.

    Raises:
        DataError: whatever is wrong with the data, in one sentence.
        ConfigError: an unknown format or option.
    """
    name = detect_format(source) if format == "auto" else format
    importer = choose(FORMATS, name, "format")
    for option in options or {}:
        if option not in importer.options:
            raise ConfigError(
                unknown_key(f"options.{option}", [f"options.{known}" for known in importer.options])
            )
    demos = importer.read(source, **(options or {}))
    demos.attributes.setdefault("imported_format", name)
    demos = rename_keys(demos, rename or {})
    demos = concatenate_keys(demos, concatenate or {})
    own_bounds = demos.attributes.get("action_bounds") if demo_transform is None else None
    if demo_transform is not None:
        demos = transform(demos, demo_transform)
    if keys is not None:
        demos = select_keys(demos, keys)
    bounds = action_bounds if action_bounds is not None else own_bounds
    return bounded_actions(demos, bounds, out_of_bounds)


def detect_format(source: Path | str) -> str:
    """The name in ``FORMATS`` that fits the file or folder.

    Raises:
        DataError: nothing there, or a format that cannot be told.
    """
    path = resolve_path(source)
    if not path.exists():
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
    return None


def _file_format(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise DataError(f"{path} is empty; copy it again.")
    if head == b"\x89HDF\r\n\x1a\n":
        with open_hdf5(path) as content:
            names = set(content)
        if "data" in names:
            return "robomimic"
        if any(name.startswith("episode_") for name in names):
            return "minari"
        return "d4rl" if "actions" in names else None
    if zipfile.is_zipfile(path) or head.startswith(b"PK"):
        return "diffusion_policy"
    if head[:1] == b"\x80" or path.suffix in (".pickle", ".pkl"):
        return "adroit"
    return None
