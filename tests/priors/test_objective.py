"""Random tokens in the context, and smoothed targets, against what they should be on average."""

import torch

from vqgen.codes import CodeLayout
from vqgen.priors.objective import uniform_loss, with_random_tokens

MANY = CodeLayout(((2, 2), (1, 2, 2)), (5, 7))


def test_each_sequence_has_a_share_of_random_legal_tokens_of_its_own():
    torch.manual_seed(0)
    ranges = CodeLayout(((1, 20, 20),), (1000,)).token_ranges()
    tokens, noise = torch.zeros(4000, 400, dtype=torch.int64), torch.rand(4000, 801)
    noisy = with_random_tokens(tokens, ranges, 0.5, noise)
    shares = (noisy != 0).double().mean(dim=1)  # uniform in 0 to 0.5
    assert abs(shares.mean() - 0.25) < 0.01
    assert abs(shares.std() - 0.5 / 12**0.5) < 0.01
    counts = noisy[noisy > 0].bincount(minlength=1000)[1:].double()
    assert 0.7 < (counts / counts.mean()).min() < (counts / counts.mean()).max() < 1.3  # 6 deviations
    assert torch.equal(with_random_tokens(tokens, ranges, 0.0, noise), tokens)


def test_random_tokens_are_legal_where_they_stand():
    torch.manual_seed(0)
    ranges = MANY.token_ranges()
    noise = torch.rand(5000, 1 + 2 * len(ranges))
    noise[:, -len(ranges) :][:100] = 1 - 2.0**-24  # the largest number of torch.rand
    noisy = with_random_tokens(ranges[:, 0].expand(5000, -1), ranges, 1.0, noise)
    assert (noisy >= ranges[:, 0]).all()
    assert (noisy < ranges[:, 1]).all()
    assert [len(column.unique()) for column in noisy.T] == (ranges[:, 1] - ranges[:, 0]).tolist()


def test_the_uniform_loss_is_the_mean_over_legal_tokens():
    torch.manual_seed(0)
    logits = torch.randn(6, 9, requires_grad=True)
    first = torch.nn.functional.cross_entropy(logits, torch.full((6, 9), 1 / 9))
    torch.testing.assert_close(uniform_loss(logits), first)
    illegal = torch.arange(9) >= torch.tensor([[9], [4], [4], [9], [2], [9]])
    expected = torch.stack([-row[:n].log_softmax(0).mean() for row, n in zip(logits, [9, 4, 4, 9, 2, 9], strict=True)])
    loss = uniform_loss(logits.masked_fill(illegal, -torch.inf))
    torch.testing.assert_close(loss, expected.mean())
    [gradient] = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
