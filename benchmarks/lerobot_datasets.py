"""LeRobot's datasets beside LeRobot itself: ``python benchmarks/lerobot_datasets.py --lerobot VENV/bin/python``.

Datasets are made by lerobot in an environment of its own (``--lerobot`` for 0.4, which writes layout 3.0; ``--older``
for 0.3, which writes 2.1), with two cameras and three tasks, and imported here. Compared with what lerobot's own
loader gives: every pixel of every frame, actions, states and the words of the tasks. Then the way back: what is
exported here is loaded there. Then frames a second beside lerobot's loader, and the peak memory of an import of a
large dataset, each import in a process of its own. Last, an import that is killed again and again, and the store of
one that is not. What was made in ``--folder`` by an earlier run, and read by lerobot, is used again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.data.importers import import_demonstrations, import_to_store
from flowpolicy.data.lerobot_writing import write_lerobot

ROOT = Path(__file__).resolve().parents[1]
CAMERAS = ("images.top", "images.wrist")
SMALL = {"size": [120, 160], "cameras": 2, "episodes": 4, "steps": 40, "fps": 30, "noise": 0}
IMPORT = """
import json, resource, sys, time
import av, PIL.Image, zarr
from flowpolicy.data.importers import import_to_store
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
import_to_store(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_mb": round(peak / 1024), "libraries_mb": round(loaded / 1024)}))
"""
NOTED_OFTEN = """
import json, sys
from flowpolicy.data import store_writing
from flowpolicy.data.importers import import_to_store
store_writing.NOTED_EVERY_S = store_writing._SHARE = 1
import_to_store(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""


def lerobot(python: str, **settings: Any) -> Any:
    """What the worker answers."""
    worker = ROOT / "benchmarks" / "peers" / "lerobot_worker.py"
    done = subprocess.run(
        [python, str(worker), json.dumps(settings)], capture_output=True, text=True, check=False,
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])["answer"]


def make(python: str, root: Path, **settings: Any) -> None:
    """A dataset of lerobot's, unless an earlier run made it."""
    if root.exists():
        return
    making = root.parent / "making"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    lerobot(python, do="make", root=str(making / root.name), **settings)
    for path in sorted(making.iterdir(), reverse=True):  # the one without an episode first
        path.rename(root.parent / path.name)


def compare(root: Path, python: str, backend: str | None) -> dict[str, Any]:
    """The dataset as lerobot reads it and as it is imported."""
    out = Path(f"{root}.npz")
    if not out.exists():
        lerobot(python, do="read", root=str(root), out=str(out), backend=backend)
    demos, theirs = import_demonstrations(root), np.load(out)
    differences = [
        np.abs(demos.arrays[key].astype(np.int16) - theirs[f"observation.{key}"]) for key in CAMERAS
    ]
    words = [demos.attributes["tasks"][number] for number in demos.arrays["task_index"]]
    return {
        "frames": sum(len(found) for found in differences),
        "mean_difference": float(np.mean([found.mean() for found in differences])),
        "worst_frame": float(max(found.reshape(len(found), -1).mean(axis=1).max() for found in differences)),
        "actions_equal": bool((demos.arrays["action"] == theirs["action"]).all()),
        "states_equal": bool((demos.arrays["observation"] == theirs["observation.state"]).all()),
        "words_equal": words == theirs["task"].tolist(),
    }


def check(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both layouts, each codec, a deleted episode, and the way back."""
    rows = []
    made = [(arguments.lerobot, "3.0", codec) for codec in ("h264", "libsvtav1", "hevc", "png")]
    if arguments.older:
        made += [(arguments.older, "2.1", codec) for codec in ("h264", "libsvtav1")]
    for python, layout, codec in made:
        root = folder / f"{layout}_{codec}"
        delete = [1] if (layout, codec) in {("3.0", "h264"), ("3.0", "libsvtav1")} else []
        make(python, root, codec=codec, delete=delete, **SMALL)
        sets = [("as recorded", root), *([("an episode deleted", Path(f"{root}_deleted"))] if delete else [])]
        for name, path in sets:
            rows.append(
                {"layout": layout, "codec": codec, "set": name, **compare(path, python, arguments.backend)}
            )
            print(json.dumps(rows[-1]), flush=True)
    demos = import_demonstrations(folder / "3.0_png")
    for images in ("png", "h264", "hevc", "av1"):
        shutil.rmtree(folder / f"exported_{images}", ignore_errors=True)
        (folder / f"exported_{images}.npz").unlink(missing_ok=True)
        out = write_lerobot(folder / f"exported_{images}", demos, images=images)
        back = import_demonstrations(out)
        exact = {
            key: bool(np.array_equal(array, back.arrays[key]))
            for key, array in demos.arrays.items() if key not in CAMERAS
        }  # fmt: skip
        lost = float(
            np.mean([np.abs(demos.arrays[k].astype(np.int16) - back.arrays[k]).mean() for k in CAMERAS])
        )
        row = {
            "layout": "3.0",
            "codec": images,
            "set": "exported here",
            "import_of_export_equal": all(exact.values()),
        }
        row |= {"lost_by_the_codec": lost, **compare(out, arguments.lerobot, arguments.backend)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def imported(path: Path, **request: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        command = [sys.executable, "-c", IMPORT, str(path), f"{name}/a.zarr", json.dumps(request)]
        return json.loads(
            subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
        )


def speed(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Frames a second of imports, and of lerobot's loader in between, so that other work meets both."""
    rows = []
    for codec in ("h264", "libsvtav1"):
        root = folder / f"speed_{codec}"
        settings = {
            "size": [480, 640],
            "cameras": 2,
            "episodes": 3,
            "steps": arguments.steps,
            "fps": 30,
            "noise": 3,
        }
        make(arguments.lerobot, root, codec=codec, **settings)
        frames = 2 * (3 * arguments.steps + 3)
        row: dict[str, Any] = {"codec": codec, "frames": frames, "size": [480, 640]}
        for _ in range(arguments.repeats):
            small = imported(root, image_size=[224, 224])
            row.setdefault("import_to_224", []).append(frames / small["seconds"])
            for workers in (0, 2):
                rate = lerobot(
                    arguments.lerobot, do="time", root=str(root), workers=workers, backend=arguments.backend
                )
                row.setdefault(f"lerobot_loader_{workers}_workers", []).append(rate)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def write_large(root: Path, gigabytes: float) -> int:
    """A dataset of layout 2.1 with videos of noise, one of which is encoded and copied for every episode."""
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, steps, key = (720, 1280), 20, "observation.images.top"
    rng = np.random.default_rng(0)
    shutil.rmtree(root, ignore_errors=True)
    first = root / "videos" / "chunk-000" / key / "episode_000000.mp4"
    first.parent.mkdir(parents=True)
    with av.open(str(first), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=30, options={"qp": "8", "preset": "ultrafast", "g": "10"}
        )
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(steps):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (*size, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    episodes = int(np.ceil(gigabytes * 1e9 / first.stat().st_size))
    (root / "data" / "chunk-000").mkdir(parents=True)
    for episode in range(episodes):
        columns = {
            "action": list(rng.normal(size=(steps, 6)).astype(np.float32)),
            "episode_index": np.full(steps, episode),
            "frame_index": np.arange(steps),
            "timestamp": (np.arange(steps) / 30).astype(np.float32),
        }
        pq.write_table(pa.table(columns), root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")
        if episode:
            shutil.copy(first, first.with_name(f"episode_{episode:06d}.mp4"))
    (root / "meta").mkdir()
    camera = {"dtype": "video", "shape": [*size, 3], "names": ["height", "width", "channels"]}
    features = {"action": {"dtype": "float32", "shape": [6]}, key: camera}
    info = {"codebase_version": "v2.1", "fps": 30, "chunks_size": 10_000, "features": features}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return episodes * steps


def memory(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Peak memory of an import of a large dataset, and of a thirtieth of its episodes."""
    root = folder / "large"
    frames = write_large(root, gigabytes)
    size = sum(file.stat().st_size for file in root.rglob("*.mp4"))
    few = imported(root, image_size=[96, 96], options={"episodes": list(range(3))})
    row = {"gigabytes": round(size / 1e9, 2), "frames": frames, "size": [720, 1280], "image_size": [96, 96]}
    row |= imported(root, image_size=[96, 96]) | {"peak_mb_of_3_episodes": few["peak_mb"]}
    print(json.dumps(row), flush=True)
    return row


def killed(folder: Path, gigabytes: float) -> dict[str, Any]:
    """An import that is killed as soon as it has come further than the one before, until one comes to its end."""
    root, request = folder / "killed", {"image_size": [96, 96]}
    frames = write_large(root, gigabytes)
    for left in (*folder.glob("*.zarr"), folder / ".out.zarr.parts"):
        shutil.rmtree(left, ignore_errors=True)
    whole, out = import_to_store(root, folder / "whole.zarr", **request), folder / "out.zarr"
    note, rows = folder / ".out.zarr.parts" / "unfinished.json", [0]
    while not out.exists():
        command = [sys.executable, "-c", NOTED_OFTEN, str(root), str(out), json.dumps(request)]
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None:
            time.sleep(0.01)
            found = 0
            with contextlib.suppress(FileNotFoundError):
                found = json.loads(note.read_text())["rows"]
            if found > rows[-1]:
                rows.append(found)
                process.kill()
                process.wait()
        if process.returncode > 0:
            raise SystemExit("An import failed.")
    names = [
        {str(Path(at, n).relative_to(path)) for at, _, ns in os.walk(path) for n in ns}
        for path in (whole, out)
    ]
    equal = names[0] == names[1] and all((whole / n).read_bytes() == (out / n).read_bytes() for n in names[0])
    row = {"frames": frames, "killed_after_rows": rows[1:], "equal": equal}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Make, compare, measure, delete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lerobot", required=True, help="Python of an environment with lerobot 0.4")
    parser.add_argument("--older", help="Python of an environment with lerobot 0.3")
    parser.add_argument(
        "--backend", default=None, help="lerobot's decoder: torchcodec or pyav; its own choice"
    )
    parser.add_argument("--parts", nargs="+", default=["check", "speed", "memory", "killed"])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument(
        "--steps", type=int, default=100, help="of each of the three episodes of the speed part"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="for the datasets, which stay there")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "lerobot-datasets.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for part in arguments.parts:
            made: Any = {
                "check": lambda: check(folder, arguments),
                "speed": lambda: speed(folder, arguments),
                "memory": lambda: memory(folder, arguments.gigabytes),
                "killed": lambda: killed(folder, arguments.gigabytes / 5),
            }[part]()
            result[part] = {
                "command": "python benchmarks/lerobot_datasets.py --lerobot VENV/bin/python --parts " + part,
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
                "rows": made,
            }
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
