"""The numbers of two versions: training from fixed seeds, and the chunks of committed checkpoints."""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load
from version_processes import CHECKPOINT, QUIET, Version

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Run:
    """A command that leaves a run folder.

    Attributes:
        name: of the row.
        words: of the command.
        weights: file of the tensors that are compared.
    """

    name: str
    words: tuple[str, ...]
    weights: str = "checkpoint/model.safetensors"


SMALL = (
    "pretrain", *QUIET, "model.width=32", "model.depth=1", "train.steps=50", "train.log_every=1",
    "train.warmup_steps=10", "train.validate_every=25", "train.final_episodes=0", "train.threads=1",
)  # fmt: skip
RUNS = (
    Run("pretraining, flow matching", (*SMALL, "policy=flow_matching")),
    Run("pretraining, shortcut", (*SMALL, "policy=shortcut")),
    Run(
        "fine-tuning",
        (
            "finetune-reinflow", *QUIET, "num_steps=4", "total_steps=384", "num_envs=2", "workers=0", "threads=1",
            "reinflow.n_steps=16", "reinflow.batch_size=16", "reinflow.critic_warmup=1", "final_episodes=0",
        ),
        "training_state.zip",
    ),
)  # fmt: skip


def run_rows(run: Run, versions: list[Version], work: Path) -> list[dict[str, Any]]:
    """What the run logs, the weights it ends with, and the chunks of its policy."""
    folders, words = [work / version.name for version in versions], list(run.words)
    if words[0] == "finetune-reinflow":
        words.append(f"checkpoint={versions[0].root / CHECKPOINT}")
    for version, folder in zip(versions, folders, strict=True):
        version.do("command", {"words": [*words, f"run_dir={folder}"]})
    rows = [
        compared(f"{run.name}: metrics", *(metrics_of(folder / "metrics.csv") for folder in folders)),
        compared(f"{run.name}: weights", *(tensors_of(folder / run.weights) for folder in folders)),
    ]
    checkpoints = [folder / "checkpoint" for folder in folders]
    asked = str(checkpoints[0])
    found = [
        chunks_of(version, {"policy": (str(folder), asked)}, work / f"{version.name}.npz")
        for version, folder in zip(versions, checkpoints, strict=True)
    ]
    return [*rows, compared(f"{run.name}: chunks", *found)]


def sampling_rows(versions: list[Version], work: Path) -> list[dict[str, Any]]:
    """Every checkpoint of the base."""
    files = sorted((versions[0].root / "benchmarks" / "checkpoints").glob("*/config.json"))
    names = {file.parent.name: (str(file.parent), str(file.parent)) for file in files}
    base, new = (chunks_of(version, names, work / f"{version.name}.npz") for version in versions)
    return [
        compared(f"sampling: {name}", *(_starting(arrays, name) for arrays in (base, new))) for name in names
    ]


def chunks_of(version: Version, checkpoints: dict[str, tuple[str, str]], file: Path) -> Arrays:
    """Chunks by name and way of sampling; ``checkpoints`` are folders, and whose the question is."""
    version.do("chunks", {"checkpoints": checkpoints, "out": str(file)})
    return dict(np.load(file))


def metrics_of(file: Path) -> Arrays:
    """Logged columns, without those that tell the time."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in rows[0] if not name.startswith("time/") and not name.endswith("_per_s")]
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def tensors_of(file: Path) -> Arrays:
    """Tensors of a checkpoint or of a training state."""
    if file.suffix != ".zip":
        return dict(load(file.read_bytes()))
    with zipfile.ZipFile(file) as archive:
        return dict(load(archive.read("model.safetensors")))


def compared(what: str, base: Arrays, new: Arrays) -> dict[str, Any]:
    """Whether all numbers are the same bit for bit, and the largest difference where they are not."""
    both = [name for name in base if name in new and base[name].shape == new[name].shape]
    differences = {name: _difference(base[name], new[name]) for name in both}
    where = max(differences, key=lambda name: differences[name][1], default="")
    absolute, relative = differences.get(where, (float("nan"), float("nan")))
    equal = sum(
        np.array_equal(base[name], new[name], equal_nan=base[name].dtype.kind == "f") for name in both
    )
    return {
        "what": what, "numbers": sum(base[name].size for name in both), "arrays": len(both), "equal_arrays": equal,
        "largest_difference": absolute, "of_its_size": relative, "where": where,
        "not_in_both": sorted((base.keys() | new.keys()) - set(both)),
    }  # fmt: skip


def _difference(base: NDArray[Any], new: NDArray[Any]) -> tuple[float, float]:
    """The largest absolute difference, and over the largest number; infinite where only one is NaN."""
    a, b = (np.atleast_1d(array).astype(np.float64) for array in (base, new))
    if a.size == 0 or (np.isnan(a) & np.isnan(b)).all():
        return 0.0, 0.0
    difference = np.abs(a - b)[~(np.isnan(a) & np.isnan(b))]
    largest = float(np.where(np.isnan(difference), np.inf, difference).max())
    return largest, largest / max(float(np.nanmax(np.abs(a))), 1e-12)


def _starting(arrays: Arrays, name: str) -> Arrays:
    return {key: value for key, value in arrays.items() if key.startswith(f"{name}, ")}


def number_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| what | numbers | equal | largest difference | of its size | where |", "|" + " --- |" * 6]
    for row in rows:
        equal = row["equal_arrays"] == row["arrays"] and not row["not_in_both"]
        cells = [
            row["what"],
            f"{row['numbers']:,}",
            "all" if equal else f"{row['equal_arrays']} of {row['arrays']} arrays",
        ]
        cells += (
            ["0", "0", ""]
            if equal
            else [f"{row['largest_difference']:.3g}", f"{row['of_its_size']:.3g}", row["where"]]
        )
        lines.append("| " + " | ".join(cells) + " |")
        if row["not_in_both"]:
            lines.append(
                f"| | | not in both | {len(row['not_in_both'])} | | {', '.join(row['not_in_both'][:4])} |"
            )
    return "\n".join(lines)
