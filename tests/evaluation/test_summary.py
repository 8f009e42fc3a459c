import json
import math
import platform
from importlib import metadata

import numpy as np

from flowpolicy.evaluation import summary
from flowpolicy.evaluation.summary import write_summary

KEYS = {"task", "policy", "seed", "steps", "wall_seconds", "metrics", "checkpoint", "versions", "command"}


def _write(folder, **changes):
    settings = {
        "task": "hopper",
        "policy": "shortcut",
        "seed": 3,
        "steps": 10,
        "wall_seconds": 1.234567,
        "metrics": {
            "return_mean": np.float32(2.5),
            "return_ci95": (math.nan, np.float64(3)),
            "n": np.int64(4),
        },
        "checkpoint": folder / "checkpoint",
        "command": "python scripts/evaluate.py",
    }
    return json.loads(write_summary(folder, **{**settings, **changes}).read_text())


def test_summary_holds_what_later_work_reads_and_is_strict_json(tmp_path):
    found = _write(tmp_path / "new" / "run", video=None)
    assert set(found) >= KEYS
    assert found["metrics"] == {"return_mean": 2.5, "return_ci95": [None, 3.0], "n": 4}
    assert found["checkpoint"].endswith("checkpoint")
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["machine"]["cores"] >= 1
    assert found["video"] is None
    assert _write(tmp_path, checkpoint=None)["checkpoint"] is None


def test_no_commit_is_claimed_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "__file__", str(tmp_path / "flowpolicy" / "evaluation" / "summary.py"))
    assert summary.git_state() == (None, None)
