"""An error names its own cause, Ctrl-C and a second writer leave nothing, memory is what is really free."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowpolicy.data.causes import reading_error
from flowpolicy.data.importers import import_demonstrations, import_to_store, importing
from flowpolicy.data.importers.source import BLOCK_BYTES
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.data.store_writing import store_writer
from flowpolicy.errors import DataError, FlowPolicyError

zarr = pytest.importorskip("zarr")
h5py = pytest.importorskip("h5py")
pytest.importorskip("pyarrow")

# --- causes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "permissions"),
        (
            OSError("Unable to synchronously open file (unable to open file: errno = 13, flags = 0)"),
            "permissions",
        ),
        (BlockingIOError(errno.EAGAIN, "unable to lock file, errno = 11"), "locked by another program"),
        (OSError("unable to lock file, errno = 11, error message = 'Resource'"), "locked by another program"),
        (MemoryError(), "memory"),
        (np.core._exceptions._ArrayMemoryError((10**12,), np.dtype("f4")), "memory"),
        (OSError(errno.EIO, "Input/output error"), "disk or the network"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "no file"),
        (OSError("truncated file: eof = 10"), "is damaged"),
    ],
)
def test_a_cause_is_not_called_damage(error: BaseException, says: str):
    sentence = str(reading_error(error, "a.hdf5", "is damaged"))
    assert says in sentence
    assert ("damaged" in sentence) == (says == "is damaged")


def test_a_locked_file_is_locked(write_sample: Callable[..., Path]):
    path = write_sample("robomimic")
    with path.open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="locked by another program"):
            import_demonstrations(path)


@pytest.mark.parametrize("format", ["robomimic", "adroit", "lerobot", "diffusion_policy"])
def test_a_file_that_may_not_be_read(format: str, write_sample: Callable[..., Path], monkeypatch):
    path = write_sample(format)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("h5py.File", refuse)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    monkeypatch.setattr("zarr.open_group", refuse)
    monkeypatch.setattr(Path, "read_bytes" if format == "adroit" else "lchmod", refuse)
    with pytest.raises(DataError, match="may not be read by this user"):
        import_demonstrations(path, format)


def test_more_than_the_memory_is_said_before_it_is_read(write_sample: Callable[..., Path], monkeypatch):
    monkeypatch.setattr(importing, "free_memory_bytes", lambda: 100)
    with pytest.raises(DataError, match="choose fewer"):
        import_demonstrations(write_sample("robomimic"))


def test_a_zip_that_cannot_be_written(tmp_path: Path, demos: Demonstrations, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(FlowPolicyError, match=r"Read-only file system.*choose a writable place"):
        write_demonstrations(tmp_path / "new" / "a.zarr.zip", demos)
    assert list(tmp_path.iterdir()) == []


# --- Ctrl-C, and company ----------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """SIGINT in this thread after so long, wherever the program then is; a late one is none."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
def test_ctrl_c_leaves_a_whole_store_or_nothing(tmp_path: Path, name: str):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 64, 64, 3), np.uint8)
    demos = Demonstrations({"action": np.zeros((60, 2), np.float32), "image": images}, np.array([30, 60]))
    ends = {"whole": 0, "nothing": 0}
    for seconds in np.linspace(0.001, 0.12, 9):
        out = tmp_path / f"{seconds:.4f}" / name
        stopped = False
        try:
            with interrupted_after(float(seconds)):
                write_demonstrations(out, demos)
        except KeyboardInterrupt:
            stopped = True
        if out.exists():
            assert read_demonstrations(out).num_steps == 60
            assert [path.name for path in out.parent.iterdir()] == [name]
        else:
            assert stopped
            assert not out.parent.exists()
        ends["whole" if out.exists() else "nothing"] += 1
    assert ends["nothing"] > 0


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path, demos: Demonstrations):
    for name in (".a.zarr.zip.parts", ".a.zarr.tmp-1.zip"):
        (tmp_path / name / "data").mkdir(parents=True)
    (tmp_path / ".a.zarr.zip.lock").touch()
    write_demonstrations(tmp_path / "a.zarr.zip", demos)
    assert [file.name for file in tmp_path.iterdir()] == ["a.zarr.zip"]


def test_a_second_writer_is_refused_and_breaks_nothing(tmp_path: Path, demos: Demonstrations):
    path = tmp_path / "a.zarr"
    refused: list[Exception] = []

    def second() -> None:
        try:
            write_demonstrations(path, demos)
        except FlowPolicyError as error:
            refused.append(error)

    with store_writer(path, demos.num_steps) as writer:
        writer.append(demos.arrays)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        writer.finish(demos.episode_ends)
    assert "Another program is writing" in str(refused[0])
    np.testing.assert_array_equal(read_demonstrations(path).arrays["action"], demos.arrays["action"])
    assert [file.name for file in tmp_path.iterdir()] == ["a.zarr"]


# --- memory -----------------------------------------------------------------------------------------------


def system(root: Path, group: str, files: dict[str, str]) -> Path:
    """A root with 8 GB available and this process in ``group``."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(f"{group}\n")
    for name, content in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        ("0::/", {}, 8_192_000_000),
        ("0::/", {"memory.max": "max\n", "memory.current": "5", "memory.stat": ""}, 8_192_000_000),
        (
            "0::/job",
            {
                "job/memory.max": "1000000000\n",
                "job/memory.current": "400000000\n",
                "job/memory.stat": "anon 1\ninactive_file 100000000\n",
            },
            700_000_000,
        ),
        (  # the limit of a group around one's own
            "0::/a/b",
            {"a/memory.max": "500\n", "a/memory.current": "100\n", "a/memory.stat": "",
             "a/b/memory.max": "max\n", "a/b/memory.current": "50", "a/b/memory.stat": ""},
            400,
        ),
        (
            "4:memory:/docker/x",
            {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "600",
             "memory/memory.stat": "total_inactive_file 50\n"},
            150,
        ),
    ],
)  # fmt: skip
def test_a_containers_limit_is_seen(tmp_path: Path, group: str, files: dict[str, str], free: int):
    assert free_memory_bytes(system(tmp_path, group, files)) == free


def test_an_import_holds_a_block_and_not_the_file(tmp_path: Path):
    import tracemalloc

    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for i in range(4):
            file[f"data/demo_{i}/actions"] = np.zeros((200, 2))
            frames = np.random.default_rng(i).integers(0, 256, (200, 160, 160, 3), np.uint8)
            file.create_dataset(f"data/demo_{i}/obs/image", data=frames, chunks=(1, 160, 160, 3))
    size = path.stat().st_size
    import_to_store(path, tmp_path / "warm.zarr", keys=[])  # what libraries keep for good
    tracemalloc.start()
    import_to_store(path, tmp_path / "out.zarr")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < min(3 * BLOCK_BYTES, size)


# --- chunks that zarr leaves out --------------------------------------------------------------------------


def zeros_left_out(path: Path, reward: Any, observation: Any, **how: Any) -> Path:
    """A store as zarr's own default writer makes it: chunks of the fill value alone are not stored."""
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    arrays = {"data/action": np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32),
              "data/reward": reward, "data/observation": observation,
              "meta/episode_ends": np.array([10, 20])}  # fmt: skip
    for name, values in arrays.items():
        group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=(5, *values.shape[1:]), **how
        )[...] = values
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_zeros_that_zarr_did_not_store_are_zeros(tmp_path: Path, zipped: bool, caplog):
    observation = np.ones((20, 3), np.float32)
    observation[4:16] = 0  # a robot at rest from the middle of one chunk to the middle of another
    path = zeros_left_out(tmp_path / "a.zarr", np.zeros(20, np.float32), observation)
    if zipped:
        import shutil

        path = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", path))
    demos = read_demonstrations(path)
    np.testing.assert_array_equal(demos.arrays["observation"], observation)
    assert not demos.arrays["reward"].any()
    assert "read as the declared fill value" in caplog.text


def test_a_chunk_that_may_be_lost_needs_a_word(tmp_path: Path):
    observation = np.ones((20, 3), np.float32)
    observation[5:10] = 0  # exactly one chunk: this is what a lost one looks like too
    path = zeros_left_out(tmp_path / "a.zarr", np.ones(20, np.float32), observation)
    with pytest.raises(DataError, match=r"1 of 4 chunks.*options.missing_chunks=fill"):
        read_demonstrations(path)
    demos = import_demonstrations(path, options={"missing_chunks": "fill"})
    np.testing.assert_array_equal(demos.arrays["observation"], observation)
    undefined = zeros_left_out(tmp_path / "b.zarr", np.ones(20, np.float32), observation)
    about = undefined / "data" / "observation" / ".zarray"
    about.write_text(about.read_text().replace('"fill_value": 0.0', '"fill_value": null'))
    with pytest.raises(DataError, match="copy the store again"):
        import_demonstrations(undefined, options={"missing_chunks": "fill"})


def test_our_own_stores_lack_no_chunk(tmp_path: Path, demos: Demonstrations):
    demos.arrays["reward"][:] = 0
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    (path / "data" / "reward" / "0").unlink()
    with pytest.raises(DataError, match=r"'data/reward' are missing; copy the store again\."):
        import_demonstrations(path, options={"missing_chunks": "fill"})
