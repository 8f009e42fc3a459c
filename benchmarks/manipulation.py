"""Manipulation from scripted demonstrations: collect, pretrain and evaluate several policies, into one table.

    python benchmarks/manipulation.py robosuite              # does what is missing, evaluates, writes the JSON
    python benchmarks/manipulation.py robosuite --only=lift
    python benchmarks/manipulation.py robosuite --report     # only collects what is there

Demonstrations come from scripts/collect_demos.py, policies from scripts/pretrain.py (last checkpoint), figures from
scripts/evaluate.py on seeds that neither demonstrations nor training used. A success is compared with the bar that the
task was given beforehand. Results go to benchmarks/results/manipulation-<suite>.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imitation import ROOT, Run, report, run_script, table, train_and_evaluate

from flowpolicy.data.store import read_demonstrations
from flowpolicy.storage import write_json

RUNS = ROOT / "runs" / "benchmarks" / "manipulation"
# Objective -> the K it is evaluated at.
POLICIES = {"flow_matching": (10,), "shortcut": (1, 4), "regression": (1,), "mip": (2,)}


@dataclass(frozen=True)
class Study:
    """One task, its demonstrations, and what is expected of the policies.

    Attributes:
        env: the task, as in ``env=lift``.
        bar: success rate that at least one policy must reach.
        name: of its folder; empty: ``env``.
        store_of: the study whose demonstrations it uses; empty: its own.
        env_options: overrides of the task, for all three scripts, e.g. ``env.env_kwargs.task=push-v3``.
        train_options: overrides of pretraining.
        policies: objectives, each with its K.
        seeds: of training.
        num_envs: environments of the evaluation that one process holds.
    """

    env: str
    bar: float
    name: str = ""
    store_of: str = ""
    env_options: tuple[str, ...] = ()
    train_options: tuple[str, ...] = ()
    policies: tuple[str, ...] = tuple(POLICIES)
    seeds: tuple[int, ...] = (0,)
    num_envs: int = 5

    @property
    def folder(self) -> Path:
        return RUNS / (self.name or self.env)

    @property
    def store(self) -> Path:
        return RUNS / (self.store_of or self.name or self.env) / "demonstrations.zarr.zip"

    def runs(self) -> list[Run]:
        return [
            Run(
                self.env,
                policy,
                seed,
                POLICIES[policy],
                options=(f"data.path={self.store.relative_to(ROOT)}", *self.train_options),
                env_options=self.env_options,
                num_envs=self.num_envs,
                root=self.folder.parent,
                name=self.name or self.env,
            )
            for seed in self.seeds
            for policy in self.policies
        ]


# The hand points down, where a quaternion's sign jumps; six numbers turn with it.
ROTATION_6D = (
    "env.env_kwargs.rotation_6d=true",
    "env.observation_keys=[robot0_eef_pos,robot0_eef_rot6d,robot0_gripper_qpos,object]",
)
SUITES: dict[str, list[Study]] = {
    "robosuite": [
        Study("lift", 0.95),
        Study("can", 0.85),
        Study("square", 0.70, env_options=ROTATION_6D, train_options=("model=medium", "train.steps=12000")),
        # The same with the task's own settings.
        Study("square", 0.70, name="square-small", store_of="square", policies=("flow_matching",)),
    ],
}


def collect(study: Study, workers: int) -> None:
    """Make the demonstrations where there are none; 200 scripted episodes, or what the task's file says."""
    if not study.store.exists():
        options = [f"env={study.env}", *study.env_options, "level=scripted", f"workers={workers}"]
        out = [
            f"out={study.store.relative_to(ROOT)}",
            f"run_dir={(study.folder / 'collect').relative_to(ROOT)}",
        ]
        run_script("collect_demos", *options, *out)


def demonstrations_of(study: Study) -> dict[str, Any]:
    """How a study's demonstrations were made."""
    if not study.store.exists():
        return {}
    demos = read_demonstrations(study.store, keys=[])
    kept = ("ways", "episodes_played", "success_rate_played", "seed", "command", "versions")
    found = {key: demos.attributes[key] for key in kept if key in demos.attributes}
    lengths = demos.episode_lengths
    return {"episodes": demos.num_episodes, "steps": demos.num_steps, "length_mean": lengths.mean(), **found}


def judged(study: Study, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of the study's rows against its bar."""
    mine = [row for row in rows if row["task"] == (study.name or study.env)]
    best = max((row["success_rate"] for row in mine), default=None)
    reached = [f"{row['policy']} K={row['num_steps']}" for row in mine if row["success_rate"] >= study.bar]
    return {"bar": study.bar, "best": best, "reached_by": reached}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--report", action="store_true", help="collect what is there, train nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--workers", type=int, default=2, help="processes that collect demonstrations")
    parser.add_argument("--only", default="", help="only tasks whose name contains this text")
    arguments = parser.parse_args()
    studies = SUITES[arguments.suite]
    if not arguments.report:
        for study in studies:
            if arguments.only in (study.name or study.env):
                collect(study, arguments.workers)
                for run in study.runs():
                    train_and_evaluate(run, arguments.threads)
    runs = [run for study in studies for run in study.runs()]
    content = report(arguments.suite, runs, f"python benchmarks/manipulation.py {arguments.suite}")
    content["tasks"] = {
        study.name or study.env: {
            "demonstrations": demonstrations_of(study),
            **judged(study, content["rows"]),
        }
        for study in studies
    }
    write_json(ROOT / "benchmarks" / "results" / f"manipulation-{arguments.suite}.json", content)
    print(table(content))
    for name, found in content["tasks"].items():
        print(name, json.dumps({key: found[key] for key in ("bar", "best", "reached_by")}))
    if not content["complete"]:
        print(f"INCOMPLETE: {len(content['missing'])} runs are missing: {', '.join(content['missing'])}")


if __name__ == "__main__":
    main()
