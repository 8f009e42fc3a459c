"""Fine-tune over tasks and seeds, resumably, into one table.

    python benchmarks/finetuning.py hopper            # runs what is missing, writes the JSON and the curves
    python benchmarks/finetuning.py hopper --report   # only collects what is there
    python benchmarks/finetuning.py table             # all suites beside the published figures, one picture

Every run is the real `scripts/finetune_reinflow.py` or `finetune_offpolicy.py`; the command of each is in the table.
Results go to benchmarks/results/finetuning-<suite>.json; a suite whose runs are not all there says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from earlier import with_earlier
from imitation import run_script
from practice import LARGE_EDITS, SUCCESS_ALONE

from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.evaluation.statistics import (
    mean_interval_by_seed,
    paired_difference_interval,
    success_interval_by_seed,
)
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.plots.learning import plot_finetuning_bands
from flowpolicy.runs.loggers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks" / "finetuning"
RESULTS = ROOT / "benchmarks" / "results"
BASES = Path("benchmarks/checkpoints")


@dataclass(frozen=True)
class Run:
    """One fine-tuning run.

    Attributes:
        base: name of a committed checkpoint, or the path of one that another benchmark makes.
    """

    env: str
    base: str
    seed: int
    options: tuple[str, ...] = ()
    label: str = "reinflow"
    processes: int = 1
    script: str = "finetune_reinflow"

    @property
    def folder(self) -> Path:
        return RUNS / self.env / f"{self.label}-seed{self.seed}"

    @property
    def checkpoint(self) -> Path:
        return Path(self.base) if "/" in self.base else BASES / self.base


def _runs(
    env: str, base: str, seeds: range, *options: str, label: str = "reinflow", processes: int = 1
) -> list[Run]:
    return [Run(env, base, seed, options, label, processes) for seed in seeds]


def _rules(
    env: str, base: str, seeds: range, rules: tuple[str, ...], *options: str, suffix: str = ""
) -> list[Run]:
    """The same runs with each update rule."""
    return [
        run
        for rule in rules
        for run in _runs(env, base, seeds, f"update={rule}", *options, label=f"{rule}{suffix}")
    ]


def _offpolicy(
    env: str, base: str, seeds: range, algorithms: tuple[str, ...], *options: str, suffix: str = ""
) -> list[Run]:
    """The same runs with each off-policy algorithm."""
    return [
        Run(env, base, seed, (f"algorithm={name}", *options), f"{name}{suffix}", script="finetune_offpolicy")
        for name in algorithms
        for seed in seeds
    ]


# At 20 Hz and one action per chunk, a chunk of four would be three parts work for nothing. The pretrained shortcut
# model is as good at K = 1 as at K = 4, and K = 1 costs a quarter. A running robot's torques are at their bounds most of
# the time: a mean held at the bound could not be pulled back, so it is held further out, and the environment bounds.
CHEETAH = (
    "env.action_horizon=1", "env.execute_horizon=1", "num_steps=1", "num_envs=32", "reinflow.gamma=0.98",
    "reinflow.gae_lambda=0.92", "reinflow.final_learning_rate=0.1",
    "reinflow.batch_size=1024", "reinflow.learning_rate=6e-4", "noise.maximum=0.3", "action_clip=2.0",
    "total_steps=3000000", "evaluate_every=500000",
)  # fmt: skip
CHEETAH_BASE = "halfcheetah-shortcut-T1-seed0"
SHORT_CHEETAH = (*CHEETAH, "total_steps=1500000", "evaluate_every=250000", "reinflow.n_steps=64")
HOPPER = ("total_steps=500000", "evaluate_every=50000")
COMPARED = ("total_steps=300000", "evaluate_every=100000", "evaluate_episodes=50")
TOKEN = "hopper-flow_matching-4-a-token-seed0"
WALKER = "walker2d-flow_matching-4-a-token-seed0"
HALF_A_MILLION = ("total_steps=500000", "evaluate_every=100000", "evaluate_episodes=50")
# A base of two demonstrations, which `python benchmarks/metaworld.py practice` makes; a success ends the episode.
DRAWER = "runs/benchmarks/metaworld/drawer-open-v3-from-two-seed0/train/checkpoint"
TWO = "demonstrations=runs/benchmarks/metaworld/drawer-open-v3-from-two-seed0/collect/demonstrations.zarr.zip"
DRAWER_OPEN = (
    "env.env_kwargs.task=drawer-open-v3", "env.env_kwargs.max_episode_steps=150", "env.action_horizon=4",
    "num_envs=16", "num_steps=1", "total_steps=200000", "evaluate_every=50000", "evaluate_episodes=50",
)  # fmt: skip
DRAWER_NOISE = (
    "action_clip=2.0", *SUCCESS_ALONE, "reinflow.learning_rate=3.0e-4",
    "noise.minimum=0.35", "noise.maximum=0.8", "noise.final_maximum=0.4",
)  # fmt: skip
DRAWER_BRANCHES = (*DRAWER_OPEN, *DRAWER_NOISE, "advantages=group", "advantages.branch_length=10")
RULES = ("ppo", "nft", "awm", "tempflow", "gdro")
OFFPOLICY = ("expo", "qchunk", "dsrl")
# The 25 human demonstrations are half of each batch; import them first (docs/off_policy.md).
DOOR_BASE = "adroit_door-flow_matching-seed0"
DOOR = ("total_steps=200000", "evaluate_every=25000", "evaluate_episodes=50")
OFFLINE = "offpolicy.offline_updates=2000"
SPARSE = "runs/benchmarks/finetuning/adroit-door-sparse.zarr.zip"
# Suites whose policies, base and tuned, are evaluated on more episodes than each run's own 100, which come first among them.
JUDGED = {"adroit_door-offpolicy": 300, "adroit_door-sparse": 300}
SUITES: dict[str, list[Run]] = {
    "hopper": _runs("hopper", "hopper-shortcut-seed0", range(3), *HOPPER),
    # The same on two cores: two processes share the gradient, each with half of the environments.
    "hopper-two-processes": _runs(
        "hopper", "hopper-shortcut-seed0", range(3), *HOPPER, label="two-processes", processes=2
    ),
    "hopper-long": _runs("hopper", "hopper-shortcut-seed0", range(3), "total_steps=1000000", label="1M"),
    "hopper-steps": [
        *_runs("hopper", "hopper-shortcut-seed0", range(1), *HOPPER, "num_steps=1", label="K1"),
        *_runs("hopper", "hopper-shortcut-seed0", range(1), *HOPPER, "num_steps=2", label="K2"),
        *_runs("hopper", "hopper-flow_matching-seed0", range(1), *HOPPER, label="flow_matching"),
        *_runs("hopper", "hopper-shortcut-seed0", range(1), *HOPPER, "distill.steps=3000", label="distilled"),
    ],
    # From a student that benchmarks/distillation.py makes, whose K = 1 the chain takes over.
    "hopper-one-step": _runs("hopper", "hopper-direct-K1-seed0", range(3), *HOPPER, label="one-step"),
    "walker2d": _runs("walker2d", "walker2d-flow_matching-seed0", range(1), "evaluate_every=250000"),
    "halfcheetah": _runs("halfcheetah", CHEETAH_BASE, range(1), *CHEETAH),
    # What a user with two cores and a few minutes does: the chunk is one token, both cores simulate and compute.
    "hopper-fast": _runs(
        "hopper",
        "hopper-flow_matching-4-a-token-seed0",
        range(3),
        "update=nft",
        "total_steps=200000",
        "workers=null",
        "reinflow.ema_decay=0.9",
        label="nft-fast",
    ),
    # Every way to learn from reward on one base, whose chunk is one token: what each makes of 0.3M steps, and stands at
    # after 0.1M. gdro's steps are the pretrained policy's; nft-group has its advantages among branches from one state.
    "hopper-rules": [
        *_rules("hopper", TOKEN, range(3), RULES, *COMPARED),
        *_rules("hopper", TOKEN, range(3), ("nft",), "advantages=group", *COMPARED, suffix="-group"),
        *_offpolicy("hopper", TOKEN, range(3), OFFPOLICY, *COMPARED),
    ],
    # Where exploration comes from: chain noise, as in the runs above, or x_0 alone.
    "hopper-exploration": _rules(
        "hopper", TOKEN, range(3), ("nft", "awm"), *COMPARED, "update.injects_noise=false", suffix="-x0"
    ),
    "walker2d-rules": [
        *_rules("walker2d", WALKER, range(1), RULES, *HALF_A_MILLION),
        *_rules("walker2d", WALKER, range(1), ("nft",), "advantages=group", *HALF_A_MILLION, suffix="-group"),
        *_offpolicy("walker2d", WALKER, range(1), OFFPOLICY, *HALF_A_MILLION),
    ],
    # Twice as many iterations as by default, of half the chunks: the bound of each is what awm's policy moves by. Their average
    # over iterations is deployed. The noise is more than by default: a walk that stands it stands what it comes to without.
    "walker2d-1M": _rules(
        "walker2d",
        WALKER,
        range(3),
        ("awm",),
        "total_steps=1000000",
        "evaluate_every=100000",
        "reinflow.n_steps=64",
        "reinflow.ema_decay=0.9",
        "noise.maximum=0.3",
        "noise.minimum=0.12",
        "noise.final_maximum=0.2",
        suffix="-1M",
    ),
    # Branches of ten chunks, which divide an iteration, where there are groups. With success alone EXPO's edits are large.
    "drawer_open-rules": [
        *_rules("metaworld", DRAWER, range(1), RULES[:-1], *DRAWER_OPEN, *DRAWER_NOISE),
        *_rules("metaworld", DRAWER, range(1), RULES[-1:], *DRAWER_BRANCHES),
        *_rules("metaworld", DRAWER, range(1), ("nft",), *DRAWER_BRANCHES, suffix="-group"),
        *_offpolicy("metaworld", DRAWER, range(1), ("expo",), *DRAWER_OPEN, TWO, OFFLINE, *LARGE_EDITS),
        *_offpolicy("metaworld", DRAWER, range(1), OFFPOLICY[1:], *DRAWER_OPEN, TWO, OFFLINE),
    ],
    # A chain of one step has the noise of one step, 0.1 to 0.3: the same nats are a shorter way there, and awm's ratio, which
    # does not know the noise, is to be clipped sooner.
    "halfcheetah-rules": [
        *_runs("halfcheetah", CHEETAH_BASE, range(1), "update=ppo", *SHORT_CHEETAH, label="ppo-1.5M"),
        *_runs(
            "halfcheetah",
            CHEETAH_BASE,
            range(2),
            "update=awm",
            *SHORT_CHEETAH,
            "update.clip_range=0.01",
            "reinflow.target_kl=0.02",
            label="awm-1.5M",
        ),
    ],
    # EXPO's three seeds are judged; of the other two, which are compared, one is enough.
    "adroit_door-offpolicy": [
        *_offpolicy("adroit_door", DOOR_BASE, range(3), ("expo",), *DOOR, OFFLINE),
        *_offpolicy("adroit_door", DOOR_BASE, range(1), ("qchunk", "dsrl"), *DOOR, OFFLINE),
        # ReinFlow's own curve, whose schedules end at 0.2M.
        *_runs("adroit_door", DOOR_BASE, range(3), *DOOR, label="reinflow-0.2M"),
    ],
    "adroit_door-rules": [
        *_rules("adroit_door", DOOR_BASE, range(1), RULES[1:], *DOOR),
        *_rules("adroit_door", DOOR_BASE, range(1), ("nft",), "advantages=group", *DOOR, suffix="-group"),
    ],
    "adroit_door-sparse": _offpolicy(
        "adroit_door",
        DOOR_BASE,
        range(1),
        ("expo",),
        *DOOR,
        OFFLINE,
        "env.env_kwargs.reward_type=sparse",
        "env.env_kwargs.ends_at_success=true",
        f"demonstrations={SPARSE}",
        *LARGE_EDITS,
        suffix="-sparse",
    ),
    "adroit_door": _runs("adroit_door", DOOR_BASE, range(1), "evaluate_every=50000"),
}


def sparse_demonstrations() -> None:
    """The door's demonstrations as its sparse task has them: they end where the door is open (7 of the 25 do), which the
    dense reward says by bonuses of 20 in all, and that is worth 10; every other step -0.1."""
    if (ROOT / SPARSE).exists():
        return
    demos = read_demonstrations(ROOT / "demonstrations/adroit-door-human.zarr.zip")
    is_open = demos.arrays["reward"].ravel() > 15
    kept, lengths = [], []
    for start, end in zip(demos.episode_starts, demos.episode_ends, strict=True):
        opened = np.flatnonzero(is_open[start:end])
        lengths.append(opened[0] + 1 if len(opened) else end - start)
        kept.append(np.arange(start, start + lengths[-1]))
    rows = np.concatenate(kept)
    arrays = {key: values[rows] for key, values in demos.arrays.items()}
    arrays["reward"] = np.where(is_open[rows], 10.0, -0.1).astype(np.float32)
    arrays["terminated"] = is_open[rows]
    write_demonstrations(ROOT / SPARSE, Demonstrations(arrays, np.cumsum(lengths), demos.attributes))


def practise(run: Run, threads: int) -> None:
    """Do or finish one run; the script writes its summary last."""
    if (run.folder / "summary.json").exists():
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.processes}"]
    command = [
        sys.executable, *(torchrun if run.processes > 1 else ()), f"scripts/{run.script}.py",
        f"env={run.env}", f"checkpoint={run.checkpoint}",
        "workers=0", *run.options, f"seed={run.seed}", f"threads={threads}", "resume=true",
        "video=false" if run.seed else "video=true", f"run_dir={run.folder.relative_to(ROOT)}",
    ]  # fmt: skip
    print("python", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def judge(run: Run, episodes: int) -> None:
    """Evaluate a run's policy, and once the one that it began with."""
    for checkpoint, folder in ((run.folder / "checkpoint", run.folder), (ROOT / run.checkpoint, _base(run))):
        if not (folder / "judged" / "summary.json").exists():
            run_script(
                "evaluate", f"checkpoint={checkpoint.relative_to(ROOT)}", f"env={run.env}", f"num_steps={_num_steps(run)}",
                f"episodes={episodes}", "num_envs=50", "threads=1", "video=false",
                f"run_dir={(folder / 'judged').relative_to(ROOT)}",
            )  # fmt: skip


def _num_steps(run: Run) -> int:
    return int(read_json(run.folder / "summary.json")["num_steps"])


def _base(run: Run) -> Path:
    return RUNS / run.env / f"base-{run.checkpoint.name}"


def _judged(runs: list[Run]) -> dict[str, Any]:
    """Success over the episodes of :func:`judge`, and the gain on the same ones; nothing where one is missing."""
    folders = [_base(runs[0]), *(run.folder for run in runs)]
    if not all((folder / "judged" / "summary.json").exists() for folder in folders):
        return {}
    file = f"judged/episodes_K{_num_steps(runs[0])}.csv"
    base, *tuned = (_column(folder / file, "success") for folder in folders)
    gains = [paired_difference_interval(each, base) for each in tuned]
    return {
        "episodes": len(base),
        "base_success": float(base.mean()),
        "success_by_seed": [float(each.mean()) for each in tuned],
        "success_mean": float(np.mean(tuned)),
        "success_ci95": list(success_interval_by_seed(tuned)),
        "success_gain_ci95": [list(gain) for gain in gains],
    }


def report(suite: str) -> dict[str, Any]:
    """A row per label: base and tuned over all seeds, and what it cost."""
    labels: dict[str, list[Run]] = {}
    for run in SUITES[suite]:
        labels.setdefault(run.label, []).append(run)
    rows, meta, missing = [], {}, []
    for label, runs in labels.items():
        done = [run for run in runs if (run.folder / "summary.json").exists()]
        missing += [str(run.folder.relative_to(RUNS)) for run in runs if run not in done]
        if done:
            summaries = [read_json(run.folder / "summary.json") for run in done]
            meta = {key: summaries[-1][key] for key in ("versions", "machine", "date")}
            rows.append(_row(label, done, summaries))
    return {
        "suite": suite,
        "complete": not missing,
        "missing": missing,
        "command": f"python benchmarks/finetuning.py {suite}",
        **meta,
        "rows": rows,
    }


def _row(label: str, runs: list[Run], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    base = [summary["metrics"]["base"] for summary in summaries]
    tuned = [summary["metrics"]["tuned"] for summary in summaries]
    returns = [_column(run.folder / "episodes_after.csv", "return") for run in runs]
    row: dict[str, Any] = {
        "task": runs[0].env,
        "label": label,
        "base": runs[0].base,
        "num_steps": summaries[0]["num_steps"],
        "seeds": [run.seed for run in runs],
        "steps": [summary["steps"] for summary in summaries],
        "updates": [summary["metrics"].get("updates") for summary in summaries],
        "wall_seconds": [summary["wall_seconds"] for summary in summaries],
        "seconds": [summary["metrics"]["seconds"] for summary in summaries],
        "episodes": sum(map(len, returns)),
        "intervals_over": "seeds" if len(runs) > 1 else "episodes",
        "base_return": float(np.mean([row["return_mean"] for row in base])),
        "return_mean": float(np.mean([part.mean() for part in returns])),
        "return_ci95": list(mean_interval_by_seed(returns)),
        "return_by_seed": [row["return_mean"] for row in tuned],
        "return_gain_ci95": [summary["metrics"]["return_gain_ci95"] for summary in summaries],
        "git_commits": [summary["git_commit"] for summary in summaries],
        "commands": [summary["command"] for summary in summaries],
    }
    if tuned[0]["success_rate"] is not None:
        row["base_success"] = [row["success_rate"] for row in base]
        row["success_by_seed"] = [row["success_rate"] for row in tuned]
        row["success_gain_ci95"] = [summary["metrics"]["success_gain_ci95"] for summary in summaries]
    if judged := _judged(runs):
        row["judged"] = judged
    row["reached"] = [_reached(run) for run in runs]
    row["curves"] = [_curve(run) for run in runs]
    return row


def runs_of(row: dict[str, Any]) -> list[str]:
    """Folders of the runs that a row rests on."""
    return [f"{row['task']}/{row['label']}-seed{seed}" for seed in row["seeds"]]


RETURN_OF_INTEREST = {"hopper": 3000.0}
PUBLISHED_STEPS = {"hopper": 80_000_000}


def _reached(run: Run) -> dict[str, float] | None:
    """Where an evaluation on the way first reached the task's return of interest: steps, seconds of fine-tuning."""
    wanted, seconds, before = RETURN_OF_INTEREST.get(run.env), 0.0, 0.0
    for row in read_metrics(run.folder / "metrics.csv"):
        if "time/steps_per_s" in row:
            seconds += (row["step"] - before) / row["time/steps_per_s"]
            before = row["step"]
        if wanted is not None and row.get("evaluation/return", -np.inf) >= wanted:
            return {"return": wanted, "step": row["step"], "seconds": seconds}
    return None


def _curve(run: Run) -> dict[str, list[float]]:
    """The evaluations on the way and the last one, as deployed."""
    rows = [row for row in read_metrics(run.folder / "metrics.csv") if "evaluation/return" in row]
    names = [name for name in ("evaluation/return", "evaluation/success") if rows and name in rows[0]]
    return {"step": [row["step"] for row in rows], **{n: [row[n] for row in rows] for n in names}}


def _column(path: Path, name: str) -> np.ndarray:
    with path.open(newline="") as stream:
        return np.array([float(row[name]) for row in csv.DictReader(stream)])


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| task | run | K | steps | base | tuned | by seed | minutes |", "| --- " * 8 + "|"]
    for row in content["rows"]:
        low, high = row["return_ci95"]
        by_seed = " ".join(f"{value:.0f}" for value in row["return_by_seed"])
        minutes = " ".join(f"{value / 60:.1f}" for value in row["wall_seconds"])
        lines.append(
            f"| {row['task']} | {row['label']} | {row['num_steps']} | {max(row['steps']):,} | "
            f"{row['base_return']:.0f} | {row['return_mean']:.0f} [{low:.0f}, {high:.0f}] | {by_seed} | {minutes} |"
        )
        if "success_by_seed" in row:
            lines.append(f"| | success | | | {row['base_success']} | {row['success_by_seed']} | | |")
        if judged := row.get("judged"):
            lines.append(
                f"| | of {judged['episodes']} | | | {judged['base_success']:.3f} | {judged['success_mean']:.3f} "
                f"| {judged['success_by_seed']} | |"
            )
    return "\n".join(lines)


PUBLISHED = {
    # Zhang et al. 2025, table of state tasks: base and tuned return, rectified flow and shortcut; 80M steps (15M).
    "hopper": {"rectified flow": (1432, 3205), "shortcut": (1528, 3283)},
    "walker2d": {"rectified flow": (2740, 4109), "shortcut": (2739, 4255)},
    "ant": {"rectified flow": (1231, 4009), "shortcut": (2088, 4106)},
    "humanoid": {"rectified flow": (1926, 5076), "shortcut": (2122, 4749)},
}


def overview() -> dict[str, Any]:
    """Base and tuned per task, absolute and relative, beside the published figures."""
    rows, gains = [], []
    for suite in ("hopper", "walker2d", "halfcheetah", "adroit_door"):
        file = RESULTS / f"finetuning-{suite}.json"
        for row in read_json(file)["rows"] if file.exists() else ():
            gain = row["return_mean"] / row["base_return"] - 1
            kept = (
                "task",
                "base",
                "num_steps",
                "seeds",
                "steps",
                "base_return",
                "return_mean",
                "return_ci95",
                "intervals_over",
            )
            rows.append({**{key: row[key] for key in kept}, "gain": gain})
            rows[-1] |= {key: row[key] for key in row if "success" in key}
            if suite != "adroit_door":
                gains.append(gain)
    published = [
        {"task": task, "policy": policy, "base_return": base, "return_mean": tuned, "gain": tuned / base - 1}
        for task, policies in PUBLISHED.items()
        for policy, (base, tuned) in policies.items()
    ]
    return {
        "command": "python benchmarks/finetuning.py table",
        "rows": rows,
        "mean_gain_locomotion": float(np.mean(gains)) if gains else None,
        "published": published,
        "published_mean_gain": float(np.mean([row["gain"] for row in published])),
        "published_mean_gain_claimed": 1.3536,
        "hopper_3000": _hopper_3000(),
    }


def _hopper_3000() -> dict[str, Any] | None:
    """Time to return 3000: ours as measured; the published code's, its steps times its cost a step on this machine."""
    ours, cost = RESULTS / "finetuning-hopper-two-processes.json", RESULTS / "finetuning-cost.json"
    if not ours.exists() or not cost.exists():
        return None
    reached = read_json(ours)["rows"][0]["reached"]
    measured = read_json(cost)
    inference = max(measured["rollout"], key=lambda row: row["num_envs"])["peer_ms_per_environment_step"]
    whole = next(row for row in measured["update"] if row["what"] == "update" and row["repeated_rows"])
    # K transitions a chunk of as many steps: one transition for each environment step.
    update = whole["peer_ms_per_unique_transition"] * whole["peer_about"]["unique_transitions"]
    update /= whole["peer_about"]["environment_steps"]
    return {
        "ours_measured": reached,
        "published_extrapolated_hours": PUBLISHED_STEPS["hopper"] * (inference + update) / 3.6e6,
        "published_steps": PUBLISHED_STEPS["hopper"],
        "published_ms_per_step": {"inference": inference, "update": update},
        "note": "extrapolated: published steps times measured cost on one thread, without simulation",
    }


def print_overview(content: dict[str, Any]) -> None:
    print("| task | K | steps | base | tuned | gain |\n" + "| --- " * 6 + "|")
    for row in content["rows"]:
        low, high = row["return_ci95"]
        print(
            f"| {row['task']} | {row['num_steps']} | {max(row['steps']):,} | {row['base_return']:.0f} | "
            f"{row['return_mean']:.0f} [{low:.0f}, {high:.0f}] | {row['gain']:+.0%} |"
        )
    for row in content["published"]:
        name = f"{row['task']}, {row['policy']}, published"
        print(f"| {name} | 4 | | {row['base_return']} | {row['return_mean']} | {row['gain']:+.0%} |")
    print(f"mean gain {content['mean_gain_locomotion']}, published {content['published_mean_gain']:+.1%}")


def picture(path: Path) -> None:
    """Learning curves of every suite that has results, a panel each."""
    curves, bases = {}, {}
    for suite in ("hopper", "walker2d", "halfcheetah"):
        file = RESULTS / f"finetuning-{suite}.json"
        for row in read_json(file)["rows"] if file.exists() else ():
            curves[row["task"]], bases[row["task"]] = row["curves"], row["base_return"]
    plot_finetuning_bands(curves, path, bases=bases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=[*sorted(SUITES), "table"])
    parser.add_argument("--report", action="store_true", help="only collect finished runs")
    parser.add_argument("--only", default="", help="part of the run folders' names")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.suite == "table":
        content = overview()
        print_overview(content)
        write_json(RESULTS / "finetuning-table.json", content)
        picture(ROOT / "docs" / "images" / "practice.png")
        return
    if not arguments.report:
        if arguments.suite == "adroit_door-sparse":
            sparse_demonstrations()
        for run in SUITES[arguments.suite]:
            if arguments.only in str(run.folder):
                practise(run, arguments.threads)
                if arguments.suite in JUDGED:
                    judge(run, JUDGED[arguments.suite])
    name = f"finetuning-{arguments.suite}"
    every = [str(run.folder.relative_to(RUNS)) for run in SUITES[arguments.suite]]
    content = with_earlier(name, report(arguments.suite), runs_of, every)
    write_json(RESULTS / f"{name}.json", content)
    if content["rows"]:
        print(table(content))
    print(json.dumps({"complete": content["complete"], "missing": content["missing"]}))


if __name__ == "__main__":
    main()
