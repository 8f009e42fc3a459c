"""What an import takes, in memory and time: ``python benchmarks/import_memory.py``.

A robomimic file is written (two cameras, two vectors, actions; uncompressed, in chunks), and imported in a
process of its own: two of its vectors, and then, from a smaller file, everything. The peak is the resident
memory of that process, with the libraries it loads.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEPS_PER_EPISODE = 250
IMAGE = (128, 128, 3)

IMPORT = """
import json, resource, sys, time
from flowpolicy.data.importers import import_to_store
from flowpolicy.data.inspection import inspect_demonstrations
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
import_to_store(sys.argv[1], sys.argv[2], keys=json.loads(sys.argv[3]))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inspection = inspect_demonstrations(sys.argv[2])
inspected = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": round(seconds, 2), "peak_mb": round(peak / 1024), "libraries_mb": round(loaded / 1024),
                  "peak_with_inspection_mb": round(inspected / 1024), "steps": inspection.steps,
                  "problem": inspection.problem}))
"""


def write_file(path: Path, gigabytes: float) -> None:
    """A file of about that size; images are noise, so that nothing compresses it away."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (STEPS_PER_EPISODE, *IMAGE), np.uint8)
    episodes = round(gigabytes * 1e9 / (2 * frames.nbytes))
    with h5py.File(path, "w") as file:
        for number in range(episodes):
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = rng.uniform(-1, 1, (STEPS_PER_EPISODE, 7))
            group["obs/eef_pos"] = rng.normal(size=(STEPS_PER_EPISODE, 3))
            group["obs/eef_quat"] = rng.normal(size=(STEPS_PER_EPISODE, 4))
            group["rewards"] = np.zeros(STEPS_PER_EPISODE)
            for camera in ("agentview_image", "eye_in_hand_image"):
                group.create_dataset(f"obs/{camera}", data=frames, chunks=(1, *IMAGE))


def measure(path: Path, keys: list[str] | None, folder: Path) -> dict[str, Any]:
    """Import the file in a process of its own."""
    out = folder / "store.zarr"
    command = [sys.executable, "-c", IMPORT, str(path), str(out), json.dumps(keys)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    shutil.rmtree(out)
    return {"file_gb": round(path.stat().st_size / 1e9, 2), "keys": keys or "all", **json.loads(done.stdout)}


def main() -> None:
    """Write, measure, delete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument(
        "--full-gigabytes", type=float, default=0.5, help="of the file that is imported whole"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where there is room for the files")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "import_memory.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for gigabytes, keys in (
            (arguments.gigabytes, ["eef_pos", "eef_quat"]),
            (arguments.full_gigabytes, None),
        ):
            path = folder / "demo.hdf5"
            write_file(path, gigabytes)
            rows.append(measure(path, keys, folder))
            print(json.dumps(rows[-1]))
            path.unlink()
    result = {
        "command": "python " + " ".join(["benchmarks/import_memory.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
