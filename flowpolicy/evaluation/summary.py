"""`summary.json`: settings, results and machine of a run."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from flowpolicy.files.storage import write_json

_PACKAGES = (
    "flowpolicy",
    "torch",
    "numpy",
    "scipy",
    "zarr",
    "gymnasium",
    "mujoco",
    "gymnasium-robotics",
    "gym-pusht",
    "metaworld",
    "robosuite",
    "robomimic",
    "stable-baselines3",
)


def write_summary(
    run_dir: Path | str,
    *,
    task: str,
    policy: str,
    seed: int,
    steps: int,
    wall_seconds: float,
    metrics: Mapping[str, Any],
    checkpoint: Path | str | None,
    command: str,
    **extra: Any,
) -> Path:
    """Write ``run_dir/summary.json``, whole or not at all.

    Args:
        run_dir: the run's folder; it is made where it does not exist.
        task: the task's name.
        policy: the policy's name, e.g. ``shortcut``.
        seed: of the run.
        steps: optimiser steps, environment steps or episodes: what the script counts.
        wall_seconds: from start to end, of a resumed run those of its last start.
        metrics: figures by name; intervals as two numbers, NaN and infinity become null.
        checkpoint: folder of the policy that was made or evaluated, or None.
        command: the command that made the run.
        extra: further entries, by name.

    Returns:
        Path of the file. Beside the above it holds ``versions``, ``git_commit`` (None outside a checkout;
        ``git_dirty`` says whether files differed from it), ``machine`` and ``date``.

    Raises:
        FlowPolicyError: when the folder cannot be written.
    """
    path = Path(run_dir) / "summary.json"
    commit, dirty = git_state()
    content = {
        "task": task,
        "policy": policy,
        "seed": seed,
        "steps": steps,
        "wall_seconds": round(wall_seconds, 2),
        "metrics": dict(metrics),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        **extra,
        "versions": versions(),
        "git_commit": commit,
        "git_dirty": dirty,
        "machine": machine(),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(path, content)
    return path


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that a result can depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> tuple[str | None, bool | None]:
    """Commit of this package's checkout and whether files differ from it; (None, None) elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed as a wheel: the folder around it may be anyone's repository
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit or None, None if changes is None else bool(changes)


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, torch's threads, and the GPU where there is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
