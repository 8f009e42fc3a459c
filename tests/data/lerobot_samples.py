"""Small LeRobot datasets with cameras, written with PyAV and pyarrow alone, after lerobot's own layouts."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

FPS = 10
LENGTHS = (7, 5, 9)
SIZE = (64, 96)
TASKS = ("push", "lift it — gently")
CAMERAS = ("observation.images.top", "observation.images.wrist")


def grey(camera: int, episode: int, step: int) -> int:
    """The brightness of a frame, which no other near it has."""
    return 16 + (7 * (step + 11 * episode) + 90 * camera) % 224


def frames(camera: int, episode: int) -> list[np.ndarray]:
    return [np.full((*SIZE, 3), grey(camera, episode, step), np.uint8) for step in range(LENGTHS[episode])]


def expected(camera: int) -> np.ndarray:
    """The brightness of every step's frame, ``(steps,)``."""
    return np.array([grey(camera, e, step) for e, length in enumerate(LENGTHS) for step in range(length)])


def encode(path: Path, images: list[np.ndarray], codec: str = "libx264", **options: str) -> None:
    """A video with key frames far apart and, where the codec has them, frames out of order."""
    import av

    from flowpolicy.data.video_writing import fair_scheduling

    path.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    quality = {} if codec == "mjpeg" else {"crf": "10", "g": "12", "bf": "2"}
    with av.open(str(path), "w") as container, fair_scheduling():
        stream: Any = container.add_stream(codec, rate=FPS, options={**quality, **quiet, **options})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, layout: int = 3, codec: str = "libx264", images: str = "video") -> Path:
    """A dataset of three episodes and two cameras; in layout 3 the first two share a video."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"set_{layout}_{codec}_{images}"
    (path / "meta").mkdir(parents=True)
    camera = {"dtype": images, "shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
    joints = {"dtype": "float32", "shape": [2], "names": {"motors": ["pan", "lift"]}}
    info = {
        "codebase_version": {2: "v2.1", 3: "v3.0"}[layout],
        "robot_type": "toy",
        "fps": FPS,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "features": {"observation.state": joints, "action": joints, **dict.fromkeys(CAMERAS, camera)},
    }
    (path / "meta" / "info.json").write_text(json.dumps(info))
    tables, rows = [], []
    for episode, length in enumerate(LENGTHS):
        columns = {
            "observation.state": list(np.full((length, 2), episode, np.float32)),
            "action": list(np.arange(2 * length, dtype=np.float32).reshape(-1, 2)),
            "timestamp": np.arange(length, dtype=np.float32) / FPS,
            "episode_index": np.full(length, episode),
            "frame_index": np.arange(length),
            "task_index": np.full(length, episode % 2),
        }
        if images == "image":
            for number, name in enumerate(CAMERAS):
                files = pa.array([png(image) for image in frames(number, episode)])
                paths = pa.array(["x.png"] * length)
                columns[name] = pa.StructArray.from_arrays([files, paths], ["bytes", "path"])
        tables.append(pa.table(columns))
        row: dict[str, Any] = {"episode_index": episode, "length": length}
        for name in CAMERAS:
            place = {"chunk_index": 0, "file_index": episode // 2}
            place["from_timestamp"] = LENGTHS[0] / FPS if episode == 1 else 0.0
            row |= {f"videos/{name}/{key}": value for key, value in place.items()}
        rows.append(row)
    if layout == 2:
        lines = [json.dumps({"task_index": number, "task": task}) for number, task in enumerate(TASKS)]
        (path / "meta" / "tasks.jsonl").write_text("\n".join(lines) + "\n")
        for episode, table in enumerate(tables):
            _write_table(table, path / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")
    else:
        table = pa.table({"task_index": [1, 0], "__index_level_0__": [TASKS[1], TASKS[0]]})
        pq.write_table(table, path / "meta" / "tasks.parquet")
        _write_table(pa.concat_tables(tables), path / "data" / "chunk-000" / "file-000.parquet")
        episodes = path / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        _write_table(pa.Table.from_pylist(rows), episodes)
    if images == "video":
        for number, name in enumerate(CAMERAS):
            for place, shown in videos(layout, name, number).items():
                encode(path / place, shown, codec)
    return path


def videos(layout: int, name: str, number: int) -> dict[str, list[np.ndarray]]:
    parts = [frames(number, episode) for episode in range(len(LENGTHS))]
    if layout == 2:
        place = f"videos/chunk-000/{name}/episode_{{:06d}}.mp4"
        return {place.format(episode): part for episode, part in enumerate(parts)}
    place = f"videos/{name}/chunk-000/file-{{:03d}}.mp4"
    return {place.format(0): parts[0] + parts[1], place.format(1): parts[2]}


def _write_table(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
