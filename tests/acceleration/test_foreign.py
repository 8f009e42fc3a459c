import pytest
import torch
from torch import nn

from flowpolicy.acceleration.caching.foreign import CachedDecoder, calibrate_decoder
from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.errors import ConfigError, DataError

WIDTH, DEPTH, TOKENS = 16, 2, 5


def make_decoder(seed=0, norm_first=True, norm=False):
    torch.manual_seed(seed)
    layer = nn.TransformerDecoderLayer(
        WIDTH, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    decoder = nn.TransformerDecoder(layer, DEPTH, norm=nn.LayerNorm(WIDTH) if norm else None).eval()
    for parameter in decoder.parameters():  # a decoder's layers start as copies of one another
        nn.init.normal_(parameter, std=0.3)
    return decoder


def cached(decoder, evaluations=4):
    return CachedDecoder(decoder, num_evaluations=evaluations, chunk_shape=(TOKENS, 2), sampler="toy")


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, TOKENS, WIDTH, generator=generator), torch.randn(3, 4, WIDTH, generator=generator)


def schedule_of(decoder, updates):
    return Schedule(decoder.key, updates, "by hand")


@pytest.mark.parametrize("norm", [False, True])
def test_without_reuse_it_is_the_decoder_with_its_masks(norm):
    decoder = make_decoder(norm=norm)
    ours = cached(decoder)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(TOKENS),
        "memory_mask": torch.zeros(TOKENS, 4).masked_fill(torch.arange(4) == 3, float("-inf")),
        "tgt_key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3),
        "memory_key_padding_mask": torch.tensor([[True] + [False] * 3] * 3),
    }
    with torch.no_grad():
        for evaluation in range(9):  # more than two chunks
            x, memory = inputs(evaluation)
            assert torch.allclose(ours(x, memory, **masks), decoder(x, memory, **masks), atol=1e-5)
        free = ours(x, memory)
    assert (free - decoder(x, memory, **masks)).abs().max() > 1e-2  # the masks did something


def test_an_evaluation_that_reuses_everything_adds_the_residuals_of_the_last_update():
    decoder = make_decoder()
    ours = cached(decoder)
    ours.schedule = schedule_of(ours, ((0, 2),) * (3 * DEPTH))
    given = [inputs(seed) for seed in range(4)]
    with torch.no_grad():
        outputs = [ours(*pair) for pair in given]
        fresh = [decoder(*pair) for pair in given]
    for update, reuse in ((0, 1), (2, 3)):
        assert torch.allclose(outputs[update], fresh[update], atol=1e-5)
        residual = fresh[update] - given[update][0]
        assert torch.allclose(outputs[reuse], given[reuse][0] + residual, atol=1e-5)


def test_a_reused_first_block_leaves_the_later_ones_fresh():
    decoder = make_decoder()
    ours = cached(decoder, 2)
    ours.schedule = schedule_of(ours, ((0,), *((0, 1),) * (3 * DEPTH - 1)))
    (x, memory), (y, other) = inputs(0), inputs(1)
    layer = decoder.layers[0]
    with torch.no_grad():
        ours(x, memory)
        found = ours(y, other)
        h = y + layer._sa_block(layer.norm1(x), None, None)  # stale: computed from x
        h = h + layer._mha_block(layer.norm2(h), other, None, None)
        h = h + layer._ff_block(layer.norm3(h))
        assert torch.allclose(found, decoder.layers[1](h, other), atol=1e-5)


class Toy(nn.Module):
    """Ten evaluations of a decoder that drift slowly."""

    def __init__(self, calls=10):
        super().__init__()
        self.decoder, self.calls = cached(make_decoder(), 10), calls

    @torch.no_grad()
    def sample(self, observations, seed):
        memory = observations.view(len(observations), 1, WIDTH)
        x = torch.randn(len(observations), TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        for _ in range(self.calls):
            x = x + 0.1 * torch.tanh(self.decoder(x, memory))
        return x


def observations(count=64):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def test_calibration_makes_schedules_that_the_models_own_sampler_follows():
    toy, given = Toy(), observations()
    schedules = calibrate_decoder(toy.decoder, toy.sample, given, updates=4, bubbles=6, noise_seeds=1)
    full = toy.sample(given, 9)
    errors = {}
    for method, schedule in schedules.items():
        assert all(len(steps) >= 4 for steps in schedule.updates)
        toy.decoder.schedule = schedule
        errors[method] = float((toy.sample(given, 9) - full).square().mean().sqrt())
    one = schedule_of(toy.decoder, ((0,),) * (3 * DEPTH))
    toy.decoder.schedule = one
    never = float((toy.sample(given, 9) - full).square().mean().sqrt())
    assert 0 < errors["acs"] < 0.5 * never
    assert schedules["acs+bua"].share > schedules["acs"].share == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("broken", "error", "words"),
    [
        (lambda: cached(make_decoder(norm_first=False)), ConfigError, "norm_first=True"),
        (lambda: cached(nn.Linear(2, 2)), ConfigError, "nn.TransformerDecoder"),
        (lambda: cached(make_decoder(), 1), ConfigError, "num_evaluations is 1"),
        (lambda: calibrate_decoder(Toy().decoder, Toy().sample, observations(8)), DataError, "at least 64"),
        (
            lambda: calibrate_decoder(Toy().decoder, Toy().sample, observations() * float("nan")),
            DataError,
            "NaN",
        ),
    ],
)
def test_a_mistake_is_one_sentence(broken, error, words):
    with pytest.raises(error, match=words):
        broken()


@pytest.mark.parametrize("calls", [7, 20])
def test_a_sampler_with_another_number_of_calls_is_refused_and_changes_nothing(calls):
    toy = Toy(calls=calls)
    with pytest.raises(ConfigError, match=f"took {calls} evaluations of the network, not 10"):
        calibrate_decoder(toy.decoder, toy.sample, observations())
    assert toy.decoder.observe is None
    assert toy.decoder.schedule.method == "full"


def test_a_schedule_of_another_decoder_is_refused():
    one, other = cached(make_decoder(0)), cached(make_decoder(1))
    with pytest.raises(ConfigError, match="another checkpoint"):
        other.schedule = one.schedule
    with pytest.raises(ConfigError, match="another number of steps"):
        cached(make_decoder(0), 5).schedule = one.schedule
