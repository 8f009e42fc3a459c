"""Telemetry as a recording of the Rerun viewer (https://rerun.io)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.control.statistics import Columns
from flowpolicy.control.telemetry import SOURCES
from flowpolicy.files.storage import atomic_file
from flowpolicy.optional import optional


def write_rerun(path: Path, columns: Columns, events: Mapping[str, Any]) -> Path:
    """Write an ``.rrd`` file: a time series for each column, and the event log as text.

    Args:
        path: of the file.
        columns: of the telemetry.
        events: of :meth:`flowpolicy.control.events.EventLog.content`.

    Returns:
        ``path``.

    Raises:
        ConfigError: rerun-sdk is not installed.
    """
    with optional("rerun=true needs rerun-sdk", "rerun"):
        import rerun
    with atomic_file(path) as temporary:
        recording = rerun.RecordingStream("flowpolicy")
        recording.save(temporary)
        series = {
            "timing/lateness_ms": 1e3 * (columns["started"] - columns["deadline"]),
            "timing/work_ms": 1e3 * (columns["finished"] - columns["started"]),
            "timing/observation_age_ms": 1e3 * columns["observation_age"],
            "inference/ms": 1e3 * columns["inference"],
            **{
                f"inference/{name}": np.where(columns[name] >= 0, columns[name], np.nan)
                for name in ("delay", "chunk", "chunk_step")
            },
            "inference/seam": columns["seam"],
            **{f"source/{name}": np.where(columns["source"] == name, 1.0, 0.0) for name in SOURCES},
            **{f"action/{name[7:]}": columns[name] for name in columns if name.startswith("action_")},
        }
        for name, values in series.items():
            known = np.isfinite(values)
            if known.any():
                recording.send_columns(
                    name, [rerun.TimeColumn("tick", sequence=columns["tick"][known])],
                    columns=rerun.Scalars.columns(scalars=values[known].astype(np.float64)),
                )  # fmt: skip
        for record in events["records"]:
            recording.set_time("tick", sequence=record["tick"])
            recording.log("events", rerun.TextLog(f"{record['event']} {record['detail']}".strip()))
        recording.flush()
        del recording
    return path
