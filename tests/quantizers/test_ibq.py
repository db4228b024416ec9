"""Index backpropagation against the formula with the one-hot index."""

import torch
import torch.nn.functional as F
from helpers import random

from vqgen.quantizers import IBQ


def test_ibq_is_the_nearest_code_with_the_gradient_of_all_of_them():
    torch.manual_seed(0)
    quantizer = IBQ(16, 4, commitment_weight=0.25, temperature=0.7, entropy_weight=0.0)
    z, w = random(5, 4, 3).requires_grad_(), random(5, 4, 3, seed=2)
    q = quantizer(z)
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    z_2 = z.detach().clone().requires_grad_()

    vectors = z_2.movedim(1, -1)
    logits = -((vectors[..., None, :] - codebook) ** 2).sum(dim=-1) / 0.7
    p = torch.softmax(logits, dim=-1)
    one_hot = F.one_hot(logits.argmax(dim=-1), 16) + p - p.detach()  # the paper's index
    z_q = (one_hot @ codebook).movedim(-1, 1)
    loss = F.mse_loss(z_q, z_2.detach()) + 0.25 * F.mse_loss(z_2, z_q.detach())

    assert torch.equal(q.codes[:, 0], logits.argmax(dim=-1))
    torch.testing.assert_close(q.z_q, z_q)
    torch.testing.assert_close(q.loss, loss)
    ((q.z_q * w).sum() + q.loss).backward()
    ((z_q * w).sum() + loss).backward()
    torch.testing.assert_close(z.grad, z_2.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(quantizer.codebook.grad, codebook.grad, atol=1e-5, rtol=1e-4)
    assert (quantizer.codebook.grad.abs().sum(dim=1) > 0).all()  # also of codes that were not chosen
