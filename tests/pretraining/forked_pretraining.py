"""Started by test_processes.py: runs that are killed and resumed, and runs of two processes.

    python forked_pretraining.py FOLDER SEED

Kills a run at seven random moments and lets it end, beside one that is not killed; then trains each policy
with one and with two processes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import torch
from forked_runs import alone_and_in_two, finish, fork, main
from safetensors.torch import save_file
from toy_training import toy_settings, toy_trainer, write_toy_store

from flowpolicy import FlowPolicy
from flowpolicy.pretraining.run import pretrain
from flowpolicy.runs.distributed import processes

POLICIES = ["flow_matching", "shortcut"]
KILLS, STEPS = 7, 112


def kill_and_resume(folder: Path, seed: int) -> dict[str, object]:
    # As many saves as steps allow, so that many kills fall into one; dropout, so that its seeds count.
    settings = toy_settings("shortcut", write_toy_store(folder / "toy.zarr.zip"), steps=STEPS, save_every=2)
    settings = {**settings, "resume": True}
    settings["model"] = {**settings["model"], "dropout": 0.1}
    pretrain(settings, folder / "unbroken")  # in this process, so that no child imports anything again
    rng, broken, steps, loaded = random.Random(seed), folder / "broken", [0], 0

    def saved_step() -> int:
        state = broken / "training_state" / "state.json"
        return json.loads(state.read_text())["step"] if state.exists() else 0

    while len(steps) <= KILLS:
        child = fork(lambda: pretrain(settings, broken))
        if len(steps) % 4 == 0:  # wherever it is, start-up included
            time.sleep(rng.uniform(0.0, 0.3))
        else:  # a little further than last time, at no particular point of a step or a save
            goal, patience = steps[-1] + rng.randint(1, 10), time.monotonic() + 60
            while saved_step() < goal and time.monotonic() < patience:
                time.sleep(0.004)
            time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"the run was over (status {status}) before kill {len(steps)}")
        steps.append(saved_step())
        if (broken / "checkpoint").exists():
            FlowPolicy.load(broken / "checkpoint").act(torch.zeros(1, 1, 3))
            loaded += 1
    finish(fork(lambda: pretrain(settings, broken)))
    return {"steps": steps[1:], "loaded": loaded}


def ranks(folder: Path) -> None:
    def train(policy: str, name: str) -> None:
        torch.set_num_threads(1)
        with processes() as group:
            # Other weights in each process before the first one's are shared out.
            trainer = toy_trainer(policy, processes=group, steps=8, batch_size=32, learning_rate=1e-3)
            for _ in range(8):
                trainer.step()
            tensors = {f"live.{k}": v for k, v in trainer.policy.network.state_dict().items()}
            tensors |= {f"average.{k}": v for k, v in trainer.ema.network.state_dict().items()}
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, folder / f"{policy}-{name}-{group.rank}"
            )

    for policy in POLICIES:
        alone_and_in_two(lambda name, policy=policy: train(policy, name))


if __name__ == "__main__":
    main(kill_and_resume, ranks)
