"""Mutated files of every importable format: ``python tests/data/importer_fuzzing.py --files 300``.

A mutation is a pure function from a file's bytes and a generator to other bytes. Each mutated file is
imported in a process of its own, which must end with an import of sane values or with one sentence, within a
time and a memory limit.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import pickle
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import lerobot_samples
from importer_samples import WRITERS, make_episodes

from flowpolicy.data.importers import FORMATS, import_demonstrations
from flowpolicy.errors import FlowPolicyError

Mutation = Callable[[bytes, np.random.Generator], bytes]
SECONDS, MEGABYTES = 2.0, 350
"""Of one file: CPU time, and memory beyond the libraries, which take 200 MB."""
_HANG_SECONDS = 20.0
_HDF5, _PARQUET = b"\x89HDF", b"PAR1"

_ENDS = [struct.pack("<q", value) for value in (0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, -(2**63))]
_ENDS += [struct.pack("<d", value) for value in (np.nan, np.inf, -np.inf, 1e308, -0.0, 5e-324)]
_ENDS += [struct.pack("<f", value) for value in (np.nan, np.inf, 3.4e38)]
_VALUES: list[Any] = [
    None, True, False, "", "text", "../../etc/passwd", [], {}, [[]], {"a": {}}, 0, -1, 1, 2**31, 2**63,
    10**30,
    0.5, 1e308, float("nan"), float("inf"), "<f4", "|O", "\ud800", "x" * 100_000,
]  # fmt: skip


def flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bits turned over."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def truncate(content: bytes, rng: np.random.Generator) -> bytes:
    """The beginning alone."""
    return content[: int(rng.integers(len(content)))]


def range_ends(content: bytes, rng: np.random.Generator) -> bytes:
    """Numbers at the ends of their ranges in the place of some bytes."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        end = _ENDS[int(rng.integers(len(_ENDS)))]
        at = int(rng.integers(max(1, len(changed) - len(end)))) // 4 * 4
        changed[at : at + len(end)] = end
    return bytes(changed)


def move_part(content: bytes, rng: np.random.Generator) -> bytes:
    """A stretch taken out, doubled, zeroed, or replaced by noise."""
    start, until = sorted(int(i) for i in rng.integers(len(content), size=2))
    until = min(until, start + 512)
    part = content[start:until]
    replacement = [b"", part + part, bytes(len(part)), rng.bytes(len(part))][int(rng.integers(4))]
    return content[:start] + replacement + content[until:]


def grow(content: bytes, rng: np.random.Generator) -> bytes:
    """Something behind the end."""
    return content + [bytes(100_000), rng.bytes(1000), content][int(rng.integers(3))]


def swap_values(content: bytes, rng: np.random.Generator) -> bytes:
    """JSON, HDF5, parquet or a pickle in which one value or array has another type, size or range."""
    if content.startswith(_HDF5):
        return _with_hdf5(content, rng, _swap_dataset)
    if content.startswith(_PARQUET):
        return _swap_column(content, rng)
    try:
        root = pickle.loads(content) if content.startswith(b"\x80") else json.loads(content)
    except ValueError:
        return flip_bits(content, rng)
    places: list[tuple[Any, Any]] = []
    _collect(root, places)
    if places:
        node, key = places[int(rng.integers(len(places)))]
        choices = [*_VALUES, *_arrays(5)] if content.startswith(b"\x80") else _VALUES
        node[key] = choices[int(rng.integers(len(choices)))]
    return pickle.dumps(root) if content.startswith(b"\x80") else json.dumps(root).encode()


def nest(content: bytes, rng: np.random.Generator) -> bytes:
    """JSON, HDF5 or a pickle in which one value is a very deep one; other bytes stay."""
    depth = int(rng.integers(50, 100_000))
    if content.startswith(_HDF5):
        return _with_hdf5(content, rng, _nest_group)
    if content.startswith(b"\x80"):
        return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."
    try:
        root = json.loads(content)
    except ValueError:
        return move_part(content, rng)
    places: list[tuple[Any, Any]] = []
    _collect(root, places)
    if not places:
        return content
    node, key = places[int(rng.integers(len(places)))]
    node[key] = "@deep@"
    return json.dumps(root).replace('"@deep@"', "[" * depth + "]" * depth).encode()


def _with_hdf5(content: bytes, rng: np.random.Generator, change: Callable[..., None]) -> bytes:
    import h5py

    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, node: names.append(name) if hasattr(node, "dtype") else None)
        change(file, names[int(rng.integers(len(names)))], rng)
    return buffer.getvalue()


def _swap_dataset(file: Any, name: str, rng: np.random.Generator) -> None:
    steps = len(file[name])
    del file[name]
    choice = int(rng.integers(len(_arrays(steps)) + 3))
    if choice == 0:
        file.create_dataset(name, (10**9, 3), np.float32, chunks=(1000, 3))
    elif choice == 1:
        file.create_dataset(
            name, (steps, 3), np.float32, chunks=(steps, 3), maxshape=(None, 3), compression=9
        )
        file[name].resize((10**12, 3))
    elif choice == 2:
        file.create_group(name)
    else:
        file[name] = _arrays(steps)[choice - 3]


def _nest_group(file: Any, name: str, rng: np.random.Generator) -> None:
    parent = file[name].parent
    for _ in range(int(rng.integers(20, 400))):
        parent = parent.create_group("x")
    parent["y"] = np.ones(3)
    file.attrs["env_args"] = parent.file.attrs["deep"] = "[" * 50_000
    if "data" in file:
        file["data"].attrs["env_args"] = "[" * 50_000


def _swap_column(content: bytes, rng: np.random.Generator) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(content), partitioning=None)
    rows = table.num_rows
    columns = [
        pa.array(["x"] * rows), pa.nulls(rows), pa.array([[1.0] * (i % 3) for i in range(rows)]),
        pa.array([[[1.0]]] * rows), pa.array([{"a": 1}] * rows), pa.array([float("nan")] * rows),
        pa.array([2**63 - 1] * rows), pa.array([-1] * rows), pa.array([1e308] * rows),
        pa.array([True] * rows), pa.array([[]] * rows, pa.list_(pa.float32())),
        pa.array([1] * rows, pa.timestamp("us")),
        pa.array([b"x"] * rows),
    ]  # fmt: skip
    at = int(rng.integers(table.num_columns))
    changed = table.set_column(at, table.column_names[at], columns[int(rng.integers(len(columns)))])
    buffer = io.BytesIO()
    pq.write_table(changed, buffer)
    return buffer.getvalue()


def _arrays(steps: int) -> list[np.ndarray]:
    """What might stand in the place of an array of so many rows."""
    return [
        np.array([b"x"] * steps), np.ones((steps, 2), complex), np.float64(3), np.zeros((0, 3)),
        np.zeros((steps, 0)),
        np.full((steps, 3), np.nan), np.full((steps, 2), 1e300), np.full((steps, 2), -np.inf),
        np.ones((steps + 1, 3)), np.ones((steps, 2, 3, 4, 5)), np.zeros(steps, [("a", "f4")]),
        np.full((steps, 2), 2**64 - 1, np.uint64), np.ones((steps, 300, 400, 3), np.uint8),
        np.ones(steps, bool),
    ]  # fmt: skip


MUTATIONS: tuple[Mutation, ...] = (flip_bits, truncate, range_ends, move_part, grow, swap_values, nest)


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    """Every place of a value in nested containers."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        places.append((node, key))
        _collect(node[key], places)


@dataclass(frozen=True)
class Outcome:
    """What became of one mutated file; ``fault`` is empty where that is as it should be."""

    format: str
    mutation: str
    file: str
    seed: int
    answer: str
    fault: str
    seconds: float
    megabytes: float


def write_samples(folder: Path) -> dict[str, Path]:
    """A small valid source of every format, and of LeRobot's with videos and with images besides."""
    samples = {name: WRITERS[name](folder, make_episodes()) for name in FORMATS}
    samples["lerobot, videos"] = lerobot_samples.write(folder)
    samples["lerobot, images"] = lerobot_samples.write(folder, 2, images="image")
    return samples


def attempt(samples: dict[str, Path], seed: int) -> Outcome:
    """Mutate one file of one sample, by the seed, and import the sample in a process of its own."""
    rng = np.random.default_rng(seed)
    format = list(samples)[seed % len(samples)]
    mutation = MUTATIONS[(seed // len(samples)) % len(MUTATIONS)]
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / samples[format].name
        if samples[format].is_dir():
            shutil.copytree(samples[format], source)
            files = sorted(file for file in source.rglob("*") if file.is_file() and file.stat().st_size)
        else:
            shutil.copy(samples[format], source)
            files = [source]
        described = [file for file in files if file.suffix == ".json" or file.name.startswith(".z")]
        if mutation in (swap_values, nest) and described:
            files = described
        file = files[int(rng.integers(len(files)))]
        file.write_bytes(mutation(file.read_bytes(), rng))
        answer, fault, seconds, megabytes = _import_apart(source, format.partition(",")[0])
    return Outcome(format, mutation.__name__, file.name, seed, answer, fault, seconds, megabytes)


def _import_apart(source: Path, format: str) -> tuple[str, str, float, float]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_import, args=(source, format, theirs))
    process.start()
    theirs.close()
    try:
        answer, fault, seconds, megabytes = (
            ours.recv() if ours.poll(_HANG_SECONDS) else ("", "hangs", 0.0, 0.0)
        )
    except EOFError:
        process.join()
        answer, fault, seconds, megabytes = "", f"dies with exit code {process.exitcode}", 0.0, 0.0
    process.kill()
    process.join()
    if not fault and seconds > SECONDS:
        fault = f"takes {seconds:.1f} s"
    if not fault and megabytes > MEGABYTES:
        fault = f"takes {megabytes:.0f} MB"
    return answer, fault, seconds, megabytes


def _import(source: Path, format: str, pipe: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    answer = fault = ""
    try:
        fault = _insanity(import_demonstrations(source, format))
        answer = "imported"
    except FlowPolicyError as error:
        answer = str(error)
        is_sentence = "\n" not in answer and answer[-1] in ".?" and not re.search(r"[.!?] [A-Z]", answer)
        fault = "" if is_sentence and len(answer) < 700 else "answers with more than a sentence"
    except BaseException as error:  # every other end is what this looks for
        answer, fault = repr(error)[:300], f"ends in {type(error).__name__}"
    seconds = time.process_time() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    pipe.send((answer, fault, seconds, megabytes))


def _insanity(demos: Any) -> str:
    steps = len(demos.arrays["action"])
    finite = all(np.isfinite(a).all() for a in demos.arrays.values() if a.dtype.kind == "f")
    whole = demos.episode_ends[-1] == steps and (np.diff(demos.episode_ends, prepend=0) > 0).all()
    alike = all(len(array) == steps for array in demos.arrays.values())
    return "" if finite and whole and alike and 0 < steps < 1000 else "imports nonsense"


def main() -> int:
    """Mutate, import, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        samples = write_samples(Path(name))
        outcomes = [attempt(samples, arguments.seed + number) for number in range(arguments.files)]
    for outcome in outcomes:
        if outcome.fault:
            print(outcome)
    print(Counter(o.fault or ("imported" if o.answer == "imported" else "one sentence") for o in outcomes))
    slowest, largest = max(o.seconds for o in outcomes), max(o.megabytes for o in outcomes)
    print(f"{len(outcomes)} files, at most {slowest:.2f} s and {largest:.0f} MB each")
    return int(any(outcome.fault for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
