"""A version of the package at work beside another one: its checkout and its processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "peers" / "version_worker.py"
CODE = ("flowpolicy", "envs", "configs", "scripts")
CHECKPOINT = "benchmarks/checkpoints/hopper-shortcut-seed0"
QUIET = ["env=hopper", "seed=0", "device=cpu", "video=0"]


@dataclass(frozen=True)
class Version:
    """One of the two.

    Attributes:
        name: ``base`` or ``new``.
        root: of its checkout.
        threads: of its processes.
    """

    name: str
    root: Path
    threads: int

    def process(self, job: str, settings: dict[str, Any], **options: Any) -> subprocess.Popen[str]:
        """A worker of this version."""
        words = [sys.executable, str(WORKER), str(self.root), job, json.dumps(settings)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(self.threads)}
        return subprocess.Popen(words, text=True, cwd=self.root, env=environment, **options)

    def do(self, job: str, settings: dict[str, Any]) -> str:
        """What a worker says that ends by itself."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.process(job, settings, **pipes)
        said, complaint = process.communicate()
        if process.returncode:
            raise SystemExit(f"{self.name} ({self.root}), {job} {settings}:\n{complaint[-3000:]}")
        return said

    def state(self) -> dict[str, Any]:
        """Its commit, and a hash of what differs from it: the two in common mean the same code."""
        changes = _git(self.root, "diff", "HEAD", "--", *CODE) + _git(
            self.root, "status", "--porcelain", "--", *CODE
        )
        changed = hashlib.sha256(changes.encode()).hexdigest()[:16] if changes else None
        return {"git_commit": _git(self.root, "rev-parse", "HEAD"), "changes": changed}


class Turns:
    """A worker that works so many times when told to, and says how long it took."""

    def __init__(self, version: Version, job: str, settings: dict[str, Any]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = version.process(job, settings, **pipes)
        self.name = f"{version.name}, {job} {settings}"

    def answer(self) -> Any:
        """The next line; the first says that it is ready."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended early")
        return json.loads(line)

    def seconds(self, times: int) -> tuple[float, float]:
        """By the clock and of the processor."""
        assert self.process.stdin
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        wall, computed = self.answer()
        return wall, computed

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


@contextlib.contextmanager
def checkout(path_or_commit: str) -> Iterator[Path]:
    """The folder of a version: the given one, or a temporary worktree of a commit."""
    if Path(path_or_commit).is_dir():
        yield Path(path_or_commit).resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        _git(ROOT, "worktree", "add", "--detach", str(folder), path_or_commit)
        try:
            yield folder
        finally:
            _git(ROOT, "worktree", "remove", "--force", str(folder))


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()
