"""Figures of merit against their formulas."""

import numpy as np
import pytest
import torch

from vqgen.metrics import CodeUsage, psnr

CPU = torch.device("cpu")


def test_psnr_is_that_of_the_images_in_uint8_range():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    mse = (x * 255 - y * 255).square().mean().item()
    expected = 20 * np.log10(255) - 10 * np.log10(mse)
    assert psnr(((2 * x - 1) - (2 * y - 1)).square().mean()).item() == pytest.approx(expected, rel=1e-12)


def test_psnr_of_equal_images_is_finite():
    assert 100 < psnr(torch.tensor(0.0)).item() < 200


def test_code_usage_and_perplexity_of_several_batches():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(12, (2, 1, 3, 3), generator=generator) ** 2 % 16 for _ in range(3)]
    usage = CodeUsage(1, 16, CPU)
    for codes in batches:
        usage.update(codes)
    counts = np.bincount(torch.cat(batches).flatten().numpy(), minlength=16)
    p = counts[counts > 0] / counts.sum()
    figures = usage.compute()
    assert figures["usage"].item() == pytest.approx((counts > 0).mean())
    assert figures["perplexity"].item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_perplexity_runs_from_one_code_to_all():
    usage = CodeUsage(1, 8, CPU)
    usage.update(torch.full((5, 1, 1), 3))
    assert [v.item() for v in usage.compute().values()] == pytest.approx([1 / 8, 1])
    usage.update(torch.arange(8).view(8, 1, 1))
    assert [v.item() for v in usage.compute().values()] == pytest.approx([1, 8])


def test_code_usage_starts_anew_after_each_compute():
    usage = CodeUsage(1, 4, CPU)
    usage.update(torch.tensor([[[0, 1, 2]]]))
    usage.compute()
    usage.update(torch.tensor([[[3]]]))
    assert usage.compute()["usage"].item() == 0.25


def test_code_usage_of_several_codebooks_is_their_mean():
    usage = CodeUsage(2, 4, CPU)
    usage.update(torch.tensor([[[0, 0, 0, 0], [0, 1, 2, 3]]]))  # (B, Q, S): the first uses one code, the second all
    assert [v.item() for v in usage.compute().values()] == pytest.approx([(1 / 4 + 1) / 2, (1 + 4) / 2])
