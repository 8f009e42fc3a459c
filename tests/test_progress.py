import io
import sys

import pytest

from flowpolicy.progress import progress, progress_bar


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


def test_without_a_total_nothing_is_drawn_on_a_terminal_either(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(None, "practise") as bar:
        bar.update(3, loss=0.5)
    assert terminal.getvalue() == ""
