"""Manipulation from scripted demonstrations: collect, pretrain and evaluate several policies, into one table.

    python benchmarks/manipulation.py robosuite              # does what is missing, evaluates, writes the JSON
    python benchmarks/manipulation.py robosuite --only=lift
    python benchmarks/manipulation.py robosuite --report     # only collects what is there
    python benchmarks/manipulation.py practice               # few demonstrations, then ReinFlow on success alone
    python benchmarks/manipulation.py practice-offpolicy     # few demonstrations, then EXPO on success alone
    python benchmarks/manipulation.py unseen                 # both anew, on seeds that no choice of a setting has seen

Demonstrations come from scripts/collect_demos.py, policies from scripts/pretrain.py (last checkpoint), figures from
scripts/evaluate.py on seeds that neither demonstrations nor training used. A success is compared with the bar that the
task was given beforehand. Square's settings and the number of demonstrations before fine-tuning were chosen by success on
the seeds of the first two suites; `unseen` evaluates the finished policies elsewhere. Results go to benchmarks/results/manipulation-<suite>.json.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import practice
from imitation import ROOT, Run, evaluate, publish, report, run_script, table, train_and_evaluate

from flowpolicy.data.store import read_demonstrations

RUNS = ROOT / "runs" / "benchmarks" / "manipulation"
# Objective -> the K it is evaluated at.
POLICIES = {"flow_matching": (10,), "shortcut": (1, 4), "regression": (1,), "mip": (2,)}


@dataclass(frozen=True)
class Study:
    """One task, its demonstrations, and what is expected of the policies.

    Attributes:
        env: the task, as in ``env=lift``.
        bar: success rate that at least one policy must reach; None: it is there to be compared.
        name: of its folder; empty: ``env``.
        source: the study whose demonstrations it uses; None: its own.
        env_options: overrides of the task, for all three scripts, e.g. ``env.env_kwargs.task=push-v3``.
        train_options: overrides of pretraining.
        policies: objectives, each with its K.
        seeds: of training.
        num_envs: environments of the evaluation that one process holds.
    """

    env: str
    bar: float | None
    name: str = ""
    source: Study | None = None
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
        return (self.source or self).folder / "demonstrations.zarr.zip"

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
SQUARE = Study("square", 0.70, env_options=ROTATION_6D, train_options=("model=medium", "train.steps=12000"))
STUDIES = [
    Study("lift", 0.95),
    Study("can", 0.85),
    SQUARE,
    # The task's own settings on the same demonstrations.
    Study("square", None, name="square-small", source=SQUARE, policies=("flow_matching",)),
]


def _few(
    env: str,
    name: str,
    demonstrations: int,
    steps: int,
    *practised: str,
    noise: float | None = None,
    options: tuple[str, ...] = (),
    **settings: Any,
) -> practice.Run:
    """A policy of few demonstrations, and fine-tuning; a chunk is executed whole, so that all that is scored was done.

    With ``noise`` the demonstrations are disturbed more than the task's are (DART)."""
    return practice.Run(
        RUNS / "practice",
        name,
        (f"env={env}", "env.action_horizon=4", *options),
        collecting=(
            f"episodes={demonstrations}",
            *(() if noise is None else (f"env.scripted.noise={noise}",)),
        ),
        training=(f"train.steps={steps}", "data.validation_fraction=0"),
        practice=("num_steps=1", *practised),
        num_envs=5,
        **settings,
    )


REINFLOW = ("num_envs=12", "workers=1", "action_clip=2.0", *practice.SUCCESS_ALONE, "total_steps=200000")
EXPO = (
    "algorithm=expo", *practice.LARGE_EDITS, "offpolicy.offline_updates=2000", "num_envs=8", "workers=0",
    "evaluation_envs=5", "total_steps=100000", "evaluate_episodes=50",
)  # fmt: skip
# Where a hand has to fetch, carry and place: edits that are sampled where they are deployed, longer targets.
PLACING = (
    *EXPO, "algorithm.temperature=0.2", "algorithm.samples_edits=true", "offpolicy.utd=1", "offpolicy.n_steps=10",
    "evaluate_every=50000",
)  # fmt: skip
OFFPOLICY = {"script": "finetune_offpolicy"}
LIFT = _few("lift", "lift-from-five", 5, 600, *REINFLOW)
PRACTICE = {
    "practice": [LIFT],
    "practice-offpolicy": [
        _few("lift", "lift-from-five-expo", 5, 600, *EXPO, "evaluate_every=20000", **OFFPOLICY),
        _few("can", "can-from-twelve-expo", 12, 1000, *PLACING, "total_steps=225000", noise=0.3, **OFFPOLICY),
    ],
    # A study: half a day of a core.
    "practice-square": [
        _few(
            "square",
            "square-from-fifty-expo",
            50,
            4000,
            *PLACING,
            "total_steps=1500000",
            noise=0.2,
            options=ROTATION_6D,
            **OFFPOLICY,
        )
    ],
}


def collect(study: Study, workers: int) -> None:
    """Make the demonstrations where there are none; 200 scripted episodes, or what the task's file says."""
    if study.source is not None:
        collect(study.source, workers)
    elif not study.store.exists():
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
    if study.bar is None:
        return {"bar": None, "best": best}
    reached = [f"{row['policy']} K={row['num_steps']}" for row in mine if row["success_rate"] >= study.bar]
    return {"bar": study.bar, "best": best, "reached_by": reached}


def robosuite(given: argparse.Namespace, command: str) -> tuple[dict[str, Any], str]:
    """Every task's policies: what was found, and a table of it."""
    if not given.report:
        for study in STUDIES:
            if given.only in (study.name or study.env):
                collect(study, given.workers)
                for run in study.runs():
                    train_and_evaluate(run, given.threads)
    content = report(given.suite, [run for study in STUDIES for run in study.runs()], command)
    content["tasks"] = {
        study.name or study.env: {
            "demonstrations": demonstrations_of(study),
            **judged(study, content["rows"]),
        }
        for study in STUDIES
    }
    bars = [f"{name}: best {task['best']}, bar {task['bar']}" for name, task in content["tasks"].items()]
    return content, "\n".join((table(content), *bars))


def practised(given: argparse.Namespace, command: str) -> tuple[dict[str, Any], str]:
    """Policies of few demonstrations before and after fine-tuning: results and their table."""
    runs = PRACTICE[given.suite]
    for run in () if given.report else runs:
        if given.only in run.name:
            practice.carry_out(run, given.threads, given.workers)
    content = practice.report(f"manipulation-{given.suite}", given.suite, runs, command)
    return content, practice.table(content)


def unseen(given: argparse.Namespace, command: str) -> tuple[dict[str, Any], str]:
    """Square's policies, and the fine-tuned one before and after, on seeds used for no choice of a setting."""
    runs = SQUARE.runs()
    if not given.report:
        for run in runs:
            evaluate(run, "unseen", given.threads, practice.UNSEEN, "video=0")
        if (LIFT.folder / "practise" / "summary.json").exists():
            practice.evaluate_unseen(LIFT, given.threads)
    content = report(given.suite, runs, command, "unseen")
    text = table(content)
    if found := practice.unseen(LIFT):
        content["practice"] = found
        text += f"\n{LIFT.name}: {found['before']:.2f} before, {found['after']:.2f} after fine-tuning"
    else:
        content["complete"], content["missing"] = False, [*content["missing"], LIFT.name]
    return content, text


SUITES = {"robosuite": robosuite, **dict.fromkeys(PRACTICE, practised), "unseen": unseen}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--report", action="store_true", help="collect what is there, train nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--workers", type=int, default=2, help="processes that collect demonstrations")
    parser.add_argument("--only", default="", help="only runs whose name contains this text")
    given = parser.parse_args()
    content, text = SUITES[given.suite](given, f"python benchmarks/manipulation.py {given.suite}")
    publish(f"manipulation-{given.suite}", content, text)


if __name__ == "__main__":
    main()
