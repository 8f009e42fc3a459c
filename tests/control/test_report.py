"""The report and the statistics of runs of known telemetry."""

from __future__ import annotations

import numpy as np
import pytest

from flowpolicy.control.events import EXPLAINED, Event, EventLog
from flowpolicy.control.report import write_report
from flowpolicy.control.statistics import run_statistics
from flowpolicy.control.telemetry import Telemetry

PERIOD = 0.01


def telemetry(ticks, capacity=None, drift=0.0):
    """Ticks 1 ms late (every tenth 3 ms), 0.2 ms of work, a chunk every fourth; tick 50 is safe."""
    log = Telemetry(capacity or max(ticks, 1), 2)
    for tick in range(ticks):
        deadline = 5.0 + tick * PERIOD
        late = (0.003 if tick % 10 == 9 else 0.001) + drift * tick * PERIOD
        arrives = tick % 4 == 0
        action = np.array([tick // 4 % 2, 0.01 * (tick % 4)], np.float32)
        log.add(
            tick, deadline, deadline + late, deadline + late + 0.0002, 0.004, 0.002 if arrives else np.nan,
            1 if arrives else -1, tick // 4, tick % 4, 3 if tick == 50 else 0, np.nan, 0, action,
        )  # fmt: skip
    return log


def test_statistics_are_those_of_the_rows():
    found = run_statistics(telemetry(400).columns(), PERIOD)
    assert found["ticks"] == 400
    assert found["jitter_ms"]["p50"] == pytest.approx(1.0)
    assert found["jitter_ms"]["max"] == pytest.approx(3.0)
    assert found["work_us"]["p99"] == pytest.approx(200, rel=1e-3)
    assert found["inference_ms"]["p50"] == pytest.approx(2.0)
    assert found["delays"] == {"1": 100}
    assert found["sources"] == {"chunk": 399 / 400, "previous": 0, "fast": 0, "safe": 1 / 400}
    # At a change of chunk both dimensions jump by their range; inside the second moves by a third of its.
    assert found["seam"] == pytest.approx(1.0)
    assert found["inside"] == pytest.approx(np.sqrt((1 / 3) ** 2 / 2), rel=1e-4)


def test_drift_is_the_slope_of_the_lateness():
    found = run_statistics(telemetry(2000, drift=1e-4).columns(), PERIOD)
    assert found["drift_us_per_s"] == pytest.approx(100, abs=10)


def test_the_ring_keeps_the_newest_in_order():
    log = telemetry(250, capacity=100)
    assert log.written == 250
    assert log.rows()["tick"].tolist() == list(range(150, 250))


@pytest.mark.parametrize("ticks", [0, 1, 10, 30_000])
def test_a_page_for_any_run(tmp_path, ticks):
    events = EventLog()
    if ticks:
        events.add(Event.ROBOT_ERROR, 3, "<script>alert(1)</script>")
        events.add(Event.SAFE_ACTION, 5, count=2000)
    about = {"task": "toy", "rate_hz": 100.0, "stopped": "finished", "command": "python a & b"}
    path = write_report(tmp_path / "report.html", telemetry(ticks).columns(), events.content(), about)
    page = path.read_text()
    assert len(page) < 3_000_000
    assert "<script>" not in page
    assert "a &amp; b" in page
    if ticks:
        assert "&lt;script&gt;" in page
        assert EXPLAINED[Event.SAFE_ACTION] in page
        assert "2,000" in page
        assert page.count("data:image/png") == 3
    else:
        assert "No tick was run" in page


def test_telemetry_is_a_table(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    log = telemetry(60)
    table = pq.read_table(log.write(tmp_path))
    assert table.num_rows == 60
    assert table["source"].to_pylist()[50] == "safe"
    assert {"tick", "deadline", "action_0", "action_1", "events"} <= set(table.column_names)
