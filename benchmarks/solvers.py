"""Solvers and grids at 1 to 8 network evaluations (NFE): what a chunk is worth in episodes, and what it costs.

    python benchmarks/solvers.py pusht                    # cell by cell what is missing, then the JSON
    python benchmarks/solvers.py pusht --nfe 3 4          # these first
    python benchmarks/solvers.py pusht --report           # times what is there and writes the JSON

Every cell is one way of sampling over paired episodes: the same environment seeds and the same x_0 at the same
chunk of an episode, so that differences to Euler on the uniform grid at the same NFE are paired. Searched solvers
are found on demonstrations, or in episodes from seed 5,000,000 where there are none; evaluation's seeds begin at
1,000,000. Results go to benchmarks/results/solvers-<task>.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from earlier import with_earlier

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.engine import random_observations
from flowpolicy.acceleration.observations import CALIBRATION_SEED, observations_of, recorded_observations
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.acceleration.solver_search import SearchConfig, search_sampling
from flowpolicy.evaluation.rollout import EVALUATION_SEED, evaluate
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval, wilson_interval
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy.searched import SearchedSampling

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks"
OBSERVATIONS, ITERATIONS, SOURCES = 256, 60, 32  # of a search: rows, moves, and episodes they come from
CALLS, ROUND = 300, 20


@dataclass(frozen=True)
class Study:
    """A policy, where searches take their observations from, how it is evaluated, and its cells.

    Attributes:
        nfe: in the order in which they are measured.
        methods: of sampling; empty: all.
    """

    checkpoint: str
    demonstrations: str | None
    episodes: int
    num_envs: int = 50
    nfe: tuple[int, ...] = (3, 4, 2, 5, 6, 8, 1, 7)
    methods: tuple[str, ...] = ()


LIFT = "runs/benchmarks/manipulation/practice/lift-from-five"
STUDIES = {
    "pusht": Study("benchmarks/checkpoints/pusht-flow_matching-seed0", "demonstrations/pusht.zarr.zip", 400),
    "pusht-medium": Study(
        "benchmarks/checkpoints/pusht-flow_matching-medium-seed0", "demonstrations/pusht.zarr.zip", 400
    ),
    # Of `python benchmarks/imitation.py pusht-deep`: the policy of the study of caching, at the K that take as long.
    "pusht-deep": Study(
        "runs/benchmarks/imitation/pusht/flow_matching-deep-seed0/train/checkpoint",
        "demonstrations/pusht.zarr.zip",
        300,
        nfe=(10, 4, 100, 12),
        methods=("euler", "ab3, shifted"),
    ),
    "hopper": Study("benchmarks/checkpoints/hopper-flow_matching-seed0", None, 200),
    # Of `python benchmarks/manipulation.py practice`: from five demonstrations, so that not all episodes succeed. They are
    # too few to search on.
    "lift": Study(f"{LIFT}/train/checkpoint", None, 100, num_envs=5),
}
SHIFTED = {"name": "shifted", "shift": 0.5}
METHODS: dict[str, tuple[str, dict[str, Any], int]] = {  # solver, grid, evaluations a step
    "euler": ("euler", {"name": "uniform"}, 1),
    "euler, shifted": ("euler", SHIFTED, 1),
    "ab3, shifted": ("ab3", SHIFTED, 1),
    "midpoint": ("midpoint", {"name": "uniform"}, 2),
    "taylor": ("taylor", {"name": "uniform"}, 2),
}
SEARCHED = "searched"


class Bench:
    """One study's files and what they are made with."""

    def __init__(self, name: str) -> None:
        self.study, self.folder = STUDIES[name], RUNS / "solvers" / name
        self.results = ROOT / "benchmarks" / "results" / f"solvers-{name}.json"
        self.policy = FlowPolicy.load(ROOT / self.study.checkpoint)
        self.task: Task = task_of(self.policy.spec.task, None, self.study.checkpoint)

    def cells(self, nfes: Sequence[int] = (), methods: Sequence[str] = ()) -> list[tuple[int, str]]:
        """NFE and method of each, or of these; at one evaluation all are Euler's single step."""
        every = self.study.methods or (*METHODS, SEARCHED)
        named = [name for name in every if name in (methods or every)]
        known = [(nfe, name) for nfe in nfes or self.study.nfe for name in named]
        return [
            (nfe, name)
            for nfe, name in known
            if name == "euler" or (nfe > 1 and nfe % METHODS.get(name, ("", {}, 1))[2] == 0)
        ]

    def sampling(self, nfe: int, method: str) -> SamplerSpec:
        """The cell's way of sampling; a searched one must have been found."""
        if method == SEARCHED:
            return SearchedSampling.load(self.searched(nfe)).sampling
        solver, grid, evaluations = METHODS[method]
        return SamplerSpec(num_steps=nfe // evaluations, solver=solver, grid=grid)

    def searched(self, nfe: int) -> Path:
        """File of the searched solver."""
        return self.folder / f"searched-{nfe}.json"

    def cell(self, nfe: int, method: str) -> Path:
        """File of the cell's episodes."""
        return self.folder / f"{nfe}-{method.replace(', ', '-')}.json"

    def search(self, nfe: int) -> None:
        """Find the searched solver."""
        config = SearchConfig(
            checkpoint=self.study.checkpoint, nfe=nfe, demonstrations=self.study.demonstrations,
            observations=OBSERVATIONS, test_observations=OBSERVATIONS, episodes=SOURCES, iterations=ITERATIONS,
        )  # fmt: skip
        found = search_sampling(self.policy, self.observations(0), self.observations(SOURCES), config)
        print(found.table(), flush=True)
        write_json(self.folder / f"errors-{nfe}.json", dict(found.errors))
        found.found.save(self.searched(nfe))

    def observations(self, further: int) -> dict[str, torch.Tensor]:
        """For searches, from seed 5,000,000 and ``further`` on."""
        seed, store = CALIBRATION_SEED + further, self.study.demonstrations
        if store is None:
            return observations_of(self.policy, self.task, OBSERVATIONS, episodes=SOURCES, seed=seed)
        return recorded_observations(self.policy, self.task, OBSERVATIONS, SOURCES, seed, str(ROOT / store))

    def run(self, nfe: int, method: str, episodes: int) -> None:
        """The cell's episodes."""
        started, sampling = time.time(), self.policy.checked(self.sampling(nfe, method))
        assert self.policy.objective.nfe(sampling) == nfe
        own, self.policy.sampling = self.policy.sampling, sampling
        try:
            result = evaluate(self.policy, self.task, episodes=episodes, num_envs=self.study.num_envs)
        finally:
            self.policy.sampling = own
        found = {"return": result.returns, "score": result.score, "success": result.success}
        write_json(self.cell(nfe, method), {
            "nfe": nfe, "method": method, "sampling": sampling.content(), "episodes": episodes,
            **{name: values.tolist() for name, values in found.items() if values is not None},
            "wall_seconds": time.time() - started, "inference_seconds": result.inference_seconds,
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "git_commit": git_state()[0],
        })  # fmt: skip

    def milliseconds(self, samplings: list[SamplerSpec]) -> list[float]:
        """Median time of one chunk in ONNX Runtime, one thread, all of them taking turns."""
        exports: dict[str, bytes] = {}
        samplers = [build_sampler(self.policy, each, backend="onnx", exports=exports) for each in samplings]
        generator = torch.Generator().manual_seed(0)
        observation = random_observations(self.policy, 1, generator)
        noise = self.policy.noise(1, None, generator)
        times: list[list[float]] = [[] for _ in samplers]
        for _ in range(CALLS // ROUND):
            for sampler, mine in zip(samplers, times, strict=True):
                for _ in range(ROUND):
                    started = time.perf_counter()
                    sampler(observation, noise)
                    mine.append(1e3 * (time.perf_counter() - started))
        return [float(np.median(mine[ROUND:])) for mine in times]

    def collect(self) -> dict[str, Any]:
        """All cells that are there, each with its paired differences to Euler's at the same NFE."""
        cells = self.cells(sorted(self.study.nfe))
        found = [read_json(path) for cell in cells if (path := self.cell(*cell)).exists()]
        euler = {cell["nfe"]: cell for cell in found if cell["method"] == "euler"}
        costs = self.milliseconds([SamplerSpec(**cell["sampling"]) for cell in found])
        rows = []
        for cell, cost in zip(found, costs, strict=True):
            row = {key: cell[key] for key in ("nfe", "method", "sampling", "episodes", "date", "git_commit")}
            row["onnx_ms"] = cost
            errors = self.folder / f"errors-{cell['nfe']}.json"
            if errors.exists():
                name = SEARCHED if cell["method"] == SEARCHED else str(SamplerSpec(**cell["sampling"]))
                row["rms_error_where_searched"], row["rms_error_on_others"] = read_json(errors)[name]
            for metric in ("score", "success") if "score" in cell else ("success", "return"):
                if metric in cell:
                    row |= _figures(metric, cell, euler.get(cell["nfe"]))
            rows.append(row)
        return {
            "command": f"python benchmarks/solvers.py {self.folder.name}",
            "checkpoint": self.study.checkpoint,
            "protocol": f"episodes from seed {EVALUATION_SEED}, x_0 from generators of the same seeds; ONNX "
            f"Runtime, one thread, one chunk, median of {CALLS - ROUND} calls in turns of {ROUND}; searches: "
            f"{OBSERVATIONS} observations of {SOURCES} episodes, {ITERATIONS} moves, "
            f"{self.study.demonstrations or 'in the task'}, from seed {CALIBRATION_SEED}",
            "missing": [f"{nfe} {name}" for nfe, name in cells if not self.cell(nfe, name).exists()],
            "rows": rows,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "git_commit": git_state()[0],
        }


def _figures(metric: str, cell: dict[str, Any], euler: dict[str, Any] | None) -> dict[str, Any]:
    values = np.asarray(cell[metric], dtype=np.float64)
    is_rate = metric == "success"
    interval = wilson_interval(int(values.sum()), len(values)) if is_rate else mean_interval(values)
    figures: dict[str, Any] = {metric: float(values.mean()), f"{metric}_ci95": list(interval)}
    if euler is not None and euler is not cell:
        both = min(len(values), euler["episodes"])
        other = np.asarray(euler[metric][:both], dtype=np.float64)
        figures[f"{metric}_to_euler"] = float((values[:both] - other).mean())
        figures[f"{metric}_to_euler_ci95"] = list(paired_difference_interval(values[:both], other))
    return figures


def table(content: dict[str, Any]) -> str:
    """Markdown: a line for each cell."""
    metrics = [name for name in ("score", "success", "return") if name in content["rows"][0]]
    head = ["NFE", "sampling", *(text for name in metrics for text in (name, "to Euler")), "error", "ONNX ms"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in content["rows"]:
        cells = [str(row["nfe"]), row["method"]]
        for name in metrics:
            digits = 0 if name == "return" else 3
            for key, sign in ((name, ""), (f"{name}_to_euler", "+")):
                given = key in row
                low, high = row[f"{key}_ci95"] if given else (0.0, 0.0)
                span = (
                    f"{row.get(key, 0.0):{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
                )
                cells.append(span if given else "")
        error = row.get("rms_error_on_others")
        cells += ["" if error is None else f"{error:.4f}", f"{row['onnx_ms']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(STUDIES))
    parser.add_argument("--nfe", type=int, nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, SEARCHED], default=[])
    parser.add_argument("--episodes", type=int, help="of each cell, in place of the study's")
    parser.add_argument("--report", action="store_true", help="collect what is there, run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.task)
    for nfe, method in [] if arguments.report else bench.cells(arguments.nfe, arguments.methods):
        if method == SEARCHED and not bench.searched(nfe).exists():
            bench.search(nfe)
        if not bench.cell(nfe, method).exists():
            print(f"{nfe} NFE, {method}", flush=True)
            bench.run(nfe, method, arguments.episodes or bench.study.episodes)
    missing = [cell for cell in bench.cells() if not bench.cell(*cell).exists()]
    if missing and not arguments.report:
        print(f"{len(missing)} cells are missing; --report shows those that are there.")
        return
    content = bench.collect()
    if not content["rows"]:
        sys.exit(f"No cell has been run; {bench.results.name} stays as it is.")
    every = [f"{nfe} {method}" for nfe, method in bench.cells(sorted(bench.study.nfe))]
    content = with_earlier(bench.results.stem, content, lambda row: [f"{row['nfe']} {row['method']}"], every)
    write_json(bench.results, content)
    print(table(content))
    if content["missing"]:
        print(f"INCOMPLETE: {len(content['missing'])} cells are missing: {'; '.join(content['missing'])}")


if __name__ == "__main__":
    main()
