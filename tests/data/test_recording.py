"""A store that grows episode by episode, and what is left of it when its program is killed."""

from __future__ import annotations

import numpy as np
import pytest

from flowpolicy.data import store_writing
from flowpolicy.data.command_source import OPERATOR, POLICY, SAFE, commanded_shares, learnt_steps
from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.inspection import inspect_demonstrations, table
from flowpolicy.data.mixture import combined
from flowpolicy.data.recording import RecordedStore, recover
from flowpolicy.data.robomimic_writing import write_robomimic
from flowpolicy.data.sampling import ChunkSampler
from flowpolicy.data.store import Demonstrations, read_demonstrations
from flowpolicy.data.weighting import MixtureSampler
from flowpolicy.errors import DataError


def rows(first, count, source=POLICY):
    """Rows that tell their number."""
    numbers = np.arange(first, first + count)
    image = np.broadcast_to(numbers[:, None, None, None].astype(np.uint8), (count, 8, 8, 3))
    return {
        "observation": numbers[:, None].astype(np.float32), "image": image.copy(),
        "action": np.stack([numbers, -numbers], axis=1).astype(np.float32),
        "source": np.full(count, source, np.int8), "tick": 2 * numbers,
    }  # fmt: skip


def record(path, lengths):
    store, first = RecordedStore(path, {"fps": 30}), 0
    for number, length in enumerate(lengths):
        for step in range(length):
            store.append(rows(first + step, 1, number % 3))
        first += length
        store.end_episode(("success",) if number % 2 else ())
    return store


def test_who_was_in_command_comes_along_where_keys_are_chosen(tmp_path):
    path = record(tmp_path / "run", [3, 7]).close()
    demos = import_demonstrations(path, keys=["observation"])
    assert set(demos.arrays) == {"observation", "action", "source"}
    whole = import_demonstrations(write_robomimic(tmp_path / "out.hdf5", read_demonstrations(path))).arrays
    assert {"source", "tick"} < set(whole)


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_what_is_recorded_comes_back(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(store_writing, "_CHUNK_BYTES", chunk)  # chunks end inside episodes, and beyond them
    path = record(tmp_path / "run", [3, 7, 1, 12]).close()
    demos = read_demonstrations(path)
    assert demos.episode_ends.tolist() == [3, 10, 11, 23]
    for key, values in rows(0, 23).items():
        if key != "source":
            np.testing.assert_array_equal(demos.arrays[key], values)
    assert demos.masks == {"success": [1, 3]}
    assert demos.feature("image").name == "image"
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_a_killed_run_loses_the_episode_under_way_alone(tmp_path):
    path = tmp_path / "run"
    store = record(path, [3, 7])
    store.append(rows(10, 5))
    store._writer.flush()  # some of it may be on disk
    (tmp_path / ".run.recording" / "data" / "action" / "0.0.abc.partial").touch()  # zarr was writing it
    store._opened.close()  # as the system does for a killed program
    assert not path.exists()
    with pytest.raises(DataError, match=r"2 episodes .* choose another name"):
        RecordedStore(path, {})
    demos = read_demonstrations(path)
    assert demos.episode_ends.tolist() == [3, 10]
    assert demos.attributes["fps"] == 30
    np.testing.assert_array_equal(demos.arrays["action"], rows(0, 10)["action"])
    with pytest.raises(DataError, match="exists already"):
        RecordedStore(path, {})


def test_one_writer_at_a_time_and_nothing_of_nothing(tmp_path):
    store = RecordedStore(tmp_path / "run", {})
    with pytest.raises(DataError, match="writing"):
        RecordedStore(tmp_path / "run", {})
    store.end_episode()
    assert store.close() is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="zip"):
        RecordedStore(tmp_path / "run.zip", {})


def test_a_run_killed_before_its_first_episode_leaves_no_store(tmp_path):
    store = RecordedStore(tmp_path / "run", {})
    store.append(rows(0, 5))
    store._opened.close()
    assert recover(tmp_path / "run") == 0
    RecordedStore(tmp_path / "run", {}).close()


def test_the_table_says_who_was_in_command(tmp_path):
    path = record(tmp_path / "run", [5, 3, 2]).close()
    text = table(inspect_demonstrations(path))
    assert "policy 50.0%, operator 30.0%, safe action 20.0%" in text
    assert "success 1" in text


def test_safe_actions_are_never_learnt_and_the_operators_alone_on_request():
    source = np.array([POLICY, OPERATOR, OPERATOR, SAFE, POLICY, OPERATOR], np.int8)
    arrays = {"source": source, "action": np.zeros((6, 1), np.float32)}
    assert commanded_shares(arrays) == {"policy": 2 / 6, "operator": 3 / 6, "safe action": 1 / 6}
    assert learnt_steps({"action": arrays["action"]}, "operator", "demos") is None
    import torch

    def windows(only):
        learnt = learnt_steps(arrays, only, "demos")
        action = torch.arange(6.0)[:, None]
        sampler = ChunkSampler({"observation": action}, action, np.array([4, 6]), 1, 3, None, learnt)
        batch = sampler.batch(torch.arange(len(sampler)))
        return batch.observation["observation"][:, 0, 0].tolist(), batch.mask.tolist()

    starts, mask = windows("operator")
    assert starts == [1, 2, 5]
    assert mask == [[True, True, False], [True, False, False], [True, False, False]]
    starts, mask = windows(None)
    assert starts == [0, 1, 2, 4, 5]
    assert mask[0] == [True, True, True]
    assert mask[2] == [True, False, False]
    with pytest.raises(DataError, match="no step of the policy's"):
        learnt_steps({"source": np.full(3, OPERATOR)}, "policy", "demos")


def test_corrections_beside_demonstrations_are_the_operators_steps_alone():
    import torch

    def demos(length, **more):
        numbers = np.arange(float(length), dtype=np.float32)[:, None]
        arrays = {"observation": numbers, "action": numbers, **more}
        return Demonstrations(arrays, np.array([length]), source=f"{length} steps")

    source = np.array([POLICY, POLICY, OPERATOR, OPERATOR, SAFE], np.int8)
    both = combined([demos(4), demos(5, source=source)], ["observation"])
    learnt = learnt_steps(both.arrays, "operator", both.source)
    assert learnt.tolist() == [True] * 4 + [False, False, True, True, False]
    tensors = {key: torch.from_numpy(both.arrays[key]) for key in ("observation", "action")}
    parts = {"old": range(1), "corrections": range(1, 2)}
    sampler = MixtureSampler(
        {"observation": tensors["observation"]}, tensors["action"], both.episode_ends, 1, 2, range(2),
        parts=parts, weights=(1, 3), learnt=learnt,
    )  # fmt: skip
    assert {name: len(windows) for name, windows in sampler.parts.items()} == {"old": 4, "corrections": 2}
    rows = sampler.rows(0, 8, seed=0)
    assert sum(int(row) in sampler.parts["corrections"] for row in rows) == 6
    corrected = sampler.batch(torch.tensor([*sampler.parts["corrections"]]))
    assert corrected.observation["observation"][:, 0, 0].tolist() == [2, 3]
    assert corrected.mask.tolist() == [[True, True], [True, False]]  # the safe action is not learnt
