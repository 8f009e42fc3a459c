import dataclasses

import pytest
import torch
from toy_training import toy_demonstrations, toy_trainer

from flowpolicy import CheckpointError, ConfigError
from flowpolicy.data.sampling import ChunkSampler
from flowpolicy.distillation.pairs import BLOCK, PairSampler, PairsConfig, make_pairs, read_pairs
from flowpolicy.pretraining.stores import normalized

CONFIG = PairsConfig(count=100, num_steps=2)


@pytest.fixture(scope="module")
def teacher():
    trainer = toy_trainer("flow_matching", steps=2)
    return trainer.run()


@pytest.fixture(scope="module")
def given(teacher):
    demos = toy_demonstrations()
    observation, action, _ = normalized(teacher, demos, None)
    return observation, action, demos.episode_ends, teacher.spec.obs_horizon


def made(teacher, given, folder, config=CONFIG):
    make_pairs(teacher, ChunkSampler(*given, 1), "toy", config, folder)
    return read_pairs(teacher, len(given[1]), config, folder)


def test_a_chunk_is_what_the_teacher_makes_of_the_noise_where_it_looks(tmp_path, teacher, given):
    pairs = made(teacher, given, tmp_path)
    demos = toy_demonstrations()
    observation = torch.from_numpy(demos.arrays["observation"])[pairs.step][:, None]
    chunk = teacher.act({"observation": observation}, num_steps=2, noise=pairs.noise)
    torch.testing.assert_close(teacher.encode(chunk, {}), pairs.chunk, rtol=1e-4, atol=1e-5)
    sampler = PairSampler(*given, pairs, range(5))
    batch = sampler.batch(torch.arange(len(sampler)))
    kept = pairs.step < 5 * 20
    assert 0 < len(sampler) == int(kept.sum()) < 100
    assert torch.equal(batch.noise, pairs.noise[kept])
    assert torch.equal(batch.action, pairs.chunk[kept])
    assert torch.equal(batch.observation["observation"][:, 0], given[0]["observation"][pairs.step[kept]])


def test_blocks_that_are_missing_are_made_and_the_others_left(tmp_path, teacher, given):
    whole = made(teacher, given, tmp_path / "a", dataclasses.replace(CONFIG, count=BLOCK + 1))
    assert len(whole.step) == BLOCK + 1
    first, second = (tmp_path / "a" / f"{number:05d}.safetensors" for number in range(2))
    untouched = first.stat().st_mtime_ns
    content = second.read_bytes()
    second.unlink()  # as where the program was killed
    made(teacher, given, tmp_path / "a", dataclasses.replace(CONFIG, count=2 * BLOCK))
    assert second.read_bytes() == content
    assert first.stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    ("change", "words"), [({"seed": 1}, "pairs of seed 0 and not 1"), ({"num_steps": 4}, "sampling")]
)
def test_pairs_of_another_kind_are_refused(tmp_path, teacher, given, change, words):
    made(teacher, given, tmp_path)
    with pytest.raises(ConfigError, match=words):
        made(teacher, given, tmp_path, dataclasses.replace(CONFIG, **change))


def test_damaged_pairs_are_one_sentence(tmp_path, teacher, given):
    made(teacher, given, tmp_path)
    with pytest.raises(CheckpointError, match="'step' is damaged; remove the file"):
        read_pairs(teacher, 7, CONFIG, tmp_path)  # steps beyond the demonstrations
    (tmp_path / "00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        read_pairs(teacher, len(given[1]), CONFIG, tmp_path)
