import contextlib
import ctypes
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from flowpolicy import FlowPolicy, FlowPolicyError, PolicyConfig
from flowpolicy.data.store import read_demonstrations, write_demonstrations
from flowpolicy.files.storage import atomic_file, atomic_folder, write_json
from flowpolicy.models.config import TransformerConfig


def fill(folder, text):
    with atomic_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(text)


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    fill(tmp_path / "a" / "out", "one")
    (tmp_path / "a" / "out" / "more").write_text("stale")
    fill(tmp_path / "a" / "out", "two")
    assert content(tmp_path) == {"a/out/inner/file": "two"}


def test_an_error_inside_leaves_the_old_folder_and_no_litter(tmp_path):
    fill(tmp_path / "out", "one")

    def interrupted(error):
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "half").write_text("hal")
            raise error

    for error in (RuntimeError("boom"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            interrupted(error)
        assert content(tmp_path) == {"out/inner/file": "one"}
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_without_an_atomic_exchange_the_folder_is_replaced_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    fill(tmp_path / "out", "one")
    fill(tmp_path / "out", "two")
    assert content(tmp_path) == {"out/inner/file": "two"}


def test_a_reader_always_finds_one_of_the_two(tmp_path):
    """While folders are swapped as fast as they can be, one is there at every look."""
    fill(tmp_path / "out", "0")
    script = (
        "import pathlib, sys\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "looks = misses = 0\n"
        "while not (path.parent / 'stop').exists():\n"
        "    looks, misses = looks + 1, misses + (not (path / 'inner' / 'file').exists())\n"
        "print(looks, misses)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "ready\n"
        try:
            for number in range(100):
                fill(tmp_path / "out", str(number))
        finally:
            (tmp_path / "stop").touch()  # else the reader would look for ever
        looks, misses = map(int, reader.stdout.read().split())
    assert looks > 100
    assert misses == 0


def test_a_file_where_a_folder_belongs_is_refused_and_kept(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(FlowPolicyError, match="choose another path"):
        fill(tmp_path / "out", "one")
    assert content(tmp_path) == {"out": "precious"}


def test_an_atomic_file_keeps_its_suffix_and_the_old_content(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def interrupted():
        with atomic_file(path) as temporary:
            assert temporary.suffix == ".csv"
            temporary.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert content(tmp_path) == {"table.csv": "old"}
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert content(tmp_path) == {"table.csv": "new"}


def test_json_takes_arrays_and_makes_null_of_what_json_lacks(tmp_path):
    values = {
        "tensor": torch.tensor([1.5, torch.inf]),
        "array": np.float32(2.0),
        "nan": float("nan"),
        "path": tmp_path,
        "nested": ({"deep": [np.int64(3), None, True]},),
    }
    write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "tensor": [1.5, None],
        "array": 2.0,
        "nan": None,
        "path": str(tmp_path),
        "nested": [{"deep": [3, None, True]}],
    }


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FlowPolicyError, match="cannot be written") as refused:
        write_json(tmp_path / "file" / "a.json", {})
    assert "\n" not in str(refused.value)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 512 kB, mounted for one test."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("a file system of its own takes root on Linux to mount")
    mount, target = ctypes.CDLL(None, use_errno=True), os.fsencode(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    if mount.mount(b"tmpfs", target, b"tmpfs", 0, b"size=512k") != 0:
        pytest.skip(f"tmpfs cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    yield tmp_path / "disk"
    mount.umount2(target, 2)


def sized_policy(width):
    config = PolicyConfig(
        objective={"name": "flow_matching"},
        model=TransformerConfig(width=width, depth=1, num_heads=2),
        observations={"observation": (3,)},
        action_dim=2,
        obs_horizon=1,
        action_horizon=2,
        execute_horizon=2,
    )
    return FlowPolicy(config)


@contextlib.contextmanager
def refused_for_want_of_space(folder):
    names = sorted(path.name for path in folder.iterdir())
    with pytest.raises(FlowPolicyError, match="disk is full") as refused:
        yield
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in folder.iterdir()) == names  # no litter


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk):
    small, large = sized_policy(16), sized_policy(160)
    small.save(small_disk / "checkpoint")
    with refused_for_want_of_space(small_disk):
        large.save(small_disk / "checkpoint")
    loaded = FlowPolicy.load(small_disk / "checkpoint").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in small.state_dict().items())
    small.save(small_disk / "checkpoint")  # there is room again


def test_a_full_disk_leaves_the_previous_training_state(small_disk):
    from flowpolicy.pretraining.state import TrainingState

    def state(width, step):
        network = sized_policy(width).network
        return TrainingState(network, network, torch.optim.AdamW(network.parameters()), step)

    kept = state(16, step=5)
    kept.save(small_disk, {"seed": 1})
    with refused_for_want_of_space(small_disk):
        state(160, step=6).save(small_disk, {"seed": 1})
    other = state(16, step=0)
    assert other.load(small_disk, {"seed": 1})
    assert other.step == 5
    pairs = zip(other.network.parameters(), kept.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["big.zarr", "big.zarr.zip"])
def test_a_full_disk_leaves_no_half_store(small_disk, demos, name):
    write_demonstrations(small_disk / "good.zarr.zip", demos)
    ends = np.array([1_000_000])
    noise = np.random.default_rng(0).normal(size=(1_000_000, 1))
    big = type(demos)({"action": noise}, ends)
    with refused_for_want_of_space(small_disk):
        write_demonstrations(small_disk / name, big)
    assert read_demonstrations(small_disk / "good.zarr.zip").num_steps == demos.num_steps


def test_a_full_disk_leaves_the_previous_file(small_disk):
    write_json(small_disk / "a.json", {"kept": 1})
    with refused_for_want_of_space(small_disk):
        write_json(small_disk / "a.json", {"text": "x" * 1_000_000})
    assert json.loads((small_disk / "a.json").read_text()) == {"kept": 1}
