"""Meta-World: scripted demonstrations, pretraining, evaluation, fine-tuning; resumably, into one table.

    python benchmarks/metaworld.py single            # one policy for each task
    python benchmarks/metaworld.py multitask         # one policy for five tasks
    python benchmarks/metaworld.py study             # ten tasks: one policy each, and one for all of them
    python benchmarks/metaworld.py practice          # few demonstrations, then ReinFlow on success alone
    python benchmarks/metaworld.py single --report   # only collects what is there

Every step is a real script; its command is in the table. Results go to benchmarks/results/metaworld-<suite>.json; a suite
whose runs are not all there says so.
"""

from __future__ import annotations

import argparse

from imitation import ROOT, publish
from practice import SUCCESS_ALONE, Run, carry_out, report, table

RUNS = ROOT / "runs" / "benchmarks" / "metaworld"
FIVE = ("push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "assembly-v3")
TEN = (
    *FIVE,
    "reach-v3",
    "button-press-v3",
    "window-open-v3",
    "peg-insert-side-v3",
    "hammer-v3",
)


def _single(task: str) -> Run:
    return Run(RUNS, task, ("env=metaworld", f"env.env_kwargs.task={task}"))


def _multitask(name: str, tasks: tuple[str, ...], *training: str) -> Run:
    env = ("env=metaworld_multitask", f"env.name={name}", f"env.env_kwargs.tasks=[{','.join(tasks)}]")
    return Run(RUNS, name, env, training=training, episodes=100 * len(tasks))


def _practice(name: str, noise: tuple[str, str, str], seed: int = 0) -> Run:
    """Two demonstrations, then fine-tuning; a chunk is executed whole, so that all of what is scored was done."""
    env = ("env_kwargs.task=drawer-open-v3", "env_kwargs.max_episode_steps=150", "action_horizon=4")
    settings = (
        "num_steps=1", "total_steps=200000", "num_envs=16", "action_clip=2.0", *SUCCESS_ALONE,
        "reinflow.learning_rate=3.0e-4", "workers=1",
    )  # fmt: skip
    bounds = zip(("minimum", "maximum", "final_maximum"), noise, strict=True)
    return Run(
        RUNS,
        name,
        ("env=metaworld", *(f"env.{option}" for option in env)),
        # A pair whose policy fails in half of the episodes, of the six in benchmarks/results/metaworld-pairs.json.
        collecting=("episodes=2", "seed=5"),
        training=("train.steps=600", "train.batch_size=64", "data.validation_fraction=0"),
        practice=(*settings, *(f"noise.{bound}={value}" for bound, value in bounds)),
        seed=seed,
    )


SUITES: dict[str, list[Run]] = {
    "single": [_single(task) for task in FIVE],
    "multitask": [_multitask("metaworld_five", FIVE)],
    "study": [
        *(_single(task) for task in TEN if task not in FIVE),
        _multitask("metaworld_ten", TEN, "train.steps=12000"),
    ],
    "practice": [
        *(
            _practice(f"drawer-open-v3-from-two-seed{seed}", ("0.35", "0.8", "0.4"), seed)
            for seed in range(3)
        ),
        # The same with the noise of other tasks.
        _practice("drawer-open-v3-from-two-little-noise", ("0.1", "0.24", "0.12")),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--report", action="store_true", help="only collect finished runs")
    parser.add_argument("--only", default="", help="part of a run's name")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    arguments = parser.parse_args()
    if not arguments.report:
        for run in SUITES[arguments.suite]:
            if arguments.only in run.name:
                carry_out(run, arguments.threads)
    suite = arguments.suite
    name = f"metaworld-{suite}"
    content = report(name, suite, SUITES[suite], f"python benchmarks/metaworld.py {suite}")
    publish(name, content, table(content))


if __name__ == "__main__":
    main()
