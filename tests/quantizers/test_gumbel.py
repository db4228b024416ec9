"""Gumbel-softmax against torch's own and against the formula of its loss."""

import torch
import torch.nn.functional as F
from helpers import random, seeded

from vqgen.quantizers import build_quantizer
from vqgen.quantizers.gumbel import GumbelQuantizer


def test_it_is_the_straight_through_gumbel_softmax_with_the_divergence_from_equal_probabilities():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(16, 4, temperature=0.7, kl_weight=0.1).train()
    z, w = random(5, 4, 3).requires_grad_(), random(5, 4, 3, seed=2)
    q = seeded(quantizer, z)
    weight, bias, codebook, z_2 = (
        value.detach().clone().requires_grad_()
        for value in (quantizer.projection.weight, quantizer.projection.bias, quantizer.codebook, z)
    )
    logits = z_2.movedim(1, -1) @ weight.T + bias  # (B, N, K)
    torch.manual_seed(0)
    one_hot = F.gumbel_softmax(logits, tau=0.7, hard=True)
    z_q = (one_hot @ codebook).movedim(-1, 1)
    p = torch.softmax(logits, dim=-1)
    loss = 0.1 * (p * torch.log(p / (1 / 16))).sum(dim=-1).mean()

    assert torch.equal(q.codes[:, 0], one_hot.argmax(dim=-1))
    torch.testing.assert_close(q.z_q, z_q)
    torch.testing.assert_close(q.loss, loss)
    ((q.z_q * w).sum() + q.loss).backward()
    ((z_q * w).sum() + loss).backward()
    for ours, theirs in (
        (z, z_2),
        (quantizer.projection.weight, weight),
        (quantizer.projection.bias, bias),
        (quantizer.codebook, codebook),
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_training_draws_by_the_probabilities_and_evaluation_takes_the_likeliest():
    quantizer = GumbelQuantizer(4, 2)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.nn.init.zeros_(quantizer.projection.weight)
    quantizer.projection.bias.data = p.log()
    drawn = seeded(quantizer.train(), random(1, 2, 20000)).codes.flatten()
    torch.testing.assert_close(drawn.bincount() / 20000, p, atol=0.015, rtol=0)  # four standard deviations
    assert (quantizer.eval()(random(1, 2, 100)).codes == 3).all()


def test_equal_probabilities_cost_nothing_and_certain_ones_the_codebooks_entropy():
    quantizer = build_quantizer(name="gumbel", codebook_size=8, code_dim=2, kl_weight=1.0).eval()
    torch.nn.init.zeros_(quantizer.projection.weight)
    for bias, loss in ((torch.zeros(8), 0.0), (torch.tensor([1e4] + [0.0] * 7), torch.log(torch.tensor(8.0)).item())):
        quantizer.projection.bias.data = bias
        torch.testing.assert_close(quantizer(random(2, 2, 5)).loss, torch.tensor(loss), atol=1e-6, rtol=1e-5)
