"""The report and the statistics of runs of known telemetry."""

from __future__ import annotations

import re

import numpy as np
import pytest
from markupsafe import escape

from flowpolicy.control.events import EXPLAINED, Event, EventLog
from flowpolicy.control.report import write_report
from flowpolicy.control.statistics import run_statistics
from flowpolicy.control.telemetry import Telemetry
from flowpolicy.plots.control import WINDOW_S, busiest

PERIOD = 0.01


def telemetry(ticks, capacity=None, drift=0.0, left_out=()):
    """Ticks 1 ms late (every tenth 3 ms), 0.2 ms of work, a chunk every fourth; tick 50 is safe."""
    log = Telemetry(capacity or max(ticks, 1), 2)
    for tick in sorted(set(range(ticks)) - set(left_out)):
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
    assert found["sources"] == {"chunk": 399 / 400, "previous": 0, "fast": 0, "safe": 1 / 400, "operator": 0}
    # At a change of chunk both dimensions jump by their range; inside the second moves by a third of its.
    assert found["seam"] == pytest.approx(1.0)
    assert found["inside"] == pytest.approx(np.sqrt((1 / 3) ** 2 / 2), rel=1e-4)


def test_ticks_that_did_not_happen_are_counted_and_bridge_no_seam():
    found = run_statistics(telemetry(400, left_out=[100, 101, 102, 300]).columns(), PERIOD)
    assert (found["ticks"], found["missed"]) == (396, 4)
    assert found["seconds"] == pytest.approx(4.0)
    assert found["seam"] == pytest.approx(1.0)


def test_a_safe_action_is_no_seam():
    columns = telemetry(400).columns()
    columns["action_0"][50] = 1e6  # whatever is sent there, it comes from no chunk
    columns["action_0"][:50] *= 1e6
    columns["action_0"][51:] *= 1e6
    found = run_statistics(columns, PERIOD)
    assert found["seam"] == pytest.approx(1.0)
    assert found["inside"] == pytest.approx(np.sqrt((1 / 3) ** 2 / 2), rel=1e-4)


def test_drift_is_the_slope_of_the_lateness():
    found = run_statistics(telemetry(2000, drift=1e-4).columns(), PERIOD)
    assert found["drift_us_per_s"] == pytest.approx(100, abs=10)
    assert found["drift_us"] == pytest.approx(
        100 * 20 + 2000, abs=2
    )  # the last tick is a tenth one, 2 ms later


def test_the_ring_keeps_the_newest_in_order():
    log = telemetry(250, capacity=100)
    assert log.written == 250
    assert log.rows()["tick"].tolist() == list(range(150, 250))


@pytest.mark.parametrize("ticks", [0, 1, 30_000])  # between them, the runs of other pages
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
        assert page.count("data:image/png") == 4
    else:
        assert "No tick was run" in page


def page_of(tmp_path, columns, events=None, **about):
    about = {"task": "toy", "rate_hz": 100.0, "stopped": "finished", **about}
    content = (events or EventLog()).content()
    return write_report(tmp_path / "report.html", columns, content, about).read_text()


@pytest.mark.usefixtures("empty_figures")
def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path):
    hostile = '"><img src=http://example.com/x onerror=alert(1)>'
    events = EventLog()
    events.add(Event.ROBOT_ERROR, 1, hostile)
    page = page_of(
        tmp_path,
        telemetry(50).columns(),
        events,
        task=hostile,
        stopped=hostile,
        plan={hostile: hostile},
        **{hostile: 1},
    )
    text = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]*"', "", page)
    assert text.count(escape(hostile)) >= 6
    assert not re.findall(
        r"<(?!/?(?:html|meta|title|style|body|h1|h2|div|b|br|p|table|tr|t[dh]|span|code|img)\b|!doctype)",
        text,
    )
    assert not re.search(r"<img[^>]*(onerror|src)", text)


@pytest.mark.parametrize(
    ("safe", "missed", "stopped", "grade"),
    [
        (0, 0, "finished", "good"),
        (2, 2, "interrupted", "good"),
        (0, 10, "finished", "fair"),
        (10, 0, "finished", "fair"),
        (30, 30, "finished", "bad"),
        (0, 0, "watchdog: no valid command in 100 ticks in a row", "bad"),
    ],
)
def test_the_verdict_is_of_missed_and_safe_ticks_and_of_the_end(
    tmp_path, monkeypatch, safe, missed, stopped, grade
):
    monkeypatch.setattr("flowpolicy.control.report._pictures", lambda *_: {})  # they take most of the time
    columns = telemetry(1000, left_out=range(200, 200 + missed)).columns()
    columns["source"][:] = "chunk"
    columns["source"][500 : 500 + safe] = "safe"
    page = page_of(tmp_path, columns, stopped=stopped)
    assert f'class="verdict {grade}"' in page
    assert (
        f"{1000 - missed:,} ticks ran. {missed} could not begin within their period and {safe} sent" in page
    )


def test_an_event_is_named_with_its_first_and_last_tick_though_neither_source_has_both(tmp_path, monkeypatch):
    """Records are the first of a kind, telemetry's rows the newest."""
    monkeypatch.setattr("flowpolicy.control.report._pictures", lambda *_: {})
    events, log = EventLog(keep=2), telemetry(300, capacity=100)
    for tick in (10, 20, 250):
        events.add(Event.LIMIT_JERK, tick)
    columns = log.columns()
    columns["events"][50] = 1 << Event.LIMIT_JERK  # row of tick 250
    page = page_of(tmp_path, columns, events)
    row = page[page.index("limit jerk</td>") :]
    assert re.findall(r"tick ([0-9,]+)", row)[:2] == ["10", "250"]
    assert "2.50 s" in row
    assert "Telemetry kept ticks 200 to 299" in page


def test_a_run_without_any_chunk_or_command_has_a_page(tmp_path):
    columns = telemetry(30).columns()
    columns["delay"][:], columns["chunk"][:], columns["source"][:] = -1, -1, "safe"
    for name in ("inference", "observation_age", "action_0", "action_1"):
        columns[name][:] = np.nan
    page = page_of(tmp_path, columns, stopped="no chunk came within 1 s")
    assert "no chunk arrived" in page
    assert "nan" not in re.sub(r'base64,[^"]*', "", page)


def test_the_window_is_where_most_events_are():
    seconds, bits = np.arange(3000) * PERIOD, np.zeros(3000, np.int32)
    assert busiest(seconds, bits) == pytest.approx(seconds[-1] - WINDOW_S)
    bits[[100, 500, 2900]] = 1
    bits[1500:1520] = 2
    assert busiest(seconds, bits) <= 15.0 <= 15.19 <= busiest(seconds, bits) + WINDOW_S
    assert busiest(seconds[:100], bits[1450:1550]) == 0.0  # a run shorter than the window


def test_telemetry_is_a_table(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    log = telemetry(60)
    table = pq.read_table(log.write(tmp_path))
    assert table.num_rows == 60
    assert table["source"].to_pylist()[50] == "safe"
    assert {"tick", "deadline", "action_0", "action_1", "events"} <= set(table.column_names)
