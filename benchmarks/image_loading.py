"""Image batches per second beside Diffusion Policy's and robomimic's loaders, interleaved on one machine.

    python benchmarks/image_loading.py --peer-checkout PATH --peer-python PATH --zarr PATH

All load the 206 Push-T episodes (96 x 96 images, two of them a sample, chunk 16), batches of 64 in random order, to
float tensors as their networks take them. Ours from memory, and from disk as where images do not fit; Diffusion
Policy's dataset from memory, as it is, and without the images that no policy uses; robomimic's from an
uncompressed HDF5 file, with its defaults for images. The peers' loaders with and without worker processes, of which
the fastest counts. The processes take turns; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
from training_throughput import Worker

from flowpolicy.data.robomimic_writing import write_robomimic
from flowpolicy.data.store import read_demonstrations
from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
OURS = ("ours, in memory", "ours, from disk")
PEERS = {
    "Diffusion Policy": "diffusion_policy_loading_worker.py",
    "Diffusion Policy, needed images": "diffusion_policy_loading_worker.py",
    "robomimic": "robomimic_loading_worker.py",
}
PEER_WORKERS = (0, 2)


def uncompressed(store: str, folder: Path) -> str:
    """The store in robomimic's default format of image files."""
    packed, path = folder / "packed.hdf5", folder / "images.hdf5"
    write_robomimic(packed, read_demonstrations(store))
    with h5py.File(packed, "r") as source, h5py.File(path, "w") as file:

        def copied(name: str, item: Any) -> None:
            node = file.require_group(name) if isinstance(item, h5py.Group) else None
            node = file.create_dataset(name, data=item[()]) if node is None else node
            node.attrs.update(item.attrs)

        source.visititems(copied)
    packed.unlink()
    return str(path)


def workers_of(arguments: argparse.Namespace, hdf5: str) -> dict[str, Worker]:
    settings = {
        "store": arguments.store, "zarr": arguments.zarr, "hdf5": hdf5, "batch_size": arguments.batch_size,
        "obs_horizon": 2, "action_horizon": 16, "threads": 1,
    }  # fmt: skip
    started = {
        name: Worker(
            sys.executable, "flowpolicy_loading_worker.py", {**settings, "image_memory_bytes": memory}
        )
        for name, memory in zip(OURS, (None, 0), strict=True)
    }
    for name, script in PEERS.items():
        theirs = script.startswith("diffusion")
        for count in PEER_WORKERS:
            own = {**settings, "workers": count, "first_images": name.endswith("needed images")}
            python = arguments.peer_python if theirs else sys.executable
            path = arguments.peer_checkout if theirs else ""
            started[f"{name}, {count} workers"] = Worker(python, script, own, path)
    return started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-checkout", required=True, help="a checkout of real-stanford/diffusion_policy")
    parser.add_argument("--peer-python", required=True, help="a Python with its requirements (zarr 2, numba)")
    parser.add_argument("--zarr", required=True, help="its Push-T store")
    parser.add_argument("--store", default="demonstrations/pusht-image.zarr.zip", help="the same, imported")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workers = workers_of(arguments, uncompressed(arguments.store, Path(folder)))
        rates: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(arguments.rounds + 1):
            for name, worker in workers.items():
                seconds = worker.seconds(arguments.batches)
                if number:  # the first round fills caches and queues
                    rates[name].append(arguments.batches * arguments.batch_size / seconds)
        for worker in workers.values():
            worker.close()
    best = {
        peer: max((name for name in rates if name.rpartition(",")[0] == peer), key=lambda n: statistics.median(rates[n]))
        for peer in PEERS
    }  # fmt: skip
    rows = [{"loader": name, "samples_per_second": statistics.median(each)} for name, each in rates.items()]
    ratios = {
        f"{ours} / {peer}": sorted(a / b for a, b in zip(rates[ours], rates[best[peer]], strict=True))
        for ours in OURS
        for peer in PEERS
    }
    for row in rows:
        print(f"{row['loader']:45s} {row['samples_per_second']:9.0f} samples/s")
    for name, each in ratios.items():
        print(f"{name:60s} {statistics.median(each):6.2f} [{each[0]:.2f}, {each[-1]:.2f}]")
    content = {
        "command": "python benchmarks/image_loading.py --peer-checkout PATH --peer-python PATH --zarr PATH",
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "rows": rows,
        "fastest_of_peer": best,
        "ratios": {
            name: {"median": statistics.median(each), "min": each[0], "max": each[-1]}
            for name, each in ratios.items()
        },
        "machine": machine(),
        "versions": versions(),
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(ROOT / "benchmarks" / "results" / "image-loading.json", content)


if __name__ == "__main__":
    main()
