import torch

from flowpolicy.models.step_size import StepSizeEmbedding

LEVELS = 5  # M = 16


def test_powers_of_two_are_the_rows_and_what_lies_between_is_linear_in_the_logarithm():
    torch.manual_seed(0)
    embed = StepSizeEmbedding(LEVELS, 3)
    rows = embed.weight
    sizes = torch.exp2(torch.arange(LEVELS)) / 2 ** (LEVELS - 1)
    assert torch.equal(embed(sizes), rows)
    assert torch.equal(embed(torch.tensor([0.0, 0.01])), rows[[0, 0]])  # 0 stands for the finest step
    for share in (0.25, 0.5, 0.9):
        between = embed(sizes[:-1] * 2**share)
        torch.testing.assert_close(between, (1 - share) * rows[:-1] + share * rows[1:])


def test_it_is_continuous_and_can_be_differentiated():
    embed = StepSizeEmbedding(LEVELS, 3)
    d = torch.tensor([0.125 - 1e-6, 0.125 + 1e-6, 0.3], requires_grad=True)
    below, above, _ = embed(d)
    torch.testing.assert_close(below, above, rtol=0, atol=1e-4)
    embed(d).square().sum().backward()
    assert d.grad.abs().min() > 0
    assert embed.weight.grad[1:4].abs().min() > 0


def test_one_level_knows_no_step_size():
    embed = StepSizeEmbedding(1, 3)
    assert torch.equal(embed(torch.tensor([0.0, 0.3, 1.0])), embed.weight.expand(3, -1))
