"""A recording for the Rerun viewer holds the telemetry, and a missing package is one sentence."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.rerun_log import write_rerun
from flowpolicy.control.telemetry import Telemetry
from flowpolicy.errors import ConfigError


@pytest.fixture
def run():
    """Columns and events of 40 ticks 0.1 ms late, of which every fourth brings a chunk and tick 7 is safe."""
    log, events = Telemetry(40, 2), EventLog()
    for tick in range(40):
        at, arrives = 5.0 + 0.01 * tick, tick % 4 == 0
        if tick == 7:
            events.add(Event.SAFE_ACTION, tick, "nothing to send")
        log.add(
            tick, at, at + 1e-4, at + 2e-4, 0.003, 0.002 if arrives else np.nan, 1 if arrives else -1,
            tick // 4, tick % 4, 3 if tick == 7 else 0, np.nan, events.take_bits(), [0.1 * tick, -1.0],
        )  # fmt: skip
    return log.columns(), events.content()


def test_without_the_package_it_is_one_sentence(tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ConfigError, match=r"pip install 'flowpolicy\[rerun\]'"):
        write_rerun(tmp_path / "run.rrd", *run)
    assert not list(tmp_path.iterdir())


def test_what_is_written_can_be_read_back(tmp_path, run):
    rerun = pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    reader = getattr(getattr(rerun, "chunk", None), "RrdReader", None)
    if reader is None:
        pytest.skip("this version of rerun-sdk has no reader of recordings")
    path = write_rerun(tmp_path / "run.rrd", *run)
    assert [file.name for file in tmp_path.iterdir()] == ["run.rrd"]
    found = {}
    for chunk in reader(path).stream().to_chunks():
        batch = chunk.to_record_batch()
        names = [name for name in batch.schema.names if name in ("Scalars:scalars", "TextLog:text")]
        if names:
            ticks, values = (batch.column(name).to_pylist() for name in ("tick", names[0]))
            found[chunk.entity_path] = dict(zip(ticks, (value[0] for value in values), strict=True))
    assert found["/timing/lateness_ms"] == pytest.approx(dict.fromkeys(range(40), 0.1), rel=1e-6)
    assert found["/inference/ms"] == pytest.approx(dict.fromkeys(range(0, 40, 4), 2.0))  # no row where none
    assert found["/action/0"] == pytest.approx({tick: 0.1 * tick for tick in range(40)}, rel=1e-6)
    assert [tick for tick, share in found["/source/safe"].items() if share] == [7]
    assert found["/events"] == {7: "safe action nothing to send"}


def test_an_empty_run_is_a_recording_too(tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    path = write_rerun(tmp_path / "run.rrd", Telemetry(1, 2).columns(), EventLog().content())
    assert path.stat().st_size > 0
