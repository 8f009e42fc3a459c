"""Two versions of the package, number by number and second by second, on this machine.

    python benchmarks/compare_versions.py --base PATH_OR_COMMIT        # this checkout against that one
    python benchmarks/compare_versions.py --base PATH --only numbers   # or speed, or a part of a row's name

`numbers`: pretraining and fine-tuning from fixed seeds (every logged metric, the weights, the chunks of the policy) and
every committed checkpoint of the base, sampled by both. `speed`: processes of both versions take turns; a ratio is the
base's seconds over the new one's in the same turn, so that above 1 the new one is faster, and its spread between two
checkouts of one version is the noise. What was measured of the same two commits before is kept; --again measures anew.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "peers" / "version_worker.py"
RESULT = ROOT / "benchmarks" / "results" / "compare-versions.json"
CHECKPOINT = "benchmarks/checkpoints/hopper-shortcut-seed0"
QUIET = ["env=hopper", "seed=0", "device=cpu", "video=0"]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Version:
    """One of the two.

    Attributes:
        name: ``base`` or ``new``.
        root: of its checkout.
        threads: of its processes.
    """

    name: str
    root: Path
    threads: int

    def process(self, job: str, settings: dict[str, Any], **options: Any) -> subprocess.Popen[str]:
        """A worker of this version."""
        words = [sys.executable, str(WORKER), str(self.root), job, json.dumps(settings)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(self.threads)}
        return subprocess.Popen(words, text=True, cwd=self.root, env=environment, **options)

    def do(self, job: str, settings: dict[str, Any]) -> str:
        """What a worker says that ends by itself."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.process(job, settings, **pipes)
        said, complaint = process.communicate()
        if process.returncode:
            raise SystemExit(f"{self.name} ({self.root}), {job} {settings}:\n{complaint[-3000:]}")
        return said

    def state(self) -> dict[str, Any]:
        """Commit, and a name for the changes to it; the two in common mean the same code."""
        commit = _git(self.root, "rev-parse", "HEAD")
        changed = _git(self.root, "status", "--porcelain", "--", "flowpolicy", "envs", "configs", "scripts")
        return {"git_commit": commit, "git_dirty": bool(changed)}


class Turns:
    """A worker that works so many times when told to, and says how long it took."""

    def __init__(self, version: Version, job: str, settings: dict[str, Any]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = version.process(job, settings, **pipes)
        self.name = f"{version.name}, {job} {settings}"

    def answer(self) -> Any:
        """The next line; the first says that it is ready."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended early")
        return json.loads(line)

    def seconds(self, times: int) -> tuple[float, float]:
        """By the clock and of the processor."""
        assert self.process.stdin
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        wall, computed = self.answer()
        return wall, computed

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


# Numbers -------------------------------------------------------------------------------------------------------------


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


# Speed ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """Something that both do in turns.

    Attributes:
        name: of the row.
        unit: of ``per_turn``.
        job: of the worker.
        settings: of the job.
        calls: in a turn.
        factor: what one call's seconds are multiplied by to give the unit.
        inverse: it is a rate, such as samples a second.
    """

    name: str
    unit: str
    job: str
    settings: dict[str, Any] = field(default_factory=dict)
    calls: int = 1
    factor: float = 1.0
    inverse: bool = False

    def value(self, seconds: float) -> float:
        """In the unit, of one call."""
        return self.factor / seconds if self.inverse else self.factor * seconds


def measures(checkpoint: str) -> list[Measure]:
    """All of them; ``checkpoint`` is the base's."""
    pretrain = ["pretrain", *QUIET]
    finetune = [
        "finetune-reinflow", *QUIET, f"checkpoint={checkpoint}", "workers=0", "reinflow.n_steps=32",
        "reinflow.critic_warmup=0", "reinflow.target_kl=null", "reinflow.adaptive_rate=false", "final_episodes=0",
    ]  # fmt: skip
    chunk = {"unit": "ms", "job": "latency", "factor": 1e3}
    return [
        Measure("pretraining", "samples/s", "inside", {"method": "training_step", "words": pretrain}, 10, 128, True),
        Measure("ReinFlow update, 512 chunks", "s", "inside", {"method": "update", "words": finetune}),
        Measure("chunk, eager", settings={"checkpoint": checkpoint, "backend": "eager"}, calls=200, **chunk),
        Measure("chunk, onnx", settings={"checkpoint": checkpoint, "backend": "onnx"}, calls=1000, **chunk),
        Measure("control loop without inference", "us/tick", "ticks", {"checkpoint": checkpoint}, 1, 1e3),
        *(
            Measure(statement, "ms", "import", {"statement": statement}, 1, 1e3)
            for statement in ("import flowpolicy", "from flowpolicy.policy import FlowPolicy")
        ),
    ]  # fmt: skip


def speed_row(
    measure: Measure, versions: list[Version], processes: int, turns: int, work: Path
) -> dict[str, Any]:
    """Ratios of all turns; new processes now and then, as one may be slower than the next for good."""
    pairs: list[list[tuple[float, float]]] = []
    for _ in range(processes):
        with _turns(measure, versions, work) as turn:
            for number in range(turns + 1):
                order = versions if number % 2 else versions[::-1]
                found = {version.name: turn(version) for version in order}
                if number:  # the first warms up
                    pairs.append([found["base"], found["new"]])
    ratios = np.array([[base / new for base, new in zip(*pair, strict=True)] for pair in pairs])
    seconds = {
        name: statistics.median(pair[place][0] for pair in pairs) / measure.calls
        for place, name in enumerate(("base", "new"))
    }
    low, high = np.quantile(ratios[:, 0], (0.25, 0.75))
    return {
        "what": measure.name, "unit": measure.unit,
        **{name: measure.value(value) for name, value in seconds.items()},
        "ratio_median": float(np.median(ratios[:, 0])), "ratio_quartiles": [float(low), float(high)],
        "processor_ratio_median": float(np.median(ratios[:, 1])), "turns": len(pairs), "processes": processes,
    }  # fmt: skip


@contextlib.contextmanager
def _turns(
    measure: Measure, versions: list[Version], work: Path
) -> Iterator[Callable[[Version], tuple[float, float]]]:
    """What does a turn of a version: a process that goes on, or one for each import."""
    if measure.job == "import":
        yield lambda version: tuple(json.loads(version.do("import", measure.settings)))
        return
    workers = {}
    for version in versions:
        settings = dict(measure.settings)
        if "words" in settings:
            folder = work / version.name
            shutil.rmtree(folder, ignore_errors=True)
            settings["words"] = [*settings["words"], f"run_dir={folder}"]
        workers[version.name] = Turns(version, measure.job, settings)
    for worker in workers.values():
        worker.answer()
    try:
        yield lambda version: workers[version.name].seconds(measure.calls)
    finally:
        for worker in workers.values():
            worker.close()


# All of it -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkout(path_or_commit: str) -> Iterator[Path]:
    """The folder of a version: the given one, or a temporary worktree of a commit."""
    if Path(path_or_commit).is_dir():
        yield Path(path_or_commit).resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        _git(ROOT, "worktree", "add", "--detach", str(folder), path_or_commit)
        try:
            yield folder
        finally:
            _git(ROOT, "worktree", "remove", "--force", str(folder))


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


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


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| what | base | new | ratio | quartiles | ratio of processor time | turns |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        cells = [row["what"], *(f"{row[name]:.4g} {row['unit']}" for name in ("base", "new"))]
        cells += [
            f"{row['ratio_median']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['processor_ratio_median']:.3f}",
            str(row["turns"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", required=True, help="a checkout of the other version, or a commit of this repository"
    )
    parser.add_argument("--only", default="", help="numbers, speed, or rows whose name contains this text")
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes, one after another")
    parser.add_argument("--turns", type=int, default=10, help="of each pair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with checkout(arguments.base) as root, tempfile.TemporaryDirectory() as temporary:
        compare(
            arguments,
            [Version("base", root, arguments.threads), Version("new", ROOT, arguments.threads)],
            Path(temporary),
        )


def compare(arguments: argparse.Namespace, both: list[Version], work: Path) -> None:
    """What is missing, one row after another; each is written down at once."""
    about = {version.name: version.state() for version in both}
    about["threads"] = arguments.threads
    before = read_json(arguments.output) if arguments.output.exists() else {}
    is_same = all(before.get(key) == value for key, value in about.items())
    found: dict[str, dict[str, Any]] = {"numbers": {}, "speed": {}}
    if is_same:
        found = {part: {row["what"]: row for row in before[part]} for part in found}

    def done(part: str, rows: list[dict[str, Any]]) -> None:
        print(time.strftime("%H:%M:%S"), *(row["what"] for row in rows), sep="  ", flush=True)
        found[part] |= {row["what"]: row for row in rows}
        content = {
            "command": f"python benchmarks/compare_versions.py --base {arguments.base}", **about,
            **{name: list(rows.values()) for name, rows in found.items()}, "machine": machine(),
            "versions": versions(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(arguments.output, content)

    def is_wanted(part: str, name: str) -> bool:
        is_new = arguments.again or not any(what.startswith(name) for what in found[part])
        return is_new and (arguments.only == part or arguments.only in name)

    for number, run in enumerate(RUNS):
        if is_wanted("numbers", run.name):
            done("numbers", run_rows(run, both, _folder(work / f"run-{number}")))
    if is_wanted("numbers", "sampling"):
        done("numbers", sampling_rows(both, work))
    for measure in measures(str(both[0].root / CHECKPOINT)):
        if is_wanted("speed", measure.name):
            done("speed", [speed_row(measure, both, arguments.processes, arguments.turns, work)])
    print(number_table(list(found["numbers"].values())))
    print(speed_table(list(found["speed"].values())))
    print(arguments.output)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    main()
