import numpy as np
import pytest
import torch

from flowpolicy.data.mixture import combined, datasets, present
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.weighting import MixtureSampler, apportioned
from flowpolicy.errors import DataError
from flowpolicy.features import Image, Presence, Vector


def part(name, steps, *, image=None, **columns):
    """One episode a step and a half, its state numbered from 0."""
    arrays = {"action": np.full((steps, 2), float(len(name)), np.float32), "reward": np.ones(steps)}
    arrays |= {key: np.asarray(value, np.float32) for key, value in columns.items()}
    arrays["state"] = np.arange(steps, dtype=np.float32)[:, None]
    if image is not None:
        arrays["camera"] = np.full((steps, *image, 3), 100, np.uint8)
    ends = np.array([steps // 3, steps])
    return Demonstrations(arrays, ends, {"masks": {"valid": [1]}}, f"{name}.zarr.zip")


def test_stores_become_one_with_what_is_missing_at_rest_and_marked():
    small, large = part("small", 6, image=(40, 48)), part("large", 9, image=(80, 96))
    blind = part("blind", 3, force=np.ones((3, 2)))
    demos = combined([small, large, blind], ["camera", "state", "force"])
    assert demos.arrays["camera"].shape == (18, 40, 48, 3)
    assert (demos.arrays["camera"][:15] == 100).all()
    assert not demos.arrays["camera"][15:].any()
    assert demos.arrays["camera.present"].tolist() == [1] * 15 + [0] * 3
    assert demos.arrays["force.present"].tolist() == [0] * 15 + [1] * 3
    assert demos.feature("camera.present") == Presence((), of="camera")
    assert demos.feature("camera") == Image((40, 48, 3))
    assert demos.feature("state") == Vector((1,))
    assert present(demos, "force").sum() == 3
    assert present(demos, "state") == slice(None)
    assert demos.arrays["state"][:, 0].tolist() == [*range(6), *range(9), *range(3)]
    assert demos.episode_ends.tolist() == [2, 6, 9, 15, 16, 18]
    assert datasets(demos) == {"small": range(2), "large": range(2, 4), "blind": range(4, 6)}
    assert demos.masks == {"valid": [1, 3, 5]}
    assert demos.episode_returns.tolist() == [2, 4, 3, 6, 1, 2]


def test_images_are_resized_as_asked_and_lie_on_disk_where_memory_is_short():
    demos = combined([part("a", 6, image=(40, 40)), part("b", 3, image=(64, 40))], ["camera"], (32, 36), 100)
    assert isinstance(demos.arrays["camera"], np.memmap)
    assert demos.arrays["camera"].shape == (9, 32, 36, 3)
    assert (demos.arrays["camera"] == 100).all()


def test_stores_that_do_not_fit_together_are_refused():
    with pytest.raises(DataError, match=r"'force' is a vector of shape \(2,\) in a\.zarr\.zip and .* \(3,\)"):
        combined([part("a", 3, force=np.ones((3, 2))), part("b", 3, force=np.ones((3, 3)))], ["force"])
    other = part("b", 3)
    other.arrays["action"] = np.ones((3, 4), np.float32)
    with pytest.raises(DataError, match="differ in size"):
        combined([part("a", 3), other], ["state"])


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.01, 0.3, 0.69), (1 / 3, 1 / 3, 1 / 3), (0.2, 0.2, 0.6)])
def test_shares_are_kept_at_every_total_and_counts_never_fall(shares):
    before = [0] * len(shares)
    for total in range(1, 300):
        counts = apportioned(shares, total)
        assert sum(counts) == total
        assert all(0 <= new - old <= 1 for new, old in zip(counts, before, strict=True))
        assert all(abs(count - share * total) <= 1 for count, share in zip(counts, shares, strict=True))
        before = counts


def sampler(weights, lengths=((4, 6), (3,), (30, 20))):
    flat = [length for part in lengths for length in part]
    first = np.cumsum([0, *map(len, lengths)])
    parts = {name: range(first[i], first[i + 1]) for i, name in enumerate("abc")}
    steps = torch.arange(float(sum(flat)))[:, None]
    ends = np.cumsum(flat)
    return MixtureSampler({"s": steps}, steps, ends, 1, 2, range(len(flat)), parts=parts, weights=weights)


def test_each_data_set_has_its_share_and_goes_through_its_own_epochs():
    mixed = sampler([2.0, 1.0, 1.0])
    assert mixed.parts == {"a": range(10), "b": range(10, 13), "c": range(13, 63)}
    assert mixed.shares == {"a": 0.5, "b": 0.25, "c": 0.25}
    rows = [mixed.rows(step, 16, seed=3) for step in range(25)]
    for row in rows:
        counts = [int(((row >= part.start) & (row < part.stop)).sum()) for part in mixed.parts.values()]
        assert counts == [8, 4, 4]
    drawn = torch.cat(rows)
    for part in mixed.parts.values():
        own = drawn[(drawn >= part.start) & (drawn < part.stop)]
        counts = torch.bincount(own - part.start, minlength=len(part))
        assert counts.max() - counts.min() <= 1  # whole epochs, and a part of one
    assert not torch.equal(rows[0].sort().values, rows[0])  # data sets are mixed within a batch


def test_batches_are_a_pure_function_of_seed_and_step():
    first, again = sampler([1.0, 5.0, 2.0]), sampler([1.0, 5.0, 2.0])
    wanted = [first.rows(step, 7, seed=1) for step in range(12)]
    for step in (11, 0, 5, 5, 3):
        assert torch.equal(again.rows(step, 7, seed=1), wanted[step])
    assert not torch.equal(again.rows(0, 7, seed=2), wanted[0])


def test_without_weights_all_windows_are_one_epoch():
    mixed = sampler(None)
    drawn = torch.cat([mixed.rows(step, 9, seed=0) for step in range(7)])
    assert drawn.sort().values.tolist() == list(range(63))
    assert mixed.shares["c"] == pytest.approx(50 / 63)


def test_the_tasks_of_stores_become_one_table():
    first, second, silent = part("a", 3), part("b", 6), part("c", 3)
    first.attributes["tasks"], first.arrays["task_index"] = ["lift", "push"], np.array([1, 0, 1])
    second.attributes["tasks"], second.arrays["task_index"] = ["open", "lift"], np.array([0, 1] * 3)
    pair = combined([first, second], ["state"])
    assert pair.attributes["tasks"] == ["lift", "push", "open"]
    assert pair.arrays["task_index"].tolist() == [1, 0, 1] + [2, 0] * 3
    for each in (first, second, silent):
        each.arrays["state"] = np.zeros((each.num_steps, 1), np.float32)
    second.arrays["task_index"] = np.array([0, 1] * 3)
    assert "tasks" not in combined([second, silent], ["state"]).attributes


def told(part, tasks, kind=None):
    """The same store, its steps told in words."""
    index = np.arange(part.num_steps) % len(tasks)
    attributes = {"tasks": tasks} | ({"kinds": {"task": kind}} if kind else {})
    return Demonstrations({**part.arrays, "task_index": index}, part.episode_ends, attributes, part.source)


@pytest.mark.parametrize("words_first", [True, False])
def test_the_words_keep_their_kind_whichever_store_has_them(words_first):
    stores = [told(part("told", 6), ["lift"], "frozen_text"), part("silent", 6)]
    demos = combined(stores if words_first else stores[::-1], ["state", "task"])
    assert demos.attributes["kinds"]["task"] == "frozen_text"
    with pytest.raises(DataError, match=r"declared as frozen_text in told.* and as text in other"):
        combined(
            [told(part("told", 6), ["lift"], "frozen_text"), told(part("other", 6), ["lift"], "text")],
            ["task"],
        )


def test_numbers_of_steps_may_be_columns_and_must_be_tasks():
    column = told(part("column", 6), ["a", "b"])
    column.arrays |= {key: column.arrays[key][:, None] for key in ("task_index", "reward")}
    demos = combined([column, told(part("row", 6), ["b"])], ["task"])
    assert demos.attributes["tasks"] == ["a", "b"]
    assert demos.arrays["task_index"].tolist() == [0, 1] * 3 + [1] * 6
    assert demos.arrays["reward"].shape == (12,)
    wrong = told(part("wrong", 6), ["a"])
    wrong.arrays["task_index"] = np.full(6, 3)
    with pytest.raises(DataError, match="counts tasks from 3 to 3"):
        combined([column, wrong], ["task"])


def test_an_attribute_makes_no_mixture():
    one = part("one", 6)
    one.attributes["datasets"] = {"a": {"episodes": [0, 9]}, "b": []}
    assert datasets(one) == {}
