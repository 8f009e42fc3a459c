"""Copy the checkpoints that later work starts from to benchmarks/checkpoints, in half precision.

    python benchmarks/keep_checkpoints.py

Takes them from the runs of benchmarks/imitation.py, finetuning.py and distillation.py; the command that made each is written
beside them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flowpolicy import FlowPolicy
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks"
KEPT = (
    "hopper/shortcut-seed0",
    "hopper/shortcut-seed1",
    "hopper/shortcut-seed2",
    "hopper/flow_matching-seed0",
    "hopper/flow_matching-4-a-token-seed0",
    "pusht/flow_matching-seed0",
    "pusht/flow_matching-medium-seed0",
    "pusht/shortcut-seed0",
    "walker2d/flow_matching-seed0",
    "walker2d/flow_matching-4-a-token-seed0",
    "walker2d/shortcut-seed0",
    "halfcheetah/shortcut-seed0",
    "halfcheetah/shortcut-T1-seed0",
    "adroit_door/flow_matching-seed0",
)
TUNED = (
    "hopper/reinflow-seed0",
    "walker2d/reinflow-seed0",
    "halfcheetah/reinflow-seed0",
    "adroit_door/reinflow-seed0",
)
DISTILLED = ("hopper/direct-K1-seed0",)


def main() -> None:
    target = ROOT / "benchmarks" / "checkpoints"
    made = json.loads((target / "commands.json").read_text())  # of those whose runs are not here any more
    trainings = {name: RUNS / "imitation" / name / "train" for name in KEPT}
    trainings |= {name: RUNS / "finetuning" / name for name in TUNED}
    trainings |= {name: RUNS / "distillation" / name / "train" for name in DISTILLED}
    for name, training in trainings.items():
        if not (training / "summary.json").exists():
            print(f"{name}: no finished run, skipped")
            continue
        folder = target / name.replace("/", "-")
        FlowPolicy.load(training / "checkpoint").save(folder, dtype=torch.float16)
        summary = json.loads((training / "summary.json").read_text())
        made[folder.name] = {key: summary[key] for key in ("command", "date", "versions", "machine")}
        print(folder.relative_to(ROOT))
    write_json(target / "commands.json", made)


if __name__ == "__main__":
    main()
