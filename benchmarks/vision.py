"""Policies from images: Push-T and Lift pretrained, Push-T fine-tuned, and the cost of images; resumably.

    python benchmarks/vision.py             # does what is missing, in turn
    python benchmarks/vision.py --only=lift
    python benchmarks/vision.py --report    # only collects what is there

Needs demonstrations/pusht-image.zarr.zip and pusht.zarr.zip (scripts/import_demos.py) and makes Lift's own with
scripts/collect_demos.py. Results go to benchmarks/results/vision.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import initialize_config_module
from imitation import ROOT, run_script

from flowpolicy.cli import composed
from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.evaluation.task import task_from
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.pretraining.run import PretrainConfig, find_demonstrations, make_policy, make_samplers
from flowpolicy.pretraining.trainer import Trainer
from flowpolicy.settings import build

RUNS = Path("runs/vision")
LIFT = Path("demonstrations/lift_image-scripted.zarr.zip")
IMAGES = ("policy=flow_matching", "model=medium", "train.threads=1")
PRETRAINED = {
    "pusht_image-flow_matching-seed0": ("env=pusht_image", *IMAGES, "train.final_episodes=200"),
    "lift_image-flow_matching-seed0": ("env=lift_image", *IMAGES, "train.final_episodes=100"),
    "pusht_image-base": (
        "env=pusht_image", "policy=flow_matching", "model=small", "data.max_episodes=100", "train.steps=1500",
        "train.threads=1", "train.final_episodes=0",
    ),
}  # fmt: skip
PRACTICE = (
    "env=pusht_image", f"checkpoint={RUNS}/pusht_image-base/checkpoint", "num_steps=2", "total_steps=300000",
    "final_episodes=100", "evaluation_envs=25", "workers=1", "threads=1", "reinflow.critic_warmup=2",
    "reinflow.batch_size=128", "reinflow.n_epochs=6",
)  # fmt: skip


def is_done(name: str) -> bool:
    return (ROOT / RUNS / name / "summary.json").exists()


def pretrain(name: str) -> None:
    if name.startswith("lift") and not (ROOT / LIFT).exists():
        run_script("collect_demos", "env=lift_image", "episodes=100", "workers=2", f"run_dir={RUNS}/collect")
    run_script("pretrain", *PRETRAINED[name], "resume=true", f"run_dir={RUNS}/{name}")


def more_steps() -> None:
    """Push-T with more integration steps than the policy's own four."""
    checkpoint = RUNS / "pusht_image-flow_matching-seed0" / "checkpoint"
    run_script(
        "evaluate", f"checkpoint={checkpoint}", "num_steps=16", "episodes=200", "num_envs=25",
        f"run_dir={RUNS}/pusht_image-K16",
    )  # fmt: skip


def practise() -> None:
    run_script("finetune_reinflow", *PRACTICE, "resume=true", f"run_dir={RUNS}/pusht_image-practice")


def latency() -> None:
    """Where the time of a chunk goes."""
    checkpoint = RUNS / "pusht_image-flow_matching-seed0" / "checkpoint"
    run_script(
        "benchmark_latency", f"checkpoint={checkpoint}", "num_steps=[1,4,16]", "backends=[eager,onnx]",
        "calls=400", f"run_dir={RUNS}/latency",
    )  # fmt: skip


def throughput(rounds: int = 7, steps: int = 2) -> dict[str, Any]:
    """Training samples a second of the image policy and of the state policy, step for step in turn."""
    trainers = {}
    for env in ("pusht_image", "pusht"):
        with initialize_config_module("flowpolicy_configs", version_base="1.3"):
            settings = composed(
                "pretrain", [f"env={env}", *IMAGES, "train.batch_size=64", "model.actions_per_token=1"]
            )
        del settings["run_dir"]
        config = build(PretrainConfig, settings, "")
        trainers[env] = _trainer(config)
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {env: [] for env in trainers}
    for number in range(rounds + 1):
        for env, trainer in trainers.items():
            started = time.perf_counter()
            for _ in range(steps):
                trainer.step()
            if number:
                seconds[env].append((time.perf_counter() - started) / (64 * steps))
    ratios = sorted(b / a for a, b in zip(seconds["pusht_image"], seconds["pusht"], strict=True))
    return {
        "samples_per_second": {env: 1 / statistics.median(each) for env, each in seconds.items()},
        "image_over_state": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
        "batch_size": 64,
        "threads": 1,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _trainer(config: PretrainConfig) -> Trainer:
    task = task_from(config.env)
    demos = find_demonstrations(config, task)
    policy = make_policy(config, task, demos)
    training, validation = make_samplers(policy, demos, config.data, config.seed)
    return Trainer(policy, training, validation, config.train, seed=config.seed)


def measure_throughput() -> None:
    write_json(ROOT / RUNS / "throughput" / "summary.json", throughput())


def _relative(content: Any) -> Any:
    """Paths from this folder on, not from the machine's root."""
    if isinstance(content, dict):
        return {key: _relative(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_relative(value) for value in content]
    return content.replace(f"{ROOT}/", "") if isinstance(content, str) else content


STAGES: dict[str, Callable[[], None]] = {
    **{name: partial(pretrain, name) for name in PRETRAINED},
    "pusht_image-K16": more_steps,
    "pusht_image-practice": practise,
    "latency": latency,
    "throughput": measure_throughput,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="stages whose name contains this text")
    parser.add_argument("--report", action="store_true", help="collect what is there, run nothing")
    arguments = parser.parse_args()
    for name, stage in STAGES.items():
        if not arguments.report and arguments.only in name and not is_done(name):
            stage()
    found = {
        name: _relative(read_json(ROOT / RUNS / name / "summary.json")) for name in STAGES if is_done(name)
    }
    missing = [name for name in STAGES if name not in found]
    content = {
        "command": "python benchmarks/vision.py",
        "complete": not missing,
        "missing": missing,
        "stages": found,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(ROOT / "benchmarks" / "results" / "vision.json", content)
    for name, summary in found.items():
        metrics = summary.get("metrics", summary)
        shown = {
            key: metrics[key]
            for key in ("score_mean", "score_ci95", "success_rate", "success_ci95", "return_gain", "return_gain_ci95",
                        "samples_per_second", "image_over_state")
            if metrics.get(key) is not None
        }  # fmt: skip
        print(name, shown)
    if missing:
        print(f"INCOMPLETE: {', '.join(missing)}")


if __name__ == "__main__":
    main()
