"""How tests run a script: as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_script(folder, repo_root, script, *options, fails=False):
    """Run ``scripts/<script>`` in ``folder``; a failure that is expected must be one sentence on stderr."""
    done = subprocess.run(
        [sys.executable, str(repo_root / "scripts" / script), *map(str, options)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=250,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stderr
    if fails:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done
