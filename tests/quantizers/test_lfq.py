"""Lookup-free quantization against its definition."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random

from vqgen.quantizers import LFQ
from vqgen.quantizers.common import nearest_code


@pytest.mark.parametrize("spherical", [False, True])
def test_lfq_codes_are_the_signs_and_the_nearest_codes_too(spherical):
    quantizer = LFQ(32, spherical).eval()
    every_code = quantizer.decode(torch.arange(32)[:, None])
    assert len(every_code.unique(dim=0)) == 32
    z = random(2, 5, 30)
    q = quantizer(z)
    assert torch.equal(q.z_q > 0, z > 0)
    nearest = nearest_code(z.movedim(1, -1).reshape(-1, 5), every_code)
    assert torch.equal(q.codes.flatten(), nearest)
    if spherical:
        torch.testing.assert_close(q.z_q.norm(dim=1), torch.ones(2, 30))


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("size", [2, 8, 64, 512])
def test_lfq_entropies_are_those_of_the_softmax_over_all_codes(size, spherical):
    quantizer = LFQ(size, spherical, entropy_weight=1.0, diversity=0.6, commitment_weight=0.0, entropy_temperature=0.8)
    z = random(3, quantizer.code_dim, 20)
    vectors = z.movedim(1, -1).reshape(-1, quantizer.code_dim).double()
    if spherical:
        vectors = F.normalize(vectors, dim=1)
    codes = quantizer.decode(torch.arange(size)[:, None]).double()
    p = torch.softmax(-((vectors[:, None] - codes).square().sum(dim=2)) / (0.8 * quantizer.scale**2), dim=1)
    mean = p.mean(dim=0)
    expected = -torch.xlogy(p, p).sum(dim=1).mean() + 0.6 * torch.xlogy(mean, mean).sum()
    assert quantizer.train()(z).loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_lfq_entropy_of_a_large_codebook_takes_no_array_of_vectors_by_codes():
    quantizer = LFQ(2**18, entropy_weight=1.0)
    kept = []
    z = random(4, 18, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = quantizer.train()(z).loss
    loss.backward()
    assert max(kept) <= 1024 * 512  # N x K would be 1024 x 262144
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_lfq_beta_scales_the_commitment_gradient(beta):
    z = random(2, 6, 9).requires_grad_()
    q = LFQ(64, commitment_weight=beta, entropy_weight=0.0).train()(z)
    q.loss.backward()
    torch.testing.assert_close(z.grad, 2 * beta * (z - q.z_q).detach() / z.numel())
