"""What to do, in words: from a store, in training, in a policy and its samplers, and in deployment."""

import logging

import gymnasium
import numpy as np
import pytest
import torch
from kinds import T_O, A, T, check_kind, policy_of

from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.history import ObservationHistory
from flowpolicy.control.robot import RobotSpec
from flowpolicy.control.robots.instructed import InstructedRobot, instructed
from flowpolicy.data.sampling import ChunkSampler, as_tensors
from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.data.task_texts import with_task_table
from flowpolicy.errors import ConfigError, DataError, FlowPolicyError, TaskError
from flowpolicy.evaluation.environment import StandardEnvironment
from flowpolicy.evaluation.rollout import check_spaces
from flowpolicy.features import Text, Vector
from flowpolicy.features.text import MOST_PIECES, pieces
from flowpolicy.policy.observation_features import ObservationFeatures
from flowpolicy.serving.client import PolicyClient
from flowpolicy.serving.messages import encode
from flowpolicy.serving.service import PolicyService
from flowpolicy.texts import LONGEST_TEXT, text_bytes

KNOWN = ("push the block left", "push the block right")
TEXT = Text((MOST_PIECES,), known=KNOWN)
NOISE = torch.randn(2, T, A, generator=torch.Generator().manual_seed(0))
STATE = np.linspace(-1, 1, 2 * T_O * 3, dtype=np.float32).reshape(2, T_O, 3)


@pytest.fixture(scope="module")
def policy():
    return policy_of({"state": Vector((3,)), "task": TEXT}, {"state": STATE.reshape(-1, 3)})


def act(policy, words, state=STATE):
    return policy.act({"state": state, "task": words}, noise=NOISE[: len(state)])


def test_a_text_is_a_whole_observation(tmp_path):
    check_kind(TEXT, TEXT.array([KNOWN[number % 2] for number in range(9)]), tmp_path)


def test_one_text_for_all_rows_or_one_for_each_or_one_for_each_step(policy):
    left, right = (act(policy, words) for words in KNOWN)
    assert not torch.allclose(left, right)
    both = torch.stack([left[0], right[1]])
    of_steps = [[words] * T_O for words in KNOWN]
    as_bytes = np.stack([[text_bytes(words)] * T_O for words in KNOWN])
    for given in (list(KNOWN), np.array(KNOWN), of_steps, as_bytes, TEXT.tensor(of_steps, "cpu")):
        assert torch.equal(act(policy, given), both)


@pytest.mark.parametrize(
    "same", ["Push the block,  LEFT!", "push\tthe\x00block\x1b left", "ｐｕｓｈ the block left"]
)
def test_capitals_punctuation_and_control_characters_make_no_difference(policy, same):
    assert torch.equal(act(policy, same), act(policy, KNOWN[0]))


def test_unknown_words_are_answered_with_one_warning(policy, caplog):
    for words in ("shove it to the left", *KNOWN, "shove it to the left", "", "\N{PILE OF POO}" * 9):
        assert torch.isfinite(act(policy, words)).all()
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 3
    assert "not trained with the words 'shove it to the left'" in warned[0]
    assert KNOWN[0] in warned[0]


def test_words_that_were_never_seen_have_parts_that_were():
    numbers = {
        text: set(pieces(text, 4096, 64)) for text in (*KNOWN, "pushing that blok left", "open a drawer")
    }
    near = numbers["pushing that blok left"] & numbers[KNOWN[0]]
    assert len(near) > 5 > len(numbers["open a drawer"] & numbers[KNOWN[0]])
    swapped = pieces("red on blue", 4096, 64), pieces("blue on red", 4096, 64)
    assert set(swapped[0]) != set(swapped[1])


@pytest.mark.parametrize(("given", "told"), [
    ("x" * (LONGEST_TEXT + 1), "give a text of at most 1000 bytes"),
    (7, "given as numbers|shape"), ([None, "a"], "is None; give a text"),
    (np.full((2, T_O, MOST_PIECES), 9999), "no pieces of words"),
    (np.zeros((2, T_O, MOST_PIECES)) + 0.5, ""), ({"a": 1}, "text"),
])  # fmt: skip
def test_what_is_no_text_is_one_sentence(policy, given, told):
    if told:
        with pytest.raises(FlowPolicyError, match=f"'task' .*({told})"):
            act(policy, given)
    else:
        assert torch.isfinite(act(policy, given)).all()


@pytest.mark.parametrize("settings", [{"rows": 3}, {"rows": 2**20}, {"known": ("x" * 2000,)}])
def test_a_declaration_is_bounded(settings):
    with pytest.raises(ConfigError, match=r"observations\.task"):
        policy_of({"task": Text((MOST_PIECES,), **settings)})


def test_samplers_read_the_text(policy):
    sampler = build_sampler(policy, num_steps=2, backend="eager")
    for words in (*KNOWN, list(KNOWN)):
        expected = policy.act({"state": STATE, "task": words}, noise=NOISE, num_steps=2)
        found = sampler.act({"state": STATE, "task": words}, noise=NOISE)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_not_the_transformer_reads_it_too(policy):
    features = ObservationFeatures(policy.network, policy.spec.features, T_O)
    left, right = (policy.normalize_observations({"state": STATE, "task": words}) for words in KNOWN)
    assert features(left).shape == (2, features.size)
    assert not torch.allclose(features(left), features(right))


# Stores


def demonstrations(**attributes):
    arrays = {
        "action": np.random.default_rng(0).normal(size=(12, A)).astype(np.float32),
        "state": np.zeros((12, 3), np.float32),
        "task_index": np.repeat([1, 0, 1], 4),
    }
    return Demonstrations(
        arrays, np.array([4, 8, 12]), {"tasks": ["unused", *KNOWN][1:], **attributes}, "a.zarr"
    )


def test_a_store_keeps_texts_as_a_table(tmp_path):
    write_demonstrations(tmp_path / "a.zarr", demonstrations())
    demos = read_demonstrations(
        tmp_path / "a.zarr", ["task", "state"], kinds={"task": {"kind": "text", "rows": 99}}
    )
    feature = demos.feature("task")
    assert feature == Text((MOST_PIECES,), rows=99)
    assert feature.known == KNOWN
    tensors = as_tensors(demos, {"task": feature}, "cpu")
    action = torch.as_tensor(demos.arrays["action"])
    batch = ChunkSampler(tensors, action, demos.episode_ends, T_O, T).batch(torch.tensor([0, 4, 11]))
    expected = feature.array([[KNOWN[1]] * T_O, [KNOWN[0]] * T_O, [KNOWN[1]] * T_O])
    assert np.array_equal(batch.observation["task"], expected)


@pytest.mark.parametrize(("attributes", "index", "told"), [
    ({"tasks": None}, None, "'tasks' must list the tasks' texts"),
    ({"tasks": ["a", 3]}, None, "'tasks' must list the tasks' texts"),
    ({"tasks": ["a"]}, None, "counts tasks from 0 to 1.*lists 1"),
    ({"tasks": ["a" * 2000, "b"]}, None, "too long"),
    ({}, np.full(12, -1), "counts tasks from -1"),
    ({}, np.full(12, 0.5), "whole number a step"),
    ({"kinds": {"task": "image"}}, None, r"kinds\.task\.kind is 'image'.*choose one of .*text"),
    ({"kinds": {"task": {"kind": "text", "row": 3}}}, None, r"Unknown setting 'kinds\.task\.row'"),
])  # fmt: skip
def test_a_broken_table_is_one_sentence(attributes, index, told):
    demos = demonstrations(**attributes)
    if index is not None:
        demos.arrays["task_index"] = index
    with pytest.raises(DataError, match=f"^a.zarr.*{told}"):
        demos.feature("task")


@pytest.mark.parametrize("words", [
    np.array([KNOWN[1], KNOWN[0], KNOWN[1]]), np.array([KNOWN[1], KNOWN[0], KNOWN[1]], object),
    np.stack([text_bytes(KNOWN[1]), text_bytes(KNOWN[0]), text_bytes(KNOWN[1])]),
])  # fmt: skip
def test_words_of_each_step_become_a_table(words):
    arrays, attributes = with_task_table({"task": words, "action": np.zeros((3, 1))}, {"fps": 10})
    assert attributes == {"fps": 10, "tasks": [KNOWN[1], KNOWN[0]]}
    assert arrays.keys() == {"task_index", "action"}
    assert arrays["task_index"].tolist() == [0, 1, 0]
    one_hot = {"task": np.eye(3)}
    assert with_task_table(one_hot, {}) == (one_hot, {})


# Environments, robots, servers


class Talking(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        {"state": gymnasium.spaces.Box(-1, 1, (3,)), "task": gymnasium.spaces.Text(200)}
    )
    action_space = gymnasium.spaces.Box(-1, 1, (A,))

    def reset(self, seed=None, options=None):
        return {"state": np.zeros(3, np.float32), "task": KNOWN[1]}, {}


@pytest.mark.parametrize(("texts", "expected"), [(None, KNOWN[1]), ({"task": KNOWN[0]}, KNOWN[0])])
def test_an_environment_says_it_or_is_told(policy, texts, expected):
    env = StandardEnvironment(Talking(), texts=texts)
    check_spaces(env, policy, "Task 'talking'")
    first, _ = env.reset()
    assert env.observation_space.contains(first)
    assert np.array_equal(TEXT.array(first["task"]), TEXT.array(expected))


def test_an_environment_without_words_is_told_how_to_say_them(policy):
    env = StandardEnvironment(Talking())
    env.observation_space = gymnasium.spaces.Dict({"state": env.observation_space["state"]})
    with pytest.raises(TaskError, match=r"no observation 'task'.*instruction=TEXT"):
        check_spaces(env, policy, "Task 'mute'")


class Mute:
    spec = RobotSpec("mute", {"state": (3,)}, -np.ones(A), np.ones(A), 10.0, "hold")

    def observe(self):
        return {"state": np.zeros(3)}


def test_a_robot_is_told_and_told_otherwise_while_it_runs(policy):
    robot = instructed(Mute(), policy, KNOWN[0])
    assert isinstance(robot, InstructedRobot)
    robot.spec.check(policy)
    history = ObservationHistory(policy.spec.features, T_O, EventLog())
    history.add(robot.observe(), 0, 0.0)
    robot.instruction = KNOWN[1]
    history.add(robot.observe(), 1, 0.1)
    assert np.array_equal(history.newest()["task"], TEXT.array(KNOWN))
    with pytest.raises(ConfigError, match=r"task is .* at most"):
        robot.instruction = "x" * 2000
    assert instructed(Mute(), policy, None).spec is Mute.spec  # it knows two: none is meant


def test_the_only_task_need_not_be_said():
    policy = policy_of({"state": Vector((3,)), "task": Text((MOST_PIECES,), known=KNOWN[:1])})
    assert instructed(Mute(), policy, None).observe()["task"] == KNOWN[0]
    with pytest.raises(ConfigError, match="reads no words"):
        instructed(Mute(), policy_of({"state": Vector((3,))}), "push")


@pytest.mark.parametrize("broken", [3.5, "x" * 2000, None, [KNOWN[0]]])
def test_a_robot_that_says_nonsense_is_counted(policy, broken):
    events = EventLog()
    history = ObservationHistory(policy.spec.features, T_O, events)
    history.add({"state": np.zeros(3), "task": broken}, 0, 0.0)
    assert events.counts == {Event.OBSERVATION_INVALID: 1}


@pytest.mark.parametrize(("words", "rows"), [
    ({"prompt": KNOWN[1]}, None), ({"task": KNOWN[1]}, None), ({"observation/task": KNOWN[1]}, 2),
    ({"prompt": [KNOWN[1]] * 2}, 2), ({"prompt": [[KNOWN[1]] * T_O] * 2}, 2),
    ({"task": TEXT.array([[KNOWN[1]] * T_O] * 2)}, 2),
])  # fmt: skip
def test_a_server_takes_a_prompt(policy, words, rows):
    service = PolicyService(policy)
    state = STATE if rows else STATE[0]
    request = service.read(
        encode({"state": state, **words, "noise": NOISE.numpy() if rows else NOISE[0].numpy()})
    )
    found = service._sample(request.observations, request.noise)
    assert np.allclose(found, act(policy, KNOWN[1])[: rows or 1], atol=1e-6)


@pytest.mark.parametrize(("prompt", "told"), [
    ("x" * 2000, "at most 1000 bytes"), ([KNOWN[0], 3], "list of strings"), ([KNOWN[0]] * 3, "batch sizes"),
    (3, "no array"), ([[KNOWN[0]] * 3] * 2, "3 steps; send 2, or one"), ([], "list of strings"),
    ([[KNOWN[0]], []], "list of strings"), ([[[KNOWN[0]]]], "list of strings"),
])  # fmt: skip
def test_a_prompt_that_is_none_is_one_sentence(policy, prompt, told):
    with pytest.raises(FlowPolicyError, match=told):
        PolicyService(policy).read(encode({"state": STATE, "prompt": prompt}))


@pytest.mark.parametrize("words", [KNOWN[1], [KNOWN[1]] * 2, [[KNOWN[1]] * T_O] * 2])
def test_a_client_sends_strings(policy, served, words):
    found = served.act({"state": STATE, "task": words}, noise=NOISE)
    torch.testing.assert_close(found, act(policy, KNOWN[1]), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def served(policy):
    from served_policy import serving

    with serving(policy) as server, PolicyClient(*server.address) as client:
        yield client
