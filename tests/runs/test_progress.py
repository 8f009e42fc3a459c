import io
import sys

import pytest

from flowpolicy.runs.progress import progress, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def test_without_a_terminal_a_line_is_logged_now_and_then(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("flowpolicy.runs.progress.time.monotonic", lambda: now[0])
    with caplog.at_level("INFO"), progress_bar(1000, "train") as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.update(2, loss=0.123456)
    assert caplog.messages == [
        f"train: {2 * at} of 1000 ({at // 5}%) after {at} s, loss 0.123" for at in (30, 60, 90)
    ]


def test_unknown_totals_are_counted_and_none_is_silent(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("flowpolicy.runs.progress.time.monotonic", lambda: now[0])

    def items():
        for item in range(3):
            now[0] += 20.0
            yield item

    with caplog.at_level("INFO"):
        assert list(progress(items(), "import")) == [0, 1, 2]
        assert caplog.messages == ["import: 2 after 40 s"]
        with progress_bar(None, "evaluate") as bar:
            now[0] += 100.0
            bar.update()
    assert len(caplog.messages) == 1
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(None, "evaluate") as bar:
        bar.update()
    assert terminal.getvalue() == ""
