"""How much memory this process may still take: of the machine, and of the container it runs in."""

from __future__ import annotations

from pathlib import Path

_UNKNOWN = 1 << 40


def free_memory_bytes(root: Path = Path("/")) -> int:
    """What the machine and every control group of this process can still give; the smaller of the two.

    A great number where the system does not say.

    Args:
        root: of the file system with ``proc`` and ``sys``.
    """
    return min(_machine(root / "proc"), _container(root))


def _machine(proc: Path) -> int:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not on every system
        return _UNKNOWN


def _container(root: Path) -> int:
    """The least that any level of the process's control group leaves, in version 1 or 2 of their layout."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    left = _UNKNOWN
    # Inside a container its own group is often mounted at the top.
    for line in [*lines, "0::/", "0:memory:/"]:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            left = min(left, _left(level, *names))
            if level == base:
                break
    return left


def _left(folder: Path, limit: str, usage: str, cache: str) -> int:
    try:
        most = int((folder / limit).read_text())  # the word "max" is no number: unlimited
        used = int((folder / usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return _UNKNOWN
    reclaimable = sum(int(line.split()[1]) for line in lines if line.split()[:1] == [cache])
    return max(0, most - used + reclaimable) if most < _UNKNOWN else _UNKNOWN
