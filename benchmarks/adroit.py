"""The Adroit hand's hammer and pen from a few demonstrations of a published policy, then ReinFlow: success before and after.

    python benchmarks/adroit.py --policies hand_dapg/dapg/policies     # does what is missing, writes the JSON
    python benchmarks/adroit.py --report                               # only collects what is there

The policies are those of https://github.com/aravindr93/hand_dapg (see docs/bring_your_own_demonstrations.md). There are as
few demonstrations as leave the pretrained policy room to improve. Results go to benchmarks/results/adroit.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from imitation import ROOT, publish
from practice import SUCCESS_ALONE, Run, carry_out, evaluate_unseen, report, table, unseen

RUNS = ROOT / "runs" / "benchmarks" / "adroit"
FEW = {"hammer": (1, 500), "pen": (3, 500)}
"""Task -> demonstrations, and steps of pretraining."""
# What is asked for is success: its first moment ends an episode, and the reward says how soon that was.
SUCCESS = (
    "env.env_kwargs.max_episode_steps=200", "env.env_kwargs.reward_type=sparse",
    "env.env_kwargs.ends_at_success=true",
)  # fmt: skip
# The hand stands disturbances of half a standard deviation, and less is found with less.
LOUD = (
    "num_steps=1", "num_envs=16", "workers=0", *SUCCESS_ALONE, "reinflow.gamma=0.99",
    "reinflow.learning_rate=3.0e-4", "noise.minimum=0.3", "noise.maximum=0.8", "noise.final_maximum=0.4",
    "total_steps=200000", "evaluate_every=25000", "evaluate_episodes=50",
)  # fmt: skip


def run_of(task: str, policies: Path) -> Run:
    """One task's run."""
    demonstrations, steps = FEW[task]
    return Run(
        RUNS,
        f"{task}-from-{demonstrations}",
        (f"env=adroit_{task}", *SUCCESS),
        collecting=(
            f"episodes={demonstrations}",
            f"env.scripted.settings.policy={policies / f'{task}-v0.pickle'}",
        ),
        training=(f"train.steps={steps}",),
        practice=LOUD,
        num_envs=50,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--policies", type=Path, default=Path("dapg/policies"), help="folder of the published ones"
    )
    parser.add_argument("--report", action="store_true", help="collect what is there, train nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--only", default="", help="part of a run's name")
    given = parser.parse_args()
    runs = [run_of(task, given.policies) for task in FEW]
    for run in () if given.report else runs:
        if given.only in run.name:
            carry_out(run, given.threads, 1)
            evaluate_unseen(run, given.threads, 300)
    content = report(
        "adroit", "adroit", runs, "python benchmarks/adroit.py --policies hand_dapg/dapg/policies"
    )
    content["unseen"] = [found for run in runs if (found := unseen(run))]
    lines = [
        f"{found['run']}, {found['episodes']} episodes on seeds that no setting was chosen by: "
        f"{found['before']:.3f} before, {found['after']:.3f} after fine-tuning, gain {found['gain']:+.3f}"
        for found in content["unseen"]
    ]
    publish("adroit", content, "\n".join((table(content), *lines)))


if __name__ == "__main__":
    main()
