"""The speed of two versions, whose processes take turns."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from version_processes import CHECKPOINT, QUIET, Turns, Version

LEAST_TURNS = 4


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


def measures(base: Version) -> list[Measure]:
    """All of them, with the base's checkpoint; a turn is a fraction of a second, as is what disturbs it."""
    checkpoint = str(base.root / CHECKPOINT)
    pretrain = ["pretrain", *QUIET]
    finetune = [
        "finetune-reinflow", *QUIET, f"checkpoint={checkpoint}", "workers=0", "reinflow.n_steps=8",
        "reinflow.critic_warmup=0", "reinflow.target_kl=null", "reinflow.adaptive_rate=false", "final_episodes=0",
    ]  # fmt: skip
    chunk = {"unit": "ms", "job": "latency", "factor": 1e3}
    return [
        Measure("pretraining", "samples/s", "inside", {"method": "training_step", "words": pretrain}, 2, 128, True),
        Measure("ReinFlow update, 128 chunks", "s", "inside", {"method": "update", "words": finetune}),
        Measure("chunk, eager", settings={"checkpoint": checkpoint, "backend": "eager"}, calls=20, **chunk),
        Measure("chunk, onnx", settings={"checkpoint": checkpoint, "backend": "onnx"}, calls=100, **chunk),
        Measure("control loop without inference", "us/tick", "ticks", {"checkpoint": checkpoint}, 2000, 1e6),
        *(
            Measure(statement, "ms", "import", {"statement": statement}, 1, 1e3)
            for statement in ("import flowpolicy", "from flowpolicy.policy import FlowPolicy")
        ),
    ]  # fmt: skip


def speed_row(
    measure: Measure, versions: list[Version], processes: int, seconds: float, work: Path
) -> dict[str, Any]:
    """Ratios of the turns of several pairs of processes, as one process may be slower than the next for good."""
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for _ in range(processes):
        with _turns(measure, versions, work) as turn:
            for version in versions:  # warms up
                turn(version)
            started, count = time.perf_counter(), 0
            while count < LEAST_TURNS or time.perf_counter() - started < seconds:
                order = versions if count % 2 else versions[::-1]
                found = {version.name: turn(version) for version in order}
                pairs.append((found["base"], found["new"]))
                count += 1
    ratios = sorted(base[0] / new[0] for base, new in pairs)
    reach = math.ceil(0.98 * math.sqrt(len(ratios)))  # ranks around the median, of the binomial distribution
    middle = len(ratios) // 2
    low, high = ratios[max(middle - reach, 0)], ratios[min(middle + reach, len(ratios) - 1)]
    return {
        "what": measure.name, "unit": measure.unit,
        "base": measure.value(statistics.median(base[0] for base, _ in pairs) / measure.calls),
        "new": measure.value(statistics.median(new[0] for _, new in pairs) / measure.calls),
        "ratio_median": statistics.median(ratios), "ratio_ci95": [low, high],
        "processor_ratio_median": statistics.median(base[1] / new[1] for base, new in pairs),
        "turns": len(pairs), "processes": processes,
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


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| what | base | new | ratio | 95% interval | ratio of processor time | turns |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        low, high = row["ratio_ci95"]
        cells = [row["what"], *(f"{row[name]:.4g} {row['unit']}" for name in ("base", "new"))]
        cells += [f"{row['ratio_median']:.3f}", f"{low:.3f} to {high:.3f}"]
        cells += [f"{row['processor_ratio_median']:.3f}", str(row["turns"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
