"""Makes and reads datasets with LeRobot itself; see benchmarks/lerobot_datasets.py.

Run with a Python that has lerobot 0.3 or 0.4 and nothing of this package. The only argument is a JSON object:
``make`` writes a dataset and the frames that went into it, ``read`` writes what lerobot's loader gives, ``time``
prints how long it takes for that.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets import lerobot_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset

TASKS = ("push the block to the left", "lift it — gently", "stack")
CAMERAS = ("observation.images.top", "observation.images.wrist")


def features(settings: dict[str, Any]) -> dict[str, Any]:
    height, width = settings["size"]
    camera = {
        "dtype": "image" if settings["codec"] == "png" else "video",
        "shape": (height, width, 3),
        "names": ["height", "width", "channels"],
    }
    joints = [f"joint_{number}.pos" for number in range(6)]
    vector = {"dtype": "float32", "shape": (6,), "names": joints}
    return {
        "observation.state": vector,
        "action": vector,
        **dict.fromkeys(CAMERAS[: settings["cameras"]], camera),
    }


def picture(rng: np.random.Generator, step: int, height: int, width: int, noise: int) -> np.ndarray:
    """A gradient that moves with a bright square, and as much noise as is asked for."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([(rows + 3 * step) % 256, (columns + 2 * step) % 256, (rows + columns) // 4 % 256], -1)
    at = 4 * step % (width - 16)
    image[height // 3 : height // 3 + 16, at : at + 16] = (250, 30, 40)
    if noise:
        image = image + rng.integers(-noise, noise + 1, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def make(settings: dict[str, Any]) -> None:
    root = Path(settings["root"])
    shutil.rmtree(root, ignore_errors=True)
    named: dict[str, Any] = {"robot_type": "so101_follower", "image_writer_threads": 2}
    if settings["codec"] != "png":
        chosen = {"vcodec": settings["codec"], **settings.get("encoding", {})}
        if "vcodec" in inspect.signature(LeRobotDataset.create).parameters:
            named["vcodec"] = chosen.pop("vcodec")
        encode = lerobot_dataset.encode_video_frames
        lerobot_dataset.encode_video_frames = lambda *a, **k: encode(*a, **{**k, **chosen})
    dataset = LeRobotDataset.create(
        "toy/made",
        settings["fps"],
        features(settings),
        root=root,
        use_videos=settings["codec"] != "png",
        **named,
    )
    rng = np.random.default_rng(0)
    for episode in range(settings["episodes"]):
        for step in range(settings["steps"] + episode % 3):
            frame = {
                "observation.state": rng.normal(size=6).astype(np.float32),
                "action": rng.uniform(-1, 1, 6).astype(np.float32),
            }
            for number, camera in enumerate(CAMERAS[: settings["cameras"]]):
                frame[camera] = picture(
                    rng, step + 37 * episode + 11 * number, *settings["size"], settings["noise"]
                )
            add(dataset, frame, TASKS[episode % 3])
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()
    if settings.get("delete"):
        from lerobot.datasets.dataset_tools import delete_episodes

        whole = LeRobotDataset("toy/made", root=root)
        delete_episodes(
            whole, settings["delete"], output_dir=Path(settings["root"] + "_deleted"), repo_id="toy/less"
        )


def add(dataset: Any, frame: dict[str, Any], task: str) -> None:
    """Version 0.3 takes the task as an argument of its own."""
    try:
        dataset.add_frame({**frame, "task": task})
    except (ValueError, TypeError):
        dataset.add_frame(frame, task=task)


def read(settings: dict[str, Any]) -> None:
    dataset = LeRobotDataset("toy/made", root=settings["root"], video_backend=settings.get("backend"))
    out: dict[str, list[Any]] = {}
    for index in range(len(dataset)):
        for name, value in dataset[index].items():
            if isinstance(value, str):
                out.setdefault(name, []).append(value)
            else:
                array = value.numpy()
                is_image = array.ndim == 3 and array.shape[0] == 3
                out.setdefault(name, []).append(
                    np.round(255 * array).astype(np.uint8).transpose(1, 2, 0) if is_image else array
                )
    np.savez(settings["out"], **{name: np.array(values) for name, values in out.items()})


def timed(settings: dict[str, Any]) -> float:
    """Frames a second of its data loader, in order; one number of workers a process, as decoders do not fork."""
    import torch

    dataset = LeRobotDataset("toy/made", root=settings["root"], video_backend=settings.get("backend"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, num_workers=settings["workers"])
    start, frames = time.perf_counter(), 0
    for batch in loader:
        frames += len(batch["index"]) * len(dataset.meta.camera_keys)
    return frames / (time.perf_counter() - start)


def main() -> None:
    settings = json.loads(sys.argv[1])
    answer = {"make": make, "read": read, "time": timed}[settings["do"]](settings)
    print(json.dumps({"answer": answer}))


if __name__ == "__main__":
    main()
