"""Programs of tests that fork runs: ones that are killed and resumed, and ones of two processes.

A test starts its program by :func:`report_of`, and the program calls :func:`main`. A forked child is a
process of its own, and SIGKILL ends it as it ends any other; what is saved are the imports of each.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forking_python import EMPTY_FIGURES


def report_of(python: Path, program: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Run ``program`` in ``folder``; what it reports."""
    command = [str(python), str(program), str(folder), str(seed)]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        env={**os.environ, EMPTY_FIGURES: "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(kill_and_resume: Callable[[Path, int], dict[str, Any]], ranks: Callable[[Path], object]) -> None:
    """Do both in the folder that the command names, and print the report of the first."""
    import gymnasium

    for module in ("matplotlib.pyplot", "zarr"):  # once here and not in every child
        importlib.import_module(module)
    logging.disable()
    torch.set_num_threads(1)
    gymnasium.make("Pendulum-v1").close()
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    report = kill_and_resume(folder, seed)
    ranks(folder)
    print(json.dumps(report))


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
    """Wait for a child, which must end well."""
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"a process ended with status {status}")


def alone_and_in_two(work: Callable[[str], object]) -> None:
    """Do ``work("one")`` in a process, then ``work("two")`` in each of two that know of each other."""
    finish(fork(lambda: work("one")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank_of_two(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
        work("two")

    for child in [fork(lambda rank=rank: rank_of_two(rank)) for rank in range(2)]:
        finish(child)
