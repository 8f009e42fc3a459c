"""An ensemble computed as one is its members computed alone."""

import torch
import torch.nn.functional as F

from flowpolicy.models.ensemble import Ensemble


def alone(ensemble, member, x):
    for layer in ensemble.layers:
        x = x @ layer.weight[member] + layer.bias[member]
        if layer.normalized:
            x = F.relu(F.layer_norm(x, x.shape[-1:]) * layer.gain[member] + layer.shift[member])
    return x[..., 0]


def test_members_are_independent_networks_and_any_of_them_can_be_asked():
    torch.manual_seed(0)
    ensemble = Ensemble(4, 5, (8, 6)).double()
    assert not ensemble(torch.randn(3, 5).double()).any()  # nothing is learnt yet
    for parameter in ensemble.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, 5, dtype=torch.double)
    expected = torch.stack([alone(ensemble, member, x) for member in range(4)])
    torch.testing.assert_close(ensemble(x), expected)
    chosen = torch.tensor([3, 1])
    torch.testing.assert_close(ensemble(x, chosen), expected[chosen])
    (gradient,) = torch.autograd.grad(ensemble(x)[2].sum(), ensemble.layers[0].weight)
    assert gradient[2].any()
    assert not gradient[[0, 1, 3]].any()
    ensemble.rescale(3.0)
    torch.testing.assert_close(ensemble(x), 3 * expected)
