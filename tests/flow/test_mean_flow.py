import torch

from flowpolicy.data.sampling import Batch
from flowpolicy.flow import Draws, MeanFlow


class Linear:
    """u = a x + b t + c d: its derivatives are known."""

    def encode(self, observation):
        return None

    def velocity(self, x, t, d, context):
        t, d = (value.view(-1, 1, 1) for value in (t, d))
        return 2.0 * x + 3.0 * t + 5.0 * d


def test_the_target_is_the_identity_of_the_mean_velocity_by_hand():
    noise, action = torch.randn(2, 3, 2, 1, generator=torch.Generator().manual_seed(0))
    t, d = torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.0, 0.3, 0.5])
    batch = Batch({}, action, torch.ones(3, 2, dtype=torch.bool))
    _, metrics = MeanFlow().loss(Linear(), batch, Draws(noise, t, d))
    v, wide_t, wide_d = action - noise, t.view(-1, 1, 1), d.view(-1, 1, 1)
    u = Linear().velocity(noise + wide_t * v, t, d, None)
    target = v + wide_d * (2 * v + 3 - 5)
    torch.testing.assert_close(metrics["loss/mean_flow"], (u - target).square().mean())


def test_steps_lie_within_the_path_and_a_share_of_them_has_no_length():
    draws = MeanFlow(instantaneous=0.25).draw((4000, 1, 1), torch.Generator().manual_seed(0), "cpu")
    assert float((draws.t + draws.d).max()) <= 1
    assert float((draws.d == 0).float().mean()) - 0.25 < 0.03
