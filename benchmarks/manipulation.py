"""Manipulation from scripted demonstrations: collect, pretrain and evaluate several policies, into one table.

    python benchmarks/manipulation.py robosuite              # does what is missing, evaluates, writes the JSON
    python benchmarks/manipulation.py robosuite --only=lift
    python benchmarks/manipulation.py robosuite --report     # only collects what is there
    python benchmarks/manipulation.py practice               # few demonstrations, then ReinFlow on success alone

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

import metaworld
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


# The hand's orientation as six continuous numbers in place of a quaternion.
ROTATION_6D = (
    "env.env_kwargs.rotation_6d=true",
    "env.observation_keys=[robot0_eef_pos,robot0_eef_rot6d,robot0_gripper_qpos,object]",
)
STUDIES = [
    Study("lift", 0.95),
    Study("can", 0.85),
    Study("square", 0.70, env_options=ROTATION_6D, train_options=("model=medium", "train.steps=12000")),
    # The same with the task's own settings.
    Study("square", 0.70, name="square-small", store_of="square", policies=("flow_matching",)),
]
# As on Meta-World, with the noise of other tasks: a chunk is executed whole, so that all of what is scored was done.
PRACTICE = [
    metaworld.Run(
        "lift-from-five",
        ("env=lift", "env.action_horizon=4"),
        collecting=("episodes=5",),
        training=("train.steps=600", "data.validation_fraction=0"),
        practice=(
            "num_steps=1", "total_steps=200000", "num_envs=12", "workers=1", "action_clip=2.0",
            "reinflow.n_steps=50", "reinflow.batch_size=200", "reinflow.n_epochs=8",
            "reinflow.target_kl=0.3", "reinflow.critic_warmup=2",
        ),
        num_envs=5,
        root=RUNS / "practice",
    )
]  # fmt: skip


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


def robosuite(only: str, threads: int, workers: int, *, report_only: bool) -> tuple[dict[str, Any], str]:
    """Every task's policies; what was found, and a table of it."""
    if not report_only:
        for study in STUDIES:
            if only in (study.name or study.env):
                collect(next(s for s in STUDIES if s.store == study.store), workers)
                for run in study.runs():
                    train_and_evaluate(run, threads)
    runs = [run for study in STUDIES for run in study.runs()]
    content = report("robosuite", runs, "python benchmarks/manipulation.py robosuite")
    content["tasks"] = {
        study.name or study.env: {
            "demonstrations": demonstrations_of(study),
            **judged(study, content["rows"]),
        }
        for study in STUDIES
    }
    return content, table(content)


def practice(only: str, threads: int, *, report_only: bool) -> tuple[dict[str, Any], str]:
    """Policies of few demonstrations before and after practice; what was found, and a table of it."""
    if not report_only:
        for run in PRACTICE:
            if only in run.name:
                metaworld.carry_out(run, threads)
    content = metaworld.report("practice", PRACTICE, "python benchmarks/manipulation.py practice")
    return content, metaworld.table(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=("robosuite", "practice"))
    parser.add_argument("--report", action="store_true", help="collect what is there, train nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--workers", type=int, default=2, help="processes that collect demonstrations")
    parser.add_argument("--only", default="", help="only tasks whose name contains this text")
    given = parser.parse_args()
    if given.suite == "robosuite":
        content, found = robosuite(given.only, given.threads, given.workers, report_only=given.report)
    else:
        content, found = practice(given.only, given.threads, report_only=given.report)
    write_json(ROOT / "benchmarks" / "results" / f"manipulation-{given.suite}.json", content)
    print(found)
    for name, task in content.get("tasks", {}).items():
        print(name, json.dumps({key: task[key] for key in ("bar", "best", "reached_by")}))
    if not content["complete"]:
        print(f"INCOMPLETE: {len(content['missing'])} runs are missing: {', '.join(content['missing'])}")


if __name__ == "__main__":
    main()
