"""How tests run a script: as a user types it, mostly without the seconds that a process of its own takes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import torch

from flowpolicy import FlowPolicy
from flowpolicy.models.config import TransformerConfig

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
]


@dataclass
class Done:
    """What a script left on the terminal."""

    returncode: int
    stdout: str
    stderr: str


def run_script(folder, repo_root, script, *options, fails=False, python=None):
    """Run ``scripts/<script>`` in ``folder``; a failure that is expected must be one sentence on stderr.

    ``fails=None``: the caller looks for itself.
    ``python``: by this program, in a process of its own; else the same file in this one, where a traceback is
    the test's.
    """
    command = [str(repo_root / "scripts" / script), *map(str, options)]
    done = _by(python, folder, command) if python else _here(folder, command)
    assert fails is None or (done.returncode != 0) == fails, done.stderr
    if fails:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done


def _by(python, folder, command):
    done = subprocess.run(
        [python, *command], cwd=folder, capture_output=True, text=True, check=False,
        timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def _here(folder, command):
    output, errors = io.StringIO(), io.StringIO()
    status = 0
    with (
        _own_state(),
        _logging_to(errors),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        sys.argv = command
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            status = ended.code or 0
            if isinstance(status, str):
                print(status, file=errors)
                status = 1
    return Done(status, output.getvalue(), errors.getvalue())


def save_small(shipped, folder):
    """Save a shipped policy with a network of random weights that takes less time; ``folder``."""
    shipped = FlowPolicy.load(shipped)
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    policy = FlowPolicy(replace(shipped.config, model=model))
    for part in ("observation_normalizers", "action_normalizer"):
        getattr(policy, part).load_state_dict(getattr(shipped, part).state_dict())
    torch.manual_seed(0)
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return policy.save(folder)


@contextlib.contextmanager
def _own_state():
    """Give back what a script changes of its process, since it thinks that it has it for itself."""
    argv, path, threads = sys.argv, list(sys.path), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _logging_to(stream):
    """What ``logging.basicConfig`` does in a fresh process."""
    root = logging.getLogger()
    handler, level = logging.StreamHandler(stream), root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
