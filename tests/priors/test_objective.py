"""Random tokens in the context, random orders, and smoothed targets, against what they should be on average."""

import pytest
import torch

from vqgen.codes import CodeLayout
from vqgen.priors import prior as prior_module
from vqgen.priors.objective import annealed, random_orders, uniform_loss, with_random_tokens
from vqgen.priors.prior import LINEAR_HEADS, Prior

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


def test_a_share_of_the_orders_is_random_and_each_order_as_likely():
    torch.manual_seed(0)
    orders = random_orders(0.7, torch.rand(24_000, 1 + 4))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand_as(orders))
    kinds, counts = orders.unique(dim=0, return_counts=True)
    assert len(kinds) == 24
    assert kinds[0].tolist() == [0, 1, 2, 3]
    assert abs(counts[0] / 24_000 - (0.3 + 0.7 / 24)) < 0.015  # 5 deviations
    assert ((counts[1:] / 24_000 - 0.7 / 24).abs() < 0.0055).all()
    assert torch.equal(random_orders(0.0, torch.rand(9, 1 + 4)), torch.arange(4).expand(9, 4))


def test_the_share_of_random_orders_falls_from_the_half_to_three_quarters():
    assert [annealed(0.0, share) for share in (0, 0.5, 0.625, 0.75, 1)] == [1, 1, 0.5, 0, 0]
    assert [annealed(0.4, share) for share in (0, 0.5, 0.625, 0.75, 1)] == [1, 1, 0.7, 0.4, 0.4]


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


@pytest.mark.parametrize("model_type", [*LINEAR_HEADS, "gemma2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_losses_in_blocks_are_those_of_all_logits(monkeypatch, model_type, shuffled):
    """Against the formula for all logits; gemma2 bends its logits, and so has them whole."""
    torch.manual_seed(0)
    prior = Prior(MANY, ["a", "b"], model_type, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    prior.eval()  # gpt2 has dropout
    if shuffled:
        prior.add_places(0.5)
    ranges = MANY.token_ranges()
    tokens = (ranges[:, 0] + torch.rand(7, len(ranges)) * (ranges[:, 1] - ranges[:, 0])).long()
    order = torch.rand(7, len(ranges)).argsort(dim=1) if shuffled else None
    targets = tokens if order is None else tokens.gather(1, order)
    class_ids = torch.tensor([0, 1, -1, 0, 1, 1, 0])

    logits = prior(targets, class_ids, order)
    flat = logits.flatten(0, 1)
    expected = torch.stack([torch.nn.functional.cross_entropy(flat, targets.flatten()), uniform_loss(flat)])
    expected.sum().backward()
    gradients = [p.grad.clone() for p in prior.parameters()]
    prior.zero_grad()

    sizes = []
    prior.lm.get_output_embeddings().register_forward_hook(lambda *given: sizes.append(given[2].numel()))
    whole = tokens.numel() * prior.lm.config.vocab_size
    monkeypatch.setattr(prior_module, "LOGITS_AT_ONCE", whole // 3)  # 2 sequences
    losses = prior(targets, class_ids, order, targets=targets, smoothed=True)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected)
    for p, gradient in zip(prior.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    assert sizes == ([whole] if model_type == "gemma2" else [2 * whole // 7] * 3 + [whole // 7] + sizes[4:])
