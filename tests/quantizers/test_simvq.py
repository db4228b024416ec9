"""SimVQ: its frozen and its trained part."""

import pytest
import torch
from helpers import random

from vqgen.quantizers import SimVQ


def test_simvq_trains_the_map_and_never_the_codebook():
    quantizer = SimVQ(64, 4).train()
    assert [name for name, _ in quantizer.named_parameters()] == ["projection.weight"]
    frozen = quantizer.frozen_codebook.clone()
    quantizer(random(2, 4, 30)).loss.backward()
    torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
    assert torch.equal(quantizer.frozen_codebook, frozen)


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_simvq_beta_scales_the_encoders_term_and_not_the_codebooks(beta):
    torch.manual_seed(0)
    quantizer, z = SimVQ(64, 4, commitment_weight=beta), random(2, 4, 9).requires_grad_()
    q = quantizer(z)
    q.loss.backward()
    difference = (z - q.z_q).detach()
    torch.testing.assert_close(z.grad, 2 * beta * difference / z.numel())
    rows = quantizer.frozen_codebook[q.codes.flatten()]  # C W^T moves towards z; beta does not scale W's gradient
    expected = -2 * difference.movedim(1, -1).reshape(-1, 4).T @ rows / z.numel()
    torch.testing.assert_close(quantizer.projection.weight.grad, expected)
