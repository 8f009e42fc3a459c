import dataclasses

import pytest
import torch

from flowpolicy.errors import ConfigError
from flowpolicy.features import features_of
from flowpolicy.models.blocks import Dropout, Modulation, attend, bernoulli_positions
from flowpolicy.models.config import TransformerConfig
from flowpolicy.models.transformer import VelocityTransformer
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.spec import PolicySpec

B, T, A, T_O = 5, 4, 3, 2
TINY = TransformerConfig(width=16, depth=2, num_heads=2, tokens_per_step=2)


def spec_of(shapes, obs_horizon=T_O, action_horizon=T, action_dim=A):
    return PolicySpec(features_of(shapes), obs_horizon, action_horizon, 1, action_dim)


GROUPED = dataclasses.replace(TINY, actions_per_token=3)  # the second token has one action, and two of zeros


def make(config=TINY, *, trained=True, num_levels=6):
    """With ``trained`` every parameter is random, so that no zero hides a path."""
    torch.manual_seed(0)
    network = VelocityTransformer(config, spec_of({"pose": (4,), "goal": (2,)}), num_levels)
    if trained:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def inputs(count=B, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    observation = {"goal": randn(count, T_O, 2), "pose": randn(count, T_O, 4)}
    d = torch.exp2(torch.randint(0, 6, (count,), generator=generator)) / 32
    return randn(count, T, A), torch.rand(count, generator=generator), d, observation


def test_the_untrained_network_is_zero_and_every_block_the_identity():
    network = make(trained=False)
    x, t, d, observation = inputs()
    context = network.encode(observation)
    assert not network.velocity(x, t, d, context).any()
    per_block, _ = network.modulations(t, d)
    stream = torch.randn(B, T, TINY.width)
    for block, modulation in zip(network.blocks(), Modulation.of_blocks(per_block, 3), strict=True):
        assert not block.module(stream, modulation, context[block.layer]).any()


def test_blocks_are_addressed_in_the_order_of_computation():
    network = make()
    blocks = list(network.blocks())
    kinds = ["SA", "CA", "FFN"]
    assert [(b.layer, b.kind) for b in blocks] == [(n, kind) for n in range(2) for kind in kinds]
    order = []
    for index, block in enumerate(blocks):
        block.module.register_forward_hook(lambda *_, index=index: order.append(index))
    x, t, d, observation = inputs()
    network.velocity(x, t, d, network.encode(observation))
    assert order == list(range(6))


def test_the_residual_stream_is_the_sum_of_the_blocks():
    """Adding up gated outputs from outside, as a cache does, gives the network's own velocity."""
    network = make()
    x, t, d, observation = inputs()
    context = network.encode(observation)
    per_block, last = network.modulations(t, d)
    stream = network.embed_action(x) + network.position
    for block, modulation in zip(network.blocks(), Modulation.of_blocks(per_block, 3), strict=True):
        stream = stream + block.module(stream, modulation, context[block.layer])
    normed = torch.nn.functional.layer_norm(stream, (TINY.width,))
    velocity = network.output(last[:, 0:1] + normed * (1 + last[:, 1:2]))
    assert torch.allclose(velocity, network.velocity(x, t, d, context), atol=1e-6)


def test_the_three_parts_make_up_the_whole():
    network = make()
    x, t, d, observation = inputs()
    context = network.encode(observation)
    whole = network.velocity(x, t, d, context)
    assert whole.shape == (B, T, A)
    assert whole.abs().min() > 0
    assert torch.equal(network.modulated(x, network.modulations(t, d), context), whole)
    again = network.modulated(x, network.modulations(t, d), context)  # the context is not used up
    assert torch.equal(again, whole)
    per_block, last = network.modulations(t, d)
    assert per_block.shape == (B, 6, 3, TINY.width)
    assert last.shape == (B, 2, TINY.width)
    assert context[0].key.shape == context[0].value.shape == (B, 2, T_O * 2, TINY.width // 2)


def test_modulations_of_one_time_serve_the_whole_batch():
    network = make()
    x, _, _, observation = inputs()
    context = network.encode(observation)
    one = network.velocity(x, torch.tensor([0.25]), torch.tensor([0.25]), context)
    each = network.velocity(x, torch.full((B,), 0.25), torch.full((B,), 0.25), context)
    assert torch.allclose(one, each, atol=1e-6)


@pytest.mark.parametrize("config", [TINY, GROUPED])
def test_many_times_of_one_batch_are_computed_with_one_context(config):
    network = make(config)
    x, _, _, observation = inputs()
    context = network.encode(observation)
    times, sizes = torch.tensor([0.0, 0.25, 0.75]), torch.tensor([0.0, 0.25, 1.0])
    chunks = torch.stack([x, x + 1, 2 * x])
    together = network.velocities(chunks, times, sizes, context)
    for chunk, t, d, found in zip(chunks, times, sizes, together, strict=True):
        assert torch.allclose(found, network.velocity(chunk, t[None], d[None], context), atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_rows_do_not_see_each_other():
    network = make()
    x, t, d, observation = inputs()
    whole = network.velocity(x, t, d, network.encode(observation))
    for row in range(B):
        cut = slice(row, row + 1)
        alone = {key: value[cut] for key, value in observation.items()}
        single = network.velocity(x[cut], t[cut], d[cut], network.encode(alone))
        assert torch.allclose(single, whole[cut], atol=1e-5)


@pytest.mark.parametrize("per_token", [3, 4, 99])
def test_consecutive_actions_share_a_token(per_token):
    """And those that fill the last token up are neither seen nor learnt."""
    network = make(dataclasses.replace(TINY, actions_per_token=per_token))
    size, count = (3, 2) if per_token == 3 else (T, 1)
    x, t, d, observation = inputs()
    filled = torch.zeros(B, size * count, A)
    filled[:, :T] = x
    tokens = [filled[:, size * n : size * (n + 1)].flatten(1) for n in range(count)]
    wanted = torch.stack([network.embed_action(token) for token in tokens], 1) + network.position
    assert torch.equal(network.embed(x), wanted)
    network.velocity(x, t, d, network.encode(observation))[:, 3:].sum().backward()  # the last action
    learnt = network.output.bias.grad.view(size, A).any(-1)
    assert learnt.tolist() == [n == 3 % size for n in range(size)]


def test_a_token_alone_mixes_as_beside_its_copy():
    attention = next(block.module for block in make().blocks() if block.kind == "SA")
    token = torch.randn(B, 1, TINY.width)
    both = attention.transform(token.expand(-1, 2, -1), None)
    torch.testing.assert_close(attention.transform(token, None).expand(-1, 2, -1), both)


@pytest.mark.parametrize("what", ["x", "t", "d", "pose", "goal", "oldest"])
def test_every_input_matters(what):
    network = make()
    x, t, d, observation = inputs()
    before = network.velocity(x, t, d, network.encode(observation))
    changed = {key: value.clone() for key, value in observation.items()}
    if what == "oldest":
        changed["pose"][:, 0] += 1
    elif what in changed:
        changed[what] += 1
    x = x + (what == "x")
    t = t + 0.1 * (what == "t")
    d = torch.where(d < 1, 2 * d, d / 2) if what == "d" else d
    after = network.velocity(x, t, d, network.encode(changed))
    assert ((after - before).abs().amax((1, 2)) > 1e-4).all()


def test_tokens_and_observation_steps_have_positions():
    network = make()
    x, t, d, observation = inputs()
    x = x[:, :1].expand(-1, T, -1)
    velocity = network.velocity(x, t, d, network.encode(observation))
    assert (velocity[:, 0] - velocity[:, 1]).abs().max() > 1e-4  # equal tokens, different places
    swapped = {key: value.flip(1) for key, value in observation.items()}
    assert (network.velocity(x, t, d, network.encode(swapped)) - velocity).abs().max() > 1e-4


@pytest.mark.parametrize("config", [TINY, GROUPED])
def test_gradients_reach_every_parameter_once_the_gates_have_opened(config):
    """adaLN-zero opens from the output backwards: output layer, then gates, then what is behind them."""
    network = make(config, trained=False, num_levels=2).train()
    x, t, _, observation = inputs(32)
    d, target = torch.arange(32) % 2, torch.randn(32, T, A)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        ((network.velocity(x, t, d, network.encode(observation)) - target) ** 2).mean().backward()
        optimizer.step()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_dropout_acts_in_training_only():
    config = TransformerConfig(width=16, depth=2, num_heads=2, dropout=0.5)
    network = make(config)
    x, t, d, observation = inputs()
    context = network.encode(observation)
    assert torch.equal(network.velocity(x, t, d, context), network.velocity(x, t, d, context))
    network.train()
    assert not torch.equal(network.velocity(x, t, d, context), network.velocity(x, t, d, context))


@pytest.mark.parametrize("probability", [0.01, 0.1])
def test_dropped_positions_are_independent_bernoulli_trials(probability):
    torch.manual_seed(0)
    count, repeats = 997, 4000
    hits = torch.zeros(repeats, count)
    for row in hits:
        positions = bernoulli_positions(probability, count)
        assert positions.unique().equal(positions)
        row[positions] = 1.0
    variance = probability * (1 - probability)
    standard_error = (variance / hits.numel()) ** 0.5
    assert abs(hits.mean() - probability) < 4 * standard_error
    assert (hits.mean(0) - probability).abs().max() < 5 * (variance / repeats) ** 0.5  # every position alike
    # The number of successes varies as a binomial's does; neighbours are uncorrelated.
    assert abs(hits.sum(1).var() / (count * variance) - 1) < 4 * (2 / repeats) ** 0.5
    pairs = (hits[:, 1:] * hits[:, :-1]).mean()
    assert abs(pairs - probability**2) < 5 * probability / (repeats * count) ** 0.5


def test_dropout_keeps_the_mean_and_its_gradient_is_its_own_mask():
    torch.manual_seed(0)
    dropout, x = Dropout(0.1).train(), torch.ones(64, 50, 30, requires_grad=True)
    y = dropout(x)
    assert y.detach().unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert abs(y.mean().item() - 1) < 0.01
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_attention_under_autocast_agrees_with_the_fused_kernel():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 4, 5, 16).unbind(0)
    expected = attend(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(attend(query, key, value).float(), expected, atol=0.03)


def test_initial_weights_repeat_with_the_seed():
    first, second = make(trained=False).state_dict(), make(trained=False).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_small_size_has_at_most_half_a_million_parameters(repo_root):
    omegaconf = pytest.importorskip("omegaconf").OmegaConf
    sizes = {
        name: TransformerConfig(
            **omegaconf.to_container(omegaconf.load(repo_root / f"configs/model/{name}.yaml"), resolve=True)
        )
        for name in ("small", "medium", "large")
    }
    counts = {
        name: sum(
            p.numel()
            for p in VelocityTransformer(s, spec_of({"observation": (11,)}, 1, 4, 3), 6).parameters()
        )
        for name, s in sizes.items()
    }
    assert counts["small"] <= 500_000
    assert counts["small"] < counts["medium"] < counts["large"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"width": 90}, "model.width"),
        ({"depth": 0}, "model.depth"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"num_heads": 0}, "model.num_heads"),
        ({"actions_per_token": 0}, "model.actions_per_token"),
    ],
)
def test_impossible_sizes_are_refused(settings, word):
    with pytest.raises(ConfigError, match=word):
        TransformerConfig(**settings)


@pytest.mark.parametrize("shape", [(96, 96), (96, 96, 7), (2, 96, 96, 3)])
def test_what_is_neither_vector_nor_image_is_refused(shape):
    with pytest.raises(ConfigError, match="camera"):
        PolicyConfig({"name": "flow_matching"}, TINY, {"camera": shape}, 2, 1, 4, 1)
