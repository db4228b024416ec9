"""Finite scalar quantization against its definition."""

import numpy as np
import pytest
import torch

from vqgen.quantizers import FSQ


@pytest.mark.parametrize("levels", [[8, 5], [3], [7, 5, 4, 3], [1500]], ids=str)
def test_fsq_reaches_every_code_and_all_lie_on_its_grid(levels):
    quantizer = FSQ(levels).eval()
    assert (quantizer.codebook_size, quantizer.code_dim) == (np.prod(levels), len(levels))
    grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 60 if len(levels) > 1 else 60_000) for _ in levels]).view(
        1, -1, len(levels)
    )
    q = quantizer(grid.movedim(-1, 1))
    assert len(q.codes.unique()) == quantizer.codebook_size
    for dim, count in enumerate(levels):
        values = torch.arange(-(count // 2), count - count // 2) / (count // 2)
        torch.testing.assert_close(q.z_q[0, dim].unique(), values)


def test_fsq_codes_count_in_mixed_radix_with_the_first_dimension_fastest():
    quantizer = FSQ([4, 3])
    expected = [[x / 2, y] for y in (-1, 0, 1) for x in (-2, -1, 0, 1)]
    assert torch.equal(quantizer.decode(torch.arange(12)[:, None]), torch.tensor(expected).float())


def test_fsq_rounding_has_the_gradient_of_its_bound():
    quantizer = FSQ([5])
    z = torch.linspace(-2, 2, 41).view(1, 1, -1).requires_grad_()
    q = quantizer(z)
    q.z_q.sum().backward()
    bound = torch.tanh(z.detach()) * (4 * 1.001 / 2) / 2  # odd: no offset
    assert (q.z_q - bound).abs().max() <= 0.25 + 1e-6
    torch.testing.assert_close(z.grad, (1 - torch.tanh(z.detach()) ** 2) * (4 * 1.001 / 2) / 2)
    assert q.loss == 0
