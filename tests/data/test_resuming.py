"""An import that was killed, and is started again, ends in the store of one that was not."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lerobot_samples
import numpy as np
import pytest

from flowpolicy.data import store_writing
from flowpolicy.data.importers import import_to_store, lerobot, source
from flowpolicy.data.store import read_demonstrations
from flowpolicy.data.store_writing import StoreWriter

pytest.importorskip("zarr")
pytest.importorskip("pyarrow")


def stopped_after(monkeypatch: pytest.MonkeyPatch, rows: int, stop: Callable[[], None]) -> None:
    """Imports note how far they are after each block, of a few rows, and stop after so many."""
    append = StoreWriter.append

    def append_and_stop(self: StoreWriter, block: Any) -> None:
        append(self, block)
        if self.rows >= rows:
            stop()

    monkeypatch.setattr(StoreWriter, "append", append_and_stop)
    monkeypatch.setattr(store_writing, "NOTED_EVERY_S", 0)
    monkeypatch.setattr(store_writing, "_SHARE", 0)
    monkeypatch.setattr(lerobot, "_MOST_FRAMES", 4)


def interrupt() -> None:
    raise KeyboardInterrupt


def content(path: Path) -> dict[str, bytes]:
    """Of the files of a folder or a zip."""
    if path.is_file():
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
def test_killed_and_started_again(tmp_path: Path, monkeypatch, caplog, name: str):
    pytest.importorskip("av")
    dataset = lerobot_samples.write(tmp_path)
    monkeypatch.setattr(store_writing, "_CHUNK_BYTES", 64)  # some of the last chunks hold zeros alone
    with monkeypatch.context() as patched:
        stopped_after(patched, 14, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:
            try:
                import_to_store(dataset, tmp_path / name)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / name).exists()
    for half in (".unfinished.tmp-7.json", "data/action/0.0.abc.partial"):
        (tmp_path / f".{name}.parts" / half).write_text("was being written")
    decoded = []
    frames = lerobot.Camera.blocks
    monkeypatch.setattr(lerobot.Camera, "blocks", lambda *a: decoded.append(a[2]) or frames(*a))
    with caplog.at_level(logging.INFO):
        resumed = import_to_store(dataset, tmp_path / name, attributes={"of": "the last call"})
    assert f"{name} goes on after episode 2 of 3." in caplog.text
    assert decoded == [0, 0, 2, 2]  # a first block, which tells how large images are, and the rest
    whole = import_to_store(dataset, tmp_path / f"whole_{name}", attributes={"of": "the last call"})
    assert content(resumed) == content(whole)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("format", "every"), [("robomimic", 2), ("d4rl", 1), ("lerobot", 2)])
def test_every_format_goes_on(tmp_path: Path, written_sample, monkeypatch, format: str, every: int):
    path = written_sample(format)
    monkeypatch.setattr(source, "BLOCK_BYTES", 300)
    request = {"action_bounds": [-0.5, 0.5], "out_of_bounds": "clip", "format": format, "every": every}
    request["zarr_format"] = 2 if format == "d4rl" else 3
    whole = read_demonstrations(import_to_store(path, tmp_path / "whole.zarr", **request))
    for rows in (7, len(whole.arrays["action"])):
        out = tmp_path / f"{rows}.zarr"
        with monkeypatch.context() as patched:
            stopped_after(patched, rows, interrupt)
            with pytest.raises(KeyboardInterrupt):
                import_to_store(path, out, **request)
        demos = read_demonstrations(import_to_store(path, out, **request))
        assert demos.attributes == whole.attributes
        assert {*demos.arrays} == {*whole.arrays}
        for key, array in whole.arrays.items():
            np.testing.assert_array_equal(demos.arrays[key], array)


def test_other_work_starts_over_and_says_so(tmp_path: Path, monkeypatch, caplog):
    path = shutil.copytree(lerobot_samples.write(tmp_path, 2, images="image"), tmp_path / "dataset")
    out, folder = tmp_path / "new" / "a.zarr", tmp_path / "new" / ".a.zarr.parts"
    changes: list[tuple[str, Callable[[], object], dict[str, Any]]] = [
        ("keys", lambda: None, {"keys": ["images.top"]}),
        ("the source's files", lambda: os.utime(path / "meta" / "info.json"), {}),
    ]
    for words, change, request in changes:
        with monkeypatch.context() as patched:
            stopped_after(patched, 14, interrupt)
            with pytest.raises(KeyboardInterrupt):
                import_to_store(path, out)
        assert f"remove {folder}" in caplog.text
        change()
        caplog.clear()
        import_to_store(path, out, **request)
        assert f"{out} before it was stopped differs in {words}; it starts over." in caplog.text
        assert [file.name for file in out.parent.iterdir()] == ["a.zarr"]
        shutil.rmtree(out.parent)


def test_an_error_leaves_nothing_to_go_on_with(tmp_path: Path, written_sample, monkeypatch):
    def fail() -> None:
        raise OSError("a disk that breaks")

    stopped_after(monkeypatch, 7, fail)
    with pytest.raises(Exception, match="a disk that breaks"):
        import_to_store(written_sample("d4rl"), tmp_path / "new" / "a.zarr")
    assert not (tmp_path / "new").exists()
