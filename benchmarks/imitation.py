"""Pretrain and evaluate policies over tasks and seeds, resumably, into one table.

    python benchmarks/imitation.py hopper            # trains what is missing, evaluates, writes the JSON
    python benchmarks/imitation.py hopper --report   # only collects what is there

Every run is the real `scripts/pretrain.py` and `scripts/evaluate.py`; the command of each is in its summary.
Results go to benchmarks/results/imitation-<suite>.json; a suite whose runs are not all there says so.
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

from flowpolicy.evaluation.statistics import mean_interval_by_seed, success_interval_by_seed
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks" / "imitation"
FLOWS = ("shortcut", "flow_matching")
DOOR = ("data=gaussian", "train.ema_decay=0.999")


@dataclass(frozen=True)
class Run:
    """One checkpoint and the K it is evaluated at.

    ``options`` are for training, ``env_options`` for training and evaluation. ``name`` is of the folder and the table, in
    place of ``env``.
    """

    env: str
    policy: str
    seed: int
    steps: tuple[int, ...]
    episodes: int = 100
    options: tuple[str, ...] = ()
    label: str = ""
    env_options: tuple[str, ...] = ()
    num_envs: int = 50
    root: Path = RUNS
    name: str = ""

    @property
    def folder(self) -> Path:
        return self.root / (self.name or self.env) / f"{self.label or self.policy}-seed{self.seed}"


def _policies(env: str, seeds: range, steps: tuple[int, ...] = (1, 2, 4, 16), **settings: Any) -> list[Run]:
    flows = [Run(env, policy, seed, steps, **settings) for seed in seeds for policy in FLOWS]
    baselines = (("regression", 1), ("mip", 2))
    return flows + [Run(env, name, seed, (count,), **settings) for seed in seeds for name, count in baselines]


SHORT = ("train.steps=4000", "train.batch_size=128")
DEEP = ("model.width=128", "model.depth=8", "train.save_every=100")


def _push_t(policy: str, episodes: int = 200, **settings: Any) -> Run:
    steps = {"regression": (1,), "mip": (2,), "flow_matching": (1, 2, 4, 8, 16)}.get(policy, (1, 2, 4, 8, 16))
    options = (*SHORT, *settings.pop("options", ()))
    if not any(option.startswith("model.depth") for option in options):
        options = ("model.depth=3", *options)
    options = (*options, "model.actions_per_token=1")
    return Run("pusht", policy, 0, steps, episodes, options, **settings)


def _tokens(env: str, counts: tuple[int, ...], *options: str, **settings: Any) -> list[Run]:
    """Runs with so many actions a token, three seeds each."""
    return [
        Run(
            env, "flow_matching", seed, (1, 4), options=(*options, f"model.actions_per_token={count}"),
            label=f"flow_matching-{count}-a-token", **settings,
        )
        for seed in range(3) for count in counts
    ]  # fmt: skip


SUITES: dict[str, list[Run]] = {
    "hopper": _policies("hopper", range(3)),
    "walker2d": [
        # Three quarters of a shortcut model's rows train the flow: after the task's 8,000 steps it was at 0.82.
        Run("walker2d", "shortcut", 0, (1, 4), options=("train.steps=16000",)),
        *(run for run in _policies("walker2d", range(1), (1, 4)) if run.policy != "shortcut"),
    ],
    # A chunk of one token, which fine-tuning starts from.
    "walker2d-token": [
        Run(
            "walker2d",
            "flow_matching",
            0,
            (1, 4),
            options=("model.actions_per_token=4",),
            label="flow_matching-4-a-token",
        )
    ],
    "halfcheetah": _policies("halfcheetah", range(1), (1, 4)),
    "pusht": [_push_t("flow_matching"), _push_t("shortcut")],
    "pusht-baselines": [_push_t("regression"), _push_t("mip")],
    "pusht-90": [_push_t("flow_matching", options=("data.max_episodes=90",), label="flow_matching-90")],
    # Deep enough that caching blocks could pay.
    "pusht-deep": [
        _push_t(policy, options=DEEP, label=f"{policy}-deep") for policy in ("flow_matching", "shortcut")
    ],
    # What `pretrain.py env=pusht` trains.
    "pusht-default": [
        Run(
            "pusht",
            "flow_matching",
            0,
            (1, 2, 3, 4, 8),
            400,
            ("train.save_every=200",),
            label="flow_matching-default",
        )
    ],
    # Size and length of training are what strict success takes: see docs/flow_matching.md.
    "pusht-medium": [
        Run(
            "pusht",
            "flow_matching",
            0,
            (1, 2, 3, 4, 8),
            400,
            ("model=medium", f"model.actions_per_token={count}", "train.save_every=200"),
            label=f"flow_matching-medium{label}",
        )
        for count, label in ((1, ""), (4, "-4-a-token"), (6, "-6-a-token"))
    ],
    "tokens": [
        *_tokens("pusht", (1, 2, 4, 8), *SHORT, "model.depth=3", episodes=200),
        *_tokens("hopper", (1, 2, 4)),
    ],
    # 25 episodes that start elsewhere than the simulator does; a longer average evens out the last steps.
    "adroit_door": [Run("adroit_door", "flow_matching", seed, (4, 16), options=DOOR) for seed in range(5)],
    "walker2d-more": _policies("walker2d", range(1, 3), (1, 4)),
    "halfcheetah-more": _policies("halfcheetah", range(1, 3), (1, 4)),
}


def train_and_evaluate(run: Run, threads: int) -> None:
    """Do what is missing of one run; both scripts write their summary last."""
    trained = run.folder / "train"
    common = [f"seed={run.seed}", f"train.threads={threads}", "train.final_episodes=0", "video=false"]
    if not (trained / "summary.json").exists():
        options = [f"env={run.env}", *run.env_options, f"policy={run.policy}", *run.options, *common]
        run_script("pretrain", *options, "resume=true", f"run_dir={trained.relative_to(ROOT)}")
    evaluate(run, "evaluate", threads, "video=0" if run.seed else "video=1")


def evaluate(run: Run, part: str, threads: int, *options: str) -> None:
    """Evaluate a trained run into its folder ``part``, unless that is done."""
    trained, evaluated = run.folder / "train", run.folder / part
    if not (evaluated / "summary.json").exists():
        sweep = ",".join(map(str, run.steps))
        main = 4 if 4 in run.steps else run.steps[0]
        run_script(
            "evaluate",
            f"checkpoint={(trained / 'checkpoint').relative_to(ROOT)}",
            f"env={run.env}",
            *run.env_options,
            f"num_steps={main}",
            f"k_sweep=[{sweep}]",
            f"episodes={run.episodes}",
            f"num_envs={run.num_envs}",
            f"threads={threads}",
            *options,
            f"run_dir={evaluated.relative_to(ROOT)}",
        )


def run_script(name: str, *options: str) -> None:
    """Run ``scripts/<name>.py`` and print the command."""
    command = [sys.executable, f"scripts/{name}.py", *options]
    print("python", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def report(suite: str, runs: list[Run], command: str, part: str = "evaluate") -> dict[str, Any]:
    """Rows of (task, policy, K): mean over seeds, with a 95% interval over all episodes of all seeds.

    ``part`` is the folder of the evaluations.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    missing, meta = [], {}
    for run in runs:
        summary = run.folder / part / "summary.json"
        if not summary.exists():
            missing.append(str(run.folder.relative_to(run.root)))
            continue
        evaluation, training = (
            json.loads((run.folder / folder / "summary.json").read_text()) for folder in (part, "train")
        )
        meta = {key: evaluation[key] for key in ("versions", "machine", "date")}
        for steps in run.steps:
            episodes = columns_of(run.folder / part / f"episodes_K{steps}.csv")
            key = (run.name or run.env, run.label or run.policy, steps)
            row = rows.setdefault(
                key, {"returns": [], "success": [], "score": [], "seeds": [], "train_s": []}
            )
            row["seeds"].append(run.seed)
            row["returns"].append(episodes["return"])
            row["train_s"].append(training["metrics"]["train_seconds"])
            row["demo"] = training["metrics"]["demo_return_mean"]
            row["train_command"], row["evaluate_command"] = training["command"], evaluation["command"]
            row["parameters"], row["train_steps"] = training["parameters"], training["steps"]
            row["error"] = training["metrics"].get("validation/action_error")
            sweep = evaluation["metrics"]["k_sweep"] or [evaluation["metrics"]]
            row["cost"] = next(r for r in sweep if r["num_steps"] == steps)
            for name in ("success", "score"):
                if name in episodes:
                    row[name].append(episodes[name])
    return {
        "suite": suite,
        "complete": not missing,
        "missing": missing,
        "command": command,
        **meta,
        "rows": [_row(*key, row) for key, row in rows.items()],
    }


def columns_of(path: Path) -> dict[str, np.ndarray]:
    """A table of episodes, column by column."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        key: np.array([float({"True": 1, "False": 0}.get(row[key], row[key])) for row in rows])
        for key in rows[0]
    }


def _row(env: str, policy: str, steps: int, row: dict[str, Any]) -> dict[str, Any]:
    returns = np.concatenate(row["returns"])
    demo = row["demo"]
    result = {
        "task": env,
        "policy": policy,
        "num_steps": steps,
        "nfe": row["cost"]["nfe"],
        "ms_per_chunk": row["cost"]["ms_per_chunk"],
        "seeds": row["seeds"],
        "episodes": len(returns),
        "intervals_over": "seeds" if len(row["seeds"]) > 1 else "episodes",
        "return_mean": returns.mean(),
        "return_ci95": list(mean_interval_by_seed(row["returns"])),
        "return_by_seed": [part.mean() for part in row["returns"]],
        "demo_return_mean": demo,
        "return_over_demo": returns.mean() / demo if demo else None,
        "train_steps": row["train_steps"],
        "train_seconds": row["train_s"],
        "parameters": row["parameters"],
        "validation_action_error": row["error"],
        "train_command": row["train_command"],
        "evaluate_command": row["evaluate_command"],
    }
    if row["success"]:
        success = np.concatenate(row["success"])
        result |= {
            "success_rate": success.mean(),
            "success_ci95": list(success_interval_by_seed(row["success"])),
        }
        result["success_by_seed"] = [part.mean() for part in row["success"]]
    if row["score"]:
        score = np.concatenate(row["score"])
        result |= {"score_mean": score.mean(), "score_ci95": list(mean_interval_by_seed(row["score"]))}
    return result


def table(content: dict[str, Any]) -> str:
    """Markdown, a line per row."""
    lines = [
        "| task | policy | K | return | / demos | success | score | ms/chunk | seeds x episodes |",
        "|" + " --- |" * 9,
    ]
    for row in content["rows"]:
        low, high = row["return_ci95"]
        ratio = "" if row["return_over_demo"] is None else f"{row['return_over_demo']:.2f}"
        success = (
            f"{row['success_rate']:.2f} [{row['success_ci95'][0]:.2f}, {row['success_ci95'][1]:.2f}]"
            if "success_rate" in row
            else ""
        )
        score = (
            f"{row['score_mean']:.3f} [{row['score_ci95'][0]:.3f}, {row['score_ci95'][1]:.3f}]"
            if "score_mean" in row
            else ""
        )
        lines.append(
            f"| {row['task']} | {row['policy']} | {row['num_steps']} | {row['return_mean']:.0f} [{low:.0f}, {high:.0f}] | {ratio} "
            f"| {success} | {score} | {row['ms_per_chunk']:.1f} | {len(row['seeds'])} x {row['episodes'] // len(row['seeds'])} |"
        )
    return "\n".join(lines)


def publish(name: str, content: dict[str, Any], text: str) -> None:
    """Write ``benchmarks/results/<name>.json`` and print ``text``; results are not replaced by nothing."""
    if not content["rows"]:
        sys.exit(f"None of the runs is there ({', '.join(content['missing'])}); {name}.json stays as it is.")
    write_json(ROOT / "benchmarks" / "results" / f"{name}.json", content)
    print(text)
    if not content["complete"]:
        print(f"INCOMPLETE: {len(content['missing'])} runs are missing: {', '.join(content['missing'])}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--report", action="store_true", help="collect what is there, train nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--only", default="", help="only runs whose folder contains this text")
    arguments = parser.parse_args()
    if not arguments.report:
        for run in SUITES[arguments.suite]:
            if arguments.only in str(run.folder):
                train_and_evaluate(run, arguments.threads)
    content = report(
        arguments.suite, SUITES[arguments.suite], f"python benchmarks/imitation.py {arguments.suite}"
    )
    publish(f"imitation-{arguments.suite}", content, table(content))


if __name__ == "__main__":
    main()
