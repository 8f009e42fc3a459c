"""Started by test_processes.py: forks training processes from a parent that has imported everything.

    python forked_runs.py FOLDER SEED POLICY..

Kills a run at seven random moments and lets it end, beside one that is not killed; then trains each policy
with one and with two processes. Prints JSON. A forked child is a process of its own, and SIGKILL ends it as
it ends any other; what is saved is the import of torch in each.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import gymnasium
import matplotlib.pyplot  # noqa: F401 - imported once here and not in every child
import torch
import zarr  # noqa: F401
from safetensors.torch import save_file
from toy_training import toy_settings, toy_trainer, write_toy_store

from flowpolicy import FlowPolicy
from flowpolicy.pretraining.run import pretrain
from flowpolicy.runs.distributed import processes

KILLS, STEPS = 7, 140


def fork(work: Callable[[], object]) -> int:
    """Do ``work`` in a child process; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"a training process ended with status {status}")


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
                time.sleep(0.001)
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


def ranks(folder: Path, policies: list[str]) -> None:
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

    for policy in policies:
        finish(fork(lambda policy=policy: train(policy, "one")))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        children = []
        for rank in range(2):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(fork(lambda policy=policy: train(policy, "two")))
        for child in children:
            finish(child)
        del os.environ["WORLD_SIZE"]


if __name__ == "__main__":
    logging.disable()
    torch.set_num_threads(1)
    gymnasium.make("Pendulum-v1").close()
    target = Path(sys.argv[1])
    report = kill_and_resume(target, int(sys.argv[2]))
    ranks(target, sys.argv[3:])
    print(json.dumps(report))
