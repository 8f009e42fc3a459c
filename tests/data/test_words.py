"""A column of text becomes a store's tasks: their list, and the number of one for each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flowpolicy.data.importers import import_demonstrations, import_to_store
from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import DataError

h5py = pytest.importorskip("h5py")
pytest.importorskip("zarr")
LENGTHS, SAID = (6, 11, 4), ("lift it — gently", "push", "lift it — gently")
PLACES = {
    "robomimic": ("sample.hdf5", "data/demo_{}/obs/language", 0),
    "minari": ("sample/data/main_data.hdf5", "episode_{}/infos/language", 1),
    "maniskill": ("sample_trajectory.h5", "traj_{}/env_states/language", 1),
    "aloha": ("sample_aloha/episode_{}.hdf5", "language", 0),
}


def say(source: Path, format: str, name: str = "language", length: int | None = None) -> None:
    """Add the words of each episode, as long texts or as ones of ``length`` bytes."""
    file, place, extra = PLACES[format]
    for number, (steps, words) in enumerate(zip(LENGTHS, SAID, strict=True)):
        with h5py.File(source.parent / file.format(number), "a") as opened:
            kind = h5py.string_dtype(length=length)
            at = place.format(number).replace("language", name)
            opened.create_dataset(at, data=[words.encode()] * (steps + extra), dtype=kind)


@pytest.mark.parametrize(
    ("format", "length"), [("robomimic", None), ("minari", 40), ("maniskill", None), ("aloha", 40)]
)
def test_a_text_is_taken_as_the_task(format: str, length: int | None, write_sample: Callable[..., Path]):
    path = write_sample(format)
    say(path, format, length=length)
    demos = import_demonstrations(path, rename={"language": "task"}, keys=["task"], every=2)
    assert demos.attributes["tasks"] == ["lift it — gently", "push"]
    assert demos.arrays["task_index"].tolist() == [0] * 3 + [1] * 6 + [0] * 2
    assert demos.feature("task").name == "text"


def test_one_that_is_called_task_is_one(write_sample: Callable[..., Path], tmp_path: Path, caplog):
    path = write_sample("robomimic")
    say(path, "robomimic", "task")
    say(path, "robomimic", "note")
    demos = read_demonstrations(import_to_store(path, tmp_path / "a.zarr"))
    assert demos.attributes["tasks"] == ["lift it — gently", "push"]
    assert demos.arrays["task_index"].tolist() == [0] * 6 + [1] * 11 + [0] * 4
    assert "(rename={NAME: task}); left out: obs/note" in caplog.text
    with pytest.raises(DataError, match=r"'obs/task' holds text; .* rename=\{obs/task: task\}"):
        import_demonstrations(path, rename={"task": "words"}, keys=["words"])


def test_texts_without_end_are_refused(write_sample: Callable[..., Path]):
    path = write_sample("robomimic")
    say(path, "robomimic")
    with h5py.File(path, "a") as file:
        texts = file["data/demo_1/obs/language"]
        texts[7] = b"a" * 2000
    with pytest.raises(DataError, match=r"language' has a text beyond 1000 bytes"):
        import_demonstrations(path, rename={"language": "task"}, keys=["task"])
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/language"]
        file["data/demo_1/obs/language"] = np.zeros(11)
    with pytest.raises(DataError, match=r"language' holds float64, not text"):
        import_demonstrations(path, rename={"language": "task"}, keys=["task"])
