import io
import sys
import threading
import time

import pytest

from flowpolicy.runs import progress as module
from flowpolicy.runs.progress import progress, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch):
    """The clock, in a list to be changed."""
    now = [0.0]
    monkeypatch.setattr("flowpolicy.runs.progress.time.monotonic", lambda: now[0])
    return now


def test_nothing_is_drawn_where_stderr_is_no_terminal(capsys):
    with progress_bar(3, "train") as bar:
        bar.update(1, loss=0.5)
    assert list(progress([4, 5], "count")) == [4, 5]
    assert list(progress(3, "count")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_the_description_and_the_metrics(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(2, "train") as bar:
        bar.update(2, loss=0.123456, epoch=3)
    assert "train" in terminal.getvalue()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar(2, "silent") as bar:
        bar.update(1)
    assert "silent" not in terminal.getvalue()


def test_without_a_terminal_a_line_is_logged_now_and_then_also_while_nothing_is_finished(monkeypatch, caplog):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.02)
    with caplog.at_level("INFO"), progress_bar(10, "evaluate") as bar:
        deadline = time.monotonic() + 5
        while len(caplog.messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        bar.update(3)
        while "3 of 10" not in caplog.messages[-1] and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages[0] == caplog.messages[1] == "evaluate: 0 of 10 (0%) after 0 s"
    assert caplog.messages[-1].startswith("evaluate: 3 of 10 (30%) after 0 s, ")
    assert module.LINE_EVERY_S == 0.02


def test_the_first_line_comes_within_half_a_minute_and_none_after_the_end(monkeypatch, caplog):
    assert module.LINE_EVERY_S <= 30
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.5)
    before = threading.active_count()
    with caplog.at_level("INFO"):
        with progress_bar(2, "short"):
            pass
        dropped = progress_bar(2, "dropped")
        del dropped
        for _ in range(500):
            if threading.active_count() <= before:
                break
            time.sleep(0.02)
    assert threading.active_count() <= before
    assert not caplog.messages


def test_a_line_has_the_rate_since_the_last_one_the_time_left_and_the_metrics(now):
    with progress_bar(1000, "train") as bar:
        lines = []
        for second in range(1, 91):
            now[0] += 1.0
            bar.update(2 if second <= 60 else 4, loss=0.123456)
            if second % 30 == 0:
                lines.append(bar.line())
    assert lines == [
        "train: 60 of 1000 (6%) after 30 s, 2/s, 8 min left, loss 0.123",
        "train: 120 of 1000 (12%) after 60 s, 2/s, 7 min left, loss 0.123",
        "train: 240 of 1000 (24%) after 90 s, 4/s, 3 min left, loss 0.123",
    ]


def test_what_a_continued_run_had_done_before_is_no_rate_and_what_is_unknown_is_not_shown(now):
    with progress_bar(20_000, "train", done=10_000) as bar:
        now[0] += 30.0
        bar.update(3, loss=float("nan"))
        assert bar.line() == "train: 10003 of 20000 (50%) after 30 s, 0.1/s, 27.8 h left"


def test_unknown_totals_are_counted_and_none_is_silent(now, monkeypatch, caplog):
    with module.ProgressBar(None, "import") as bar:
        now[0] += 40.0
        bar.update(2)
        assert bar.line() == "import: 2 after 40 s, 0.05/s"
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with caplog.at_level("INFO"), progress_bar(None, "evaluate") as bar:
        bar.update()
    assert not caplog.messages
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(None, "evaluate") as bar:
        bar.update()
    assert terminal.getvalue() == ""
