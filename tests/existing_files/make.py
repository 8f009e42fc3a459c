"""Makes a small file of every kind of which the repository holds none, and records what all of them give.

    python tests/existing_files/make.py            # files that are missing, and the numbers of all
    python tests/existing_files/make.py --numbers  # the numbers alone

Files and numbers are those of the version that runs it, which stands in numbers.json. A later version reads
them; the files of a format's next version go beside them, under other names.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import readings
import torch
from readings import HERE, NUMBERS, ROOT, SCHEDULES, UNFINISHED

from flowpolicy import FlowPolicy, PolicyConfig
from flowpolicy.__main__ import main as flowpolicy
from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey
from flowpolicy.acceleration.caching.scheduling import uniform
from flowpolicy.acceleration.choosing.plan import DeploymentPlan, PlannedSampler, fingerprint, hardware
from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.files.storage import write_json
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.models.config import TransformerConfig
from flowpolicy.pretraining.state import TrainingState

IMAGES = {"image": (36, 36, 3), "state": (3,)}


# Files ------------------------------------------------------------------------------------------------------


def policy(objective: dict[str, Any], shapes: dict[str, tuple[int, ...]], **settings: Any) -> FlowPolicy:
    """A small policy with weights that nobody trained, none of them zero."""
    torch.manual_seed(0)
    model = TransformerConfig(width=16, depth=1, num_heads=2, vision=VisionConfig(channels=16, keypoints=2))
    made = FlowPolicy(PolicyConfig(objective, model, shapes, 2, 2, 8, 4, **settings))
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    vectors = {key: 3 * torch.randn(50, *shape) + 1 for key, shape in shapes.items() if len(shape) < 3}
    made.fit_normalizers(vectors, 2 * torch.randn(50, 2) - 0.5)
    return made.eval()


def images() -> FlowPolicy:
    return policy(
        {"name": "flow_matching", "default_num_steps": 8, "time_sampling": {"name": "beta"}}, IMAGES,
        observation_normalization="gaussian", action_normalization="gaussian", action_clip=5.0,
    )  # fmt: skip


def other_objectives(folder: Path) -> None:
    """The objectives without noise, and a key that is no name of a module."""
    shapes = {"agent.position": (2,), "height": ()}
    settings = {"observation_normalization": "quantile", "action_normalization": "none", "action_clip": 5.0}
    policy({"name": folder.name}, shapes, **settings).save(folder)


def cached(folder: Path, num_steps: int, solver: str, updates: int) -> Schedule:
    """Each block recomputed at evaluations of its own."""
    key = ScheduleKey.of(FlowPolicy.load(folder), num_steps, solver)
    evenly = uniform(key.num_evaluations, updates)
    steps = [evenly if index % 2 else evenly[:-1] for index in range(len(key.blocks))]
    return Schedule(key, tuple(steps), "uniform", {"updates": updates}, {"observations": 64})


def plan(file: Path) -> None:
    chosen = PlannedSampler(
        8, "heun", "eager", "cached.json", 0.25, 16, {"p50": 1.0, "p99": 1.5, "bound": 2.0}, 0.01, 0.02, 0.05
    )
    fast = dataclasses.replace(chosen, num_steps=2, solver="euler", schedule=None, share=1.0, nfe=2)
    name = fingerprint(FlowPolicy.load(HERE / "images"))
    DeploymentPlan(
        name, hardware(1), 20.0, 0.99, 0.1, chosen, fast, "cpu", 1, 2, {"return": 3.0}, "A reason.", 1
    ).save(file)


def model(file: Path) -> None:
    """With images, and everything that is not a default."""
    ReinFlow(
        images(), None, num_steps=3, n_steps=16, learning_rate=1e-4, target_kl=None, critic_hidden=(8, 8),
        noise=NoiseConfig(0.05, 0.2, 0.1, 0.5, 8, sees_chunk=True), image_encoder="trained",
        critic_encoder="own", execute_horizon=2, seed=3, device="cpu",
    ).save(file)  # fmt: skip


def store(file: Path, zarr_format: int) -> None:
    rng, ends = np.random.default_rng(0), np.array([5, 12, 14])
    steps, last = int(ends[-1]), np.zeros(int(ends[-1]), bool)
    last[ends - 1] = True
    arrays = {
        "image": rng.integers(0, 256, (steps, 12, 12, 3), np.uint8),
        "observation": rng.standard_normal((steps, 3), np.float32),
        "goal": rng.standard_normal((steps, 2, 2)),
        "gripper": rng.integers(0, 2, (steps, 1)),
        "action": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "reward": rng.standard_normal(steps, np.float32),
        "terminated": last,
        "truncated": np.zeros(steps, bool),
    }
    attributes = {"env_id": "Toy-v0", "fps": 10.0, "licence": "MIT", "masks": {"valid": [1]}}
    write_demonstrations(file, Demonstrations(arrays, ends, attributes), zarr_format=zarr_format)


def unfinished(folder: Path) -> None:
    """A run that was interrupted when it had saved its state for the first time."""
    words = ["flowpolicy", *UNFINISHED[folder.name], f"run_dir={folder}"]
    kind: Any = TrainingState if folder.name == "pretraining" else ReinFlow
    save = kind.save

    def last_save(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        raise KeyboardInterrupt

    with mock.patch.object(kind, "save", last_save), mock.patch.object(sys, "argv", words):
        try:
            flowpolicy()
        except SystemExit as ended:
            if ended.code != 130:
                raise


FILES: dict[str, Callable[[Path], Any]] = {
    "images": lambda folder: images().save(folder),
    "regression": other_objectives,
    "mip": other_objectives,
    "schedules/hopper-shortcut-seed0.json": lambda file: cached(
        ROOT / SCHEDULES[f"schedules/{file.name}"], 8, "euler", 4
    ).save(file),
    "schedules/pusht-flow_matching-seed0.json": lambda file: cached(
        ROOT / SCHEDULES[f"schedules/{file.name}"], 12, "euler", 5
    ).save(file),
    "plan/cached.json": lambda file: cached(HERE / "images", 8, "heun", 6).save(file),
    "plan/plan.json": plan,
    "reinflow.zip": model,
    "stores/format2.zarr.zip": lambda file: store(file, 2),
    "stores/format3.zarr.zip": lambda file: store(file, 3),
    "pretraining": unfinished,
    "finetuning": unfinished,
}
"""File or folder, here -> what makes it."""


# Numbers ----------------------------------------------------------------------------------------------------


def checkpoints() -> list[str]:
    """Every checkpoint of the repository, here and elsewhere."""
    folders = [file.parent for file in ROOT.glob("benchmarks/checkpoints/*/config.json")]
    folders += [HERE / "images", HERE / "regression", HERE / "mip", HERE / "pretraining" / "checkpoint"]
    return sorted(str(folder.relative_to(ROOT)) for folder in folders)


def numbers() -> dict[str, Any]:
    """Kind of file -> name -> what it gives."""
    found: dict[str, Any] = {
        "checkpoint": {name: readings.checkpoint(name) for name in checkpoints()},
        "schedule": {name: readings.schedule(name) for name in SCHEDULES},
        "plan": {"plan/plan.json": readings.plan("plan/plan.json")},
        "model": {name: readings.model(name) for name in ("reinflow.zip", "finetuning/training_state.zip")},
        "store": {
            name: readings.store(name)
            for name in (
                "envs/assets/hopper-medium.zarr.zip",
                "tests/existing_files/stores/format2.zarr.zip",
                "tests/existing_files/stores/format3.zarr.zip",
            )
        },
    }
    with tempfile.TemporaryDirectory() as temporary:
        found["unfinished"] = {name: readings.unfinished(name, Path(temporary) / name) for name in UNFINISHED}
    return found


def plain(content: Any) -> Any:
    """Arrays as a line of text for each row, of the shortest numbers that are the same float32."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, np.ndarray):
        return [" ".join(map(str, row)) for row in content.reshape(-1, content.shape[-1])]
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numbers", action="store_true", help="make no files")
    arguments = parser.parse_args()
    for name, make in FILES.items():
        if not arguments.numbers and not (HERE / name).exists():
            (HERE / name).parent.mkdir(exist_ok=True)
            make(HERE / name)
            print(name)
    with readings.one_thread():
        content = {
            "command": "python tests/existing_files/make.py", "git_commit": git_state()[0],
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
            "versions": versions(), "numbers": plain(numbers()),
        }  # fmt: skip
    write_json(NUMBERS, content)
    print(NUMBERS)


if __name__ == "__main__":
    main()
