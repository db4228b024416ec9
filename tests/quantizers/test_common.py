"""Lookup, estimators and entropies against their definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random

from vqgen.quantizers import common
from vqgen.quantizers.common import (
    entropy_loss,
    nearest_code,
    rotation_trick,
    soft_assignment,
    spread_vectors,
    straight_through,
)


@pytest.mark.parametrize("shape", [(101, 8, 16), (1, 3, 1), (70, 5, 33), (600, 4, 2500), (1500, 2, 1024)], ids=str)
def test_nearest_code_against_brute_force(shape):
    num_vectors, dim, size = shape
    z, codebook = random(num_vectors, dim), random(size, dim, seed=1)
    found = nearest_code(z, codebook)
    assert found.dtype == torch.int64
    distance = torch.cdist(z.double(), codebook.double()).square()  # (N, K)
    # If two codes' squared distances differ by less, fp32 may find either, because its error is about 1e-6.
    assert (distance.gather(1, found[:, None])[:, 0] - distance.amin(dim=1) < 1e-5).all()


def test_the_best_block_wins_wherever_it_is():
    codebook = random(3000, 4, seed=1)
    for row in (0, 31, 1023, 1024, 2047, 2999):
        assert nearest_code(codebook[row : row + 1] + 1e-4, codebook) == row


def test_lookup_holds_no_more_scores_than_it_may(monkeypatch):
    sizes, memory = [], set()
    addmm = torch.addmm

    def watched(*args, out):
        sizes.append(out.numel())
        memory.add(out.data_ptr())
        return addmm(*args, out=out)

    monkeypatch.setattr(torch, "addmm", watched)
    nearest_code(random(2000, 2), random(3000, 2))
    assert max(sizes) <= 1 << 19
    assert sum(sizes) == 2000 * 3000
    assert len(memory) == 1


def test_nearest_code_of_what_is_not_a_number_is_a_code():
    assert 0 <= nearest_code(torch.full((1, 4), torch.nan), random(64, 4)).item() < 64


def test_with_a_temperature_codes_are_drawn_from_their_softmax():
    torch.manual_seed(0)
    z, codebook = torch.tensor([[0.3, -0.2]]), random(5, 2)
    expected = torch.softmax(-(z - codebook).square().sum(dim=1) / 0.7, dim=0)
    drawn = nearest_code(z.expand(100_000, 2), codebook, temperature=0.7)
    frequencies = torch.bincount(drawn, minlength=5) / 100_000
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)


def test_straight_through_is_z_q_with_the_gradient_of_the_identity():
    z, z_q, w = random(7, 4).requires_grad_(), random(7, 4, seed=1).requires_grad_(), random(7, 4, seed=2)
    out = straight_through(z, z_q)
    (out * w).sum().backward()
    assert torch.equal(out, z_q)
    assert torch.equal(z.grad, w)
    assert z_q.grad is None


def rotation(z: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """The matrix of the rotation in the plane of two vectors (D,) that turns the first's direction to the second's."""
    u = z / z.norm()
    v = z_q - (z_q @ u) * u
    v = v / v.norm()
    cos = (z @ z_q) / z.norm() / z_q.norm()
    sin = (1 - cos**2).sqrt()
    plane = torch.stack([u, v], dim=1)  # (D, 2)
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=z.dtype)
    return torch.eye(len(z), dtype=z.dtype) - plane @ plane.T + plane @ turn @ plane.T


def test_rotation_trick_has_the_gradient_of_the_rotation_and_scaling():
    z, z_q, w = (random(6, 5, seed=i).double() for i in range(3))
    z.requires_grad_()
    out = rotation_trick(z, z_q)
    (out * w).sum().backward()
    assert torch.equal(out, z_q)
    for i in range(6):
        jacobian = rotation(z[i].detach(), z_q[i]) * z_q[i].norm() / z[i].detach().norm()
        torch.testing.assert_close(jacobian @ z[i].detach(), z_q[i])
        torch.testing.assert_close(z.grad[i], jacobian.T @ w[i])


def test_rotation_trick_is_finite_at_zero():
    z = torch.zeros(2, 4, requires_grad=True)
    rotation_trick(z, random(2, 4)).sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("block", [1, 100, 1 << 22], ids=["a row at a time", "in blocks", "at once"])
def test_soft_assignment_against_its_definition(monkeypatch, block):
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", block)
    z, codebook = random(23, 4).requires_grad_(), random(16, 4, seed=1).requires_grad_()
    z_2, codebook_2 = z.detach().clone().requires_grad_(), codebook.detach().clone().requires_grad_()
    target, w = random(16, 3, seed=2), random(23, 3, seed=3)

    p = torch.softmax(-(torch.cdist(z_2, codebook_2) ** 2) / 0.7, dim=1)
    entropy = -(p * p.log()).sum(dim=1).mean() + (p.mean(dim=0) * p.mean(dim=0).log()).sum()
    means, *entropies = soft_assignment(z, codebook, 0.7, target)
    loss = entropy_loss(*entropies)
    torch.testing.assert_close(means, p @ target)
    torch.testing.assert_close(loss, entropy)
    ((means * w).sum() + loss).backward()
    ((p @ target * w).sum() + entropy).backward()
    torch.testing.assert_close(z.grad, z_2.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codebook.grad, codebook_2.grad, atol=1e-5, rtol=1e-4)


def test_soft_assignment_keeps_no_probabilities_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        soft_assignment(random(500, 4).requires_grad_(), random(400, 4), 1.0)
    assert sum(kept) < 500 * 400 / 10


def test_spread_vectors_are_even_over_the_batch_and_new_each_time():
    z = torch.arange(1000.0)[:, None]
    draws = [spread_vectors(z, 100, torch.tensor(i)).squeeze(1) for i in range(3)]
    for draw in draws:
        gaps = np.diff(np.sort(draw.numpy()), prepend=0, append=1000)
        assert gaps.max() < 30
        assert len(draw.unique()) == 100
    assert len(torch.cat(draws).unique()) > 290


def test_spread_vectors_of_few_vectors_repeats_them():
    z = random(3, 4)
    draw = spread_vectors(z, 64, torch.tensor(0))
    assert F.pairwise_distance(draw[:, None], z[None]).amin(dim=1).max() < 1e-5
