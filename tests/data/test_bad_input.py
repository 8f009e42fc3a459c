"""Bad input of every class, in every format it applies to: one sentence, and nothing half-written.

Each entry of ``CASES`` breaks a valid small file in one way. Those that depend on a place in the file are run
at several random, seeded places.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowpolicy.data.importers import FORMATS, import_demonstrations
from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.data.store_writing import check_new
from flowpolicy.errors import DataError, FlowPolicyError

zarr = pytest.importorskip("zarr")
h5py = pytest.importorskip("h5py")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HDF5 = ("robomimic", "minari", "d4rl", "aloha", "maniskill")
EPISODIC = ("robomimic", "minari", "adroit", "lerobot", "aloha", "maniskill")


@dataclass
class Sample:
    """A valid source to be broken: ``path`` is what the user names, ``file`` where the bytes are."""

    format: str
    path: Path
    write: Callable[..., Path]
    episodes: list[dict[str, np.ndarray]]
    rng: np.random.Generator
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        if self.format == "minari":
            return self.path / "data" / "main_data.hdf5"
        if self.format == "lerobot":
            files = sorted((self.path / "data").rglob("*.parquet"))
            return files[1] if len(files) > 1 else self.path
        if self.format == "aloha":
            files = sorted(self.path.glob("*.hdf5"))
            return files[1] if len(files) > 1 else self.path
        return self.path

    def rewrite(self) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.path = self.write(self.format, self.episodes)

    def hdf5(self) -> Any:
        return h5py.File(self.file, "a")

    def zip(self) -> None:
        """Turn a store's folder into a zip of it."""
        packed = shutil.make_archive(str(self.path), "zip", self.path.parent, self.path.name)
        shutil.rmtree(self.path)
        self.path = Path(packed)

    def replace(self, key: str, values: np.ndarray) -> None:
        """Put another array in the place of one of a zarr store."""
        group = zarr.open_group(str(self.path), mode="a", zarr_format=2)
        parent, _, name = key.rpartition("/")
        shutil.rmtree(self.path / key)
        group[parent].create_array(name, shape=values.shape, dtype=values.dtype)[...] = values


Break = Callable[[Sample], None]


@dataclass(frozen=True)
class Case:
    name: str
    formats: tuple[str, ...]
    breaks: Break
    repeats: int = 1
    names: str = ""  # what the sentence must mention, beside or instead of the file


CASES: list[Case] = []


def case(name: str, *formats: str, repeats: int = 1, names: str = "") -> Callable[[Break], Break]:
    def enter(function: Break) -> Break:
        CASES.append(Case(name, formats or tuple(FORMATS), function, repeats, names))
        return function

    return enter


# --- bytes ------------------------------------------------------------------------------------------------


@case("truncated file", *HDF5, "adroit", "lerobot", repeats=6)
def _(s: Sample) -> None:
    content = s.file.read_bytes()
    s.file.write_bytes(content[: int(s.rng.integers(1, len(content)))])


@case("truncated zip", "diffusion_policy", repeats=6)
def _(s: Sample) -> None:
    s.zip()
    content = s.path.read_bytes()
    s.path.write_bytes(content[: int(s.rng.integers(1, len(content)))])


@case("truncated zarr chunk", "diffusion_policy", repeats=4)
def _(s: Sample) -> None:
    chunks = [p for p in sorted((s.path / "data").rglob("*")) if p.is_file() and p.name[0].isdigit()]
    chunk = chunks[int(s.rng.integers(len(chunks)))]
    content = chunk.read_bytes()
    chunk.write_bytes(content[: int(s.rng.integers(0, len(content)))])


@case("truncated zarr chunk in a sound zip", "diffusion_policy", repeats=4)
def _(s: Sample) -> None:
    chunk = s.path / "data" / "action" / "1.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[: int(s.rng.integers(1, len(content)))])
    s.zip()


@case("flipped bytes in a zip", "diffusion_policy", repeats=6)
def _(s: Sample) -> None:
    s.zip()
    with zipfile.ZipFile(s.path) as file:  # inside a member's data, where the zip keeps a checksum
        members = [m for m in file.infolist() if m.file_size > 40]
    member = members[int(s.rng.integers(len(members)))]
    content = bytearray(s.path.read_bytes())
    start = member.header_offset + 30 + len(member.filename.encode())
    content[start + int(s.rng.integers(member.compress_size))] ^= 1 << int(s.rng.integers(8))
    s.path.write_bytes(bytes(content))


@case("flipped byte in a file's signature", *HDF5, "lerobot")
def _(s: Sample) -> None:
    content = bytearray(s.file.read_bytes())
    at = int(s.rng.integers(4))
    content[at - 4 if s.format == "lerobot" else at] ^= 0x10  # parquet is read from its end
    s.file.write_bytes(bytes(content))


@case("empty file", *HDF5, "adroit", "lerobot")
def _(s: Sample) -> None:
    s.file.write_bytes(b"")


@case("empty zip file", "diffusion_policy")
def _(s: Sample) -> None:
    s.zip()
    s.path.write_bytes(b"")


@case("random bytes", *HDF5, "adroit", "lerobot", repeats=4)
def _(s: Sample) -> None:
    s.file.write_bytes(s.rng.bytes(int(s.rng.integers(1, 4000))))


@case("a text file", *HDF5, "adroit", "lerobot")
def _(s: Sample) -> None:
    s.file.write_text("<html>404 not found</html>")


@case("a file of another format", *HDF5, "adroit", "diffusion_policy")
def _(s: Sample) -> None:
    other = s.write("d4rl" if s.format == "adroit" else "adroit")
    if s.path.suffix == ".zarr":
        shutil.rmtree(s.path)
    shutil.copy(other, s.file)


@case("a sibling format", "robomimic", "d4rl")
def _(s: Sample) -> None:
    s.path = s.write("d4rl" if s.format == "robomimic" else "robomimic")


@case("a folder instead of a file", "robomimic", "d4rl", "adroit")
def _(s: Sample) -> None:
    s.path.unlink()
    s.path.mkdir()


@case("an empty folder", "minari", "lerobot", "diffusion_policy")
def _(s: Sample) -> None:
    shutil.rmtree(s.path)
    s.path.mkdir()


@case("a file instead of a folder", "lerobot")
def _(s: Sample) -> None:
    shutil.rmtree(s.path)
    s.path.write_text("x")


@case("nothing there")
def _(s: Sample) -> None:
    s.path = s.path.with_name("missing") / s.path.name


# --- values and shapes ------------------------------------------------------------------------------------


def _put(s: Sample, key: str, value: float) -> None:
    episode = s.episodes[int(s.rng.integers(len(s.episodes)))]
    array = episode[key] = episode[key].astype(np.float64)
    array.reshape(-1)[int(s.rng.integers(array.size))] = value
    s.rewrite()


@case("NaN observation", repeats=2, names="observation")
def _(s: Sample) -> None:
    _put(s, "observation", np.nan)


@case("infinite action", repeats=2, names="action")
def _(s: Sample) -> None:
    _put(s, "action", -np.inf)


@case("NaN reward", *(name for name in FORMATS if name != "aloha"), repeats=2, names="reward")
def _(s: Sample) -> None:
    _put(s, "reward", np.nan)


@case("number beyond float32", "robomimic", "adroit", "d4rl", "diffusion_policy", names="observation")
def _(s: Sample) -> None:
    for episode in s.episodes:
        episode["observation"] = episode["observation"].astype(np.float64)
    s.rewrite()
    if s.format == "robomimic":
        with s.hdf5() as file:
            file["data/demo_1/obs/observation"][2, 0] = 1e200
    else:
        _put(s, "observation", 1e200)


@case("actions of the wrong rank", names="action")
def _(s: Sample) -> None:
    for episode in s.episodes:
        episode["action"] = episode["action"][:, 0]
    s.rewrite()


@case("other shape in one episode", *EPISODIC, names="observation")
def _(s: Sample) -> None:
    s.episodes[1]["observation"] = s.episodes[1]["observation"][:, :2]
    s.rewrite()


@case("rows that do not match", "robomimic", "adroit", "minari", "d4rl", "diffusion_policy", repeats=2)
def _(s: Sample) -> None:
    episode = s.episodes[int(s.rng.integers(3))]
    episode["observation"] = episode["observation"][: -int(s.rng.integers(1, 3))]
    s.rewrite()


@case("an episode without steps", "robomimic", "minari", "adroit")
def _(s: Sample) -> None:
    s.episodes[1] = {key: array[:0] for key, array in s.episodes[1].items()}
    s.rewrite()


@case("no episode at all", "robomimic", "minari")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        for name in list(file["data"] if s.format == "robomimic" else file):
            del (file["data"] if s.format == "robomimic" else file)[name]


@case("no step at all", "d4rl", "diffusion_policy", "lerobot")
def _(s: Sample) -> None:
    s.episodes = [{key: array[:0] for key, array in s.episodes[0].items()}]
    if s.format == "d4rl":
        with s.hdf5() as file:
            for key in list(file):
                values = file[key][:0]
                del file[key]
                file[key] = values
    elif s.format == "diffusion_policy":
        for key in ("data/action", "data/observation", "data/reward"):
            s.replace(key, np.zeros((0, 1), np.float32))
    else:
        s.rewrite()


@case("actions outside the environment's bounds", "minari", names="action")
def _(s: Sample) -> None:
    _put(s, "action", 2.5)


@case("an empty pickled list", "adroit")
def _(s: Sample) -> None:
    s.path.write_bytes(pickle.dumps([]))


# --- keys -------------------------------------------------------------------------------------------------

_ACTION = {
    "d4rl": "actions",
    "robomimic": "data/demo_1/actions",
    "minari": "episode_1/actions",
    "aloha": "action",
    "maniskill": "traj_1/actions",
}
_OBSERVATION = {
    "aloha": "observations/qpos",
    "maniskill": "traj_1/obs",
    "d4rl": "observations",
    "robomimic": "data/demo_1/obs/observation",
    "minari": "episode_1/observations",
}


@case("missing actions", names="action")
def _(s: Sample) -> None:
    if s.format in HDF5:
        with s.hdf5() as file:
            del file[_ACTION[s.format]]
    elif s.format == "diffusion_policy":
        shutil.rmtree(s.path / "data" / "action")
    elif s.format == "adroit":
        content = pickle.loads(s.path.read_bytes())
        del content[1]["actions"]
        s.path.write_bytes(pickle.dumps(content))
    else:
        _columns(s, lambda table: table.drop_columns(["action"]))


@case("missing observations", *HDF5, "adroit", names="observation")
def _(s: Sample) -> None:
    if s.format in HDF5:
        with s.hdf5() as file:
            del file[_OBSERVATION[s.format]]
    else:
        content = pickle.loads(s.path.read_bytes())
        del content[0]["observations"]
        s.path.write_bytes(pickle.dumps(content))


@case("missing data group", "robomimic", "diffusion_policy", names="data")
def _(s: Sample) -> None:
    if s.format == "robomimic":
        with s.hdf5() as file:
            del file["data"]
    else:
        shutil.rmtree(s.path / "data")


@case("missing episode ends", "diffusion_policy", names="episode_ends")
def _(s: Sample) -> None:
    shutil.rmtree(s.path / "meta" / "episode_ends")


@case("missing episode ends in a zip", "diffusion_policy", names="episode_ends")
def _(s: Sample) -> None:
    shutil.rmtree(s.path / "meta")
    s.zip()


@case("text where numbers are expected", *HDF5, names="observation")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        key = _OBSERVATION[s.format]
        rows = len(file[key])
        del file[key]
        file[key] = np.array([b"left"] * rows)


@case("text in a zarr array", "diffusion_policy", names="observation")
def _(s: Sample) -> None:
    s.replace("data/observation", np.array([b"left"] * 21))


@case("an array of objects", "adroit")
def _(s: Sample) -> None:
    content = pickle.loads(s.path.read_bytes())
    content[1]["actions"] = np.array([[1, None]] * 11, dtype=object)
    s.path.write_bytes(pickle.dumps(content))


@case("a structured array", "adroit")
def _(s: Sample) -> None:
    content = pickle.loads(s.path.read_bytes())
    content[1]["actions"] = np.zeros(11, dtype=[("x", "f4"), ("y", "f4")])
    s.path.write_bytes(pickle.dumps(content))


@case("complex numbers", "d4rl", "adroit")
def _(s: Sample) -> None:
    if s.format == "d4rl":
        with s.hdf5() as file:
            del file["observations"]
            file["observations"] = np.zeros((21, 3), np.complex64)
    else:
        s.path.write_bytes(
            pickle.dumps([{"observations": np.zeros((2, 1)), "actions": np.zeros((2, 1), complex)}])
        )


@case("a group where an array is expected", *HDF5, names="action")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        key = _ACTION[s.format]
        del file[key]
        file.create_group(key)["left"] = np.zeros(3)


@case("an array where a group is expected", "robomimic", names="data")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        del file["data"]
        file["data"] = np.zeros(3)


@case("another structure in a pickle", "adroit")
def _(s: Sample) -> None:
    content = pickle.loads(s.path.read_bytes())
    choices = ({"episodes": content}, 3, "text", [1, 2], [{"observations": 1, "actions": 2}])
    s.path.write_bytes(pickle.dumps(choices[int(s.rng.integers(len(choices)))]))


@case("an unknown subset", "robomimic", names="valid")
def _(s: Sample) -> None:
    s.options = {"options": {"filter_key": "valid"}}


@case("a subset naming a missing demonstration", "robomimic", names="demo_9")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        file["mask/odd"] = np.array([b"demo_9"])
    s.options = {"options": {"filter_key": "odd"}}


# --- episode ends -----------------------------------------------------------------------------------------

for _name, _ends in {
    "episode ends that overlap": np.array([6, 17, 12, 21]),
    "an episode end given twice": np.array([6, 6, 21]),
    "a negative episode end": np.array([-3, 6, 21]),
    "an episode ending at step 0": np.array([0, 6, 21]),
    "episode ends past the last step": np.array([6, 17, 25]),
    "episode ends short of the last step": np.array([6, 17]),
    "fractional episode ends": np.array([6.0, 17.0, 21.0]),
    "episode ends in two dimensions": np.array([[6, 17, 21]]),
    "huge unsigned episode ends": np.array([6, 2**64 - 1], dtype=np.uint64),
    "no episode end": np.zeros(0, np.int64),
}.items():
    case(_name, "diffusion_policy", names="episode_ends")(
        lambda s, ends=_ends: s.replace("meta/episode_ends", ends)  # type: ignore[misc]
    )


@case("no flag that ends an episode", "d4rl")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        del file["timeouts"], file["terminals"]


@case("flags other than 0 and 1", "d4rl", names="terminals")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        del file["terminals"]
        file["terminals"] = np.arange(21.0)


# --- layout -----------------------------------------------------------------------------------------------


@case("a missing zarr chunk", "diffusion_policy", repeats=3, names="missing")
def _(s: Sample) -> None:
    chunks = [p for p in sorted((s.path / "data").rglob("*")) if p.is_file() and p.name[0].isdigit()]
    chunks[int(s.rng.integers(len(chunks)))].unlink()


@case("missing array metadata", "diffusion_policy")
def _(s: Sample) -> None:
    (s.path / "meta" / "episode_ends" / ".zarray").unlink()


@case("metadata that is not JSON", "diffusion_policy", "lerobot", "minari", "robomimic", repeats=2)
def _(s: Sample) -> None:
    if s.format == "robomimic":
        with s.hdf5() as file:
            file["data"].attrs["env_args"] = '{"env_name": '
        return
    path = {
        "diffusion_policy": s.path / "data" / "action" / ".zarray",
        "lerobot": s.path / "meta" / "info.json",
        "minari": s.path / "data" / "metadata.json",
    }[s.format]
    path.write_text(path.read_text()[: int(s.rng.integers(1, 30))])


@case("an unknown compressor", "diffusion_policy")
def _(s: Sample) -> None:
    path = s.path / "data" / "action" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), "compressor": {"id": "no-such-codec"}}))


@case("a shape larger than the data", "diffusion_policy")
def _(s: Sample) -> None:
    path = s.path / "data" / "action" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shape": [10**12, 2]}))


@case("zarr chunks that are pickles", "diffusion_policy", repeats=6)
def _(s: Sample) -> None:
    path = s.path / "data" / "action" / ".zarray"
    codec = {"id": "pickle", "protocol": 5}
    where = {"filters": [codec], "compressor": None} if s.rng.integers(2) else {"compressor": codec}
    where["dtype"] = "|O" if s.rng.integers(2) else "<f4"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fill_value": None, **where}))
    for chunk in (s.path / "data" / "action").glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(_Call(os.system, "touch hostile")))


@case("a zip of two stores", "diffusion_policy")
def _(s: Sample) -> None:
    folder = s.path.parent / "two"
    shutil.copytree(s.path, folder / "a.zarr")
    shutil.copytree(s.path, folder / "b.zarr")
    s.path = Path(shutil.make_archive(str(s.path), "zip", folder))


@case("a zip with a name that climbs out", "diffusion_policy", names="..")
def _(s: Sample) -> None:
    s.zip()
    with zipfile.ZipFile(s.path, "a") as file:
        file.writestr("../../outside", "x")


@case("a zip bomb", "diffusion_policy")
def _(s: Sample) -> None:
    s.zip()
    with (
        zipfile.ZipFile(s.path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("data/x/0", "w") as x,
    ):
        for _ in range(300):
            x.write(bytes(1 << 20))


@case("an HDF5 array never written", *HDF5, names="action")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        key = _ACTION[s.format]
        del file[key]
        file.create_dataset(key, shape=(10**12, 2), chunks=(1024, 2), dtype="f4")


@case("HDF5 data in another file", *HDF5, names="action")
def _(s: Sample) -> None:
    (s.path.parent / "secret").write_bytes(bytes(88))
    with s.hdf5() as file:
        key = _ACTION[s.format]
        del file[key]
        file.create_dataset(key, shape=(11, 2), dtype="f4", external=[(str(s.path.parent / "secret"), 0, 88)])


@case("an HDF5 link to another file", *HDF5, names="action")
def _(s: Sample) -> None:
    with s.hdf5() as file:
        key = _ACTION[s.format]
        del file[key]
        file[key] = h5py.ExternalLink("/etc/passwd", "actions")


@case("a dangling HDF5 link", *HDF5)
def _(s: Sample) -> None:
    with s.hdf5() as file:
        key = _ACTION[s.format]
        del file[key]
        file[key] = h5py.SoftLink("/nowhere")


def _columns(s: Sample, change: Callable[[Any], Any]) -> None:
    for file in sorted((s.path / "data").rglob("*.parquet")):
        pq.write_table(change(pq.read_table(file, partitioning=None)), file)


@case("an episode file lost", "lerobot")
def _(s: Sample) -> None:
    s.file.unlink()


@case("steps lost or doubled", "lerobot", repeats=3)
def _(s: Sample) -> None:
    table = pq.read_table(s.file, partitioning=None)
    at = int(s.rng.integers(0, 9))
    first = table.slice(0, at + int(s.rng.integers(2)))
    pq.write_table(pa.concat_tables([first, table.slice(at + (len(first) == at))]), s.file)


@case("missing values", "lerobot", names="next.reward")
def _(s: Sample) -> None:
    table = pq.read_table(s.file, partitioning=None)
    at = table.column_names.index("next.reward")
    values = [None, *table.column("next.reward").to_pylist()[1:]]
    pq.write_table(table.set_column(at, "next.reward", pa.array(values, pa.float32())), s.file)


@case("rows of several lengths", "lerobot", names="action")
def _(s: Sample) -> None:
    table = pq.read_table(s.file, partitioning=None)
    at = table.column_names.index("action")
    values = [[0.0], *table.column("action").to_pylist()[1:]]
    pq.write_table(table.set_column(at, "action", pa.array(values)), s.file)


@case("other columns in one file", "lerobot")
def _(s: Sample) -> None:
    pq.write_table(pq.read_table(s.file, partitioning=None).drop_columns(["next.reward"]), s.file)


@case("counts that do not agree", "lerobot", "minari")
def _(s: Sample) -> None:
    path = s.path / ("meta/info.json" if s.format == "lerobot" else "data/metadata.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "total_episodes": 7}))


# --- hostile pickles --------------------------------------------------------------------------------------


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _global(module: str, name: str, argument: str) -> bytes:
    return (
        b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
        + b"\x93\x8c"
        + bytes([len(argument)])
        + argument.encode()
        + b"\x85R."
    )


_MARK = "touch hostile"
for _name, _content in {
    "pickle calling os.system": pickle.dumps(_Call(os.system, _MARK)),
    "pickle calling eval": pickle.dumps(_Call(eval, "__import__('os').system('touch hostile')")),
    "pickle calling subprocess": pickle.dumps(_Call(subprocess.check_output, ["touch", "hostile"])),
    "pickle of a path": pickle.dumps([Path("hostile")]),
    "pickle with a dotted name": _global("numpy", "ndarray.__class__.mro", "x"),
    "pickle reaching os through numpy": _global("numpy.lib._datasource", "os.system", _MARK),
    "pickle of numpy's own loader": _global("numpy", "load", "hostile"),
    "pickle of numpy's exec": _global("numpy.testing._private.utils", "runstring", _MARK),
    "pickle calling getattr": _global("builtins", "getattr", "x"),
    "pickle of a torch storage": _global("torch._utils", "_rebuild_tensor_v2", "x"),
    "pickle of a class of the user's": _global("flowpolicy.data.store", "Demonstrations", "x"),
    "pickle altering a function": b"\x80\x03c_codecs\nencode\n}X\x04\x00\x00\x00evilK\x01sb.",
    "pickle with a persistent id": b"\x80\x03X\x01\x00\x00\x00xQ.",
    "pickle of an array subclass": (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85C\x01b\x87R."
    ),
    "pickle of an array without content": (
        b"\x80\x03]cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87Ra."
    ),
    "pickle with a huge memo": b"\x80\x03]r\xff\xff\xff\x4f.",
    "pickle containing itself": b"\x80\x03]q\x00h\x00a.",
    "pickle of a huge array": pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
    "pickle cut inside a call": pickle.dumps(_Call(os.system, _MARK))[:-3],
}.items():
    case(_name, "adroit")(lambda s, content=_content: s.path.write_bytes(content) and None)  # type: ignore[misc]


@case("pickle that unfolds without end", "adroit")
def _(s: Sample) -> None:
    value: Any = [0]
    for _ in range(40):
        value = [value] * 10
    s.path.write_bytes(pickle.dumps(value))


# --- requests ---------------------------------------------------------------------------------------------


def _request(name: str, *, names: str = "", **options: Any) -> None:
    case(name, "diffusion_policy", "adroit", names=names)(lambda s: s.options.update(options))


def _raising(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    raise RuntimeError("first line\nsecond line")


_transforms = types.ModuleType("bad_transforms")
_transforms.raising = _raising  # type: ignore[attr-defined]
_transforms.junk = lambda arrays: 3  # type: ignore[attr-defined]
_transforms.shorter = lambda arrays: {**arrays, "action": arrays["action"][1:]}  # type: ignore[attr-defined]
_transforms.key = lambda arrays: {"action": arrays["no_such_key"]}  # type: ignore[attr-defined]

_request("unknown format", names="format", format="zarrr")
_request("unknown option", names="options.filter", options={"filter": 1})
_request("renaming a key that is not there", names="stat", rename={"stat": "observation"})
_request("renaming onto another key", names="reward", rename={"observation": "reward"})
_request("concatenating a key that is not there", names="goal", concatenate={"observation": ["goal"]})
_request("concatenating nothing", names="concatenate", concatenate={"observation": []})
_request("keeping a key that is not there", names="goal", keys=["goal"])
_request("bounds upside down", names="action_bounds", action_bounds=[1, -1])
_request("bounds narrower than the actions", names="action", action_bounds=[-0.01, 0.01])
_request("transform of a missing module", names="no_such", demo_transform="no_such:function")
_request("transform without a function", names="numpy", demo_transform="numpy")
_request("transform that raises", names="raising", demo_transform="bad_transforms:raising")
_request("transform that returns no arrays", names="junk", demo_transform="bad_transforms:junk")
_request("transform that loses a step", names="action", demo_transform="bad_transforms:shorter")
_request("transform for other data", names="no_such_key", demo_transform="bad_transforms:key")


# --- the tests --------------------------------------------------------------------------------------------


def assert_one_sentence(sentence: str, *mentions: str) -> None:
    assert "\n" not in sentence
    assert sentence[-1] in ".?", sentence
    assert not re.search(r"[.!?] [A-Z]", sentence), sentence
    assert 20 < len(sentence) < 500, sentence
    assert any(mention in sentence for mention in mentions), (mentions, sentence)


def import_into(source: Path, out: Path, **options: Any) -> None:
    """What ``scripts/import_demos.py`` does."""
    check_new(out)
    write_demonstrations(out, import_demonstrations(source, **options))


RUNS = [(c, f, i) for c in CASES for f in c.formats for i in range(c.repeats)]


@pytest.mark.parametrize(("bad", "format", "seed"), RUNS, ids=[f"{c.name}-{f}-{i}" for c, f, i in RUNS])
def test_refused_in_one_sentence(
    bad: Case, format: str, seed: int, write_sample, episodes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "bad_transforms", _transforms)
    rng = np.random.default_rng([seed, len(bad.name)])
    sample = Sample(format, write_sample(format), write_sample, episodes, rng)
    bad.breaks(sample)
    out = tmp_path / "out" / "store.zarr"
    with pytest.raises(FlowPolicyError) as refusal:
        import_into(sample.path, out, **{"format": format, **sample.options})
    mentions = (
        [bad.names] if bad.names else [sample.path.name, sample.file.name if sample.path.exists() else ""]
    )
    if format == "maniskill" and bad.names == "observation":
        mentions.append("obs'")  # what that format calls it
    assert_one_sentence(str(refusal.value), *filter(None, mentions))
    assert not out.parent.exists(), "something was written"
    assert not (tmp_path / "hostile").exists(), "the file's code ran"


def test_at_least_thirty_classes(capsys):
    names = {entry.name for entry in CASES}
    with capsys.disabled():
        print(f"\n{len(names)} classes of bad input, {len(RUNS)} files")
    assert len(names) == len(CASES) >= 30


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_byte_is_refused_or_harmless(format: str, seed: int, write_sample, episodes):
    """Formats without checksums cannot notice every flip; then what comes out is still well-formed."""
    sample = Sample(format, write_sample(format), write_sample, episodes, np.random.default_rng(seed))
    files = (
        [p for p in sorted(sample.path.rglob("*")) if p.is_file()] if sample.path.is_dir() else [sample.path]
    )
    file = files[seed % len(files)]
    content = bytearray(file.read_bytes())
    content[int(sample.rng.integers(len(content)))] ^= 1 << int(sample.rng.integers(8))
    file.write_bytes(bytes(content))
    try:
        demos = import_demonstrations(sample.path, format)
    except FlowPolicyError as refusal:
        assert_one_sentence(str(refusal), sample.path.name, file.name)
    else:
        assert all(np.isfinite(array).all() for array in demos.arrays.values() if array.dtype.kind == "f")
        assert demos.episode_ends[-1] == len(demos.arrays["action"])


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
def test_bad_places_to_write(tmp_path: Path, demos: Demonstrations, name: str, monkeypatch):
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.iterdir())
    for out in (tmp_path / "file" / name, Path("/proc/nowhere") / name):
        with pytest.raises(FlowPolicyError) as refusal:
            write_demonstrations(out, demos)
        assert_one_sentence(str(refusal.value), name)
    with pytest.raises(DataError) as refusal:
        write_demonstrations(tmp_path / name, demos, zarr_format=4)
    assert_one_sentence(str(refusal.value), "zarr_format")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="exists already"):
        write_demonstrations(tmp_path / "link", demos)
    (tmp_path / "link").unlink()

    def full(path: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flowpolicy.files.storage._sync", full)
    with pytest.raises(FlowPolicyError) as refusal:
        write_demonstrations(tmp_path / name, demos)
    assert_one_sentence(str(refusal.value), name)
    assert sorted(tmp_path.iterdir()) == before


def test_a_store_is_judged_again_when_it_is_read(tmp_path: Path, demos: Demonstrations):
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    zarr.open_group(str(path), mode="a")["data/goal"][3, 0, 0] = np.nan
    with pytest.raises(DataError, match="'goal' is not finite at step 3 "):
        read_demonstrations(path)
