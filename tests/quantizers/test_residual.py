"""Residual quantization: the sum of levels, their gradients, dropout."""

import pytest
import torch
from helpers import random, trained

from vqgen.quantizers import Quantizer, build_quantizer


def residual(base: str = "ema", levels: int = 3, beta: float = 0.25, **options) -> Quantizer:
    """A residual quantizer of K = 16, D = 4, initialised."""
    torch.manual_seed(0)
    base_options = {"name": base, "codebook_size": 16, "commitment_weight": beta}
    if base != "lfq":  # its dimension is log2 of its size
        base_options["code_dim"] = 4
    quantizer = build_quantizer(name="residual", num_quantizers=levels, base=base_options, **options).train()
    quantizer(random(16, 4, 32, seed=50))
    return quantizer


def test_each_level_takes_what_the_ones_before_have_left():
    quantizer = residual().eval()
    z = random(3, 4, 5, 2)
    q = quantizer(z)
    left = z
    for i, level in enumerate(quantizer.levels):
        alone = level(left)
        assert torch.equal(alone.codes, q.codes[:, i : i + 1])
        left = left - alone.z_q
    torch.testing.assert_close(z - left, q.z_q)


@pytest.mark.parametrize("base", ["ema", "lfq"])
def test_more_levels_come_closer(base):
    quantizer = trained(f"residual of {base}").eval()
    z = random(8, quantizer.code_dim, 64).clamp(-1, 1)
    codes = quantizer(z).codes
    errors = [(quantizer.decode_codes(codes[:, :n]) - z).square().mean().item() for n in (1, 2, 3)]
    assert errors[0] > 1.5 * errors[1]
    assert errors[1] > 1.5 * errors[2]


@pytest.mark.parametrize("levels", [[8, 8, 8], [7, 5], [4, 3, 8]], ids=str)
def test_each_fsq_level_divides_the_error_by_its_number_of_steps(levels):
    quantizer = build_quantizer(name="residual", num_quantizers=4, base={"name": "fsq", "levels": levels}).eval()
    z = 1.5 * random(16, len(levels), 256)
    codes, bounded = quantizer(z).codes, quantizer.bound(z.mT).mT
    for i in range(4):
        error = (quantizer.decode_codes(codes[:, : i + 1]) - bounded).abs().amax(dim=(0, 2))
        # half a step of the first grid, 1 / (L // 2); each further grid shrinks to half a step of the one before
        half_steps = [0.5 / (n // 2) / (n - 1 + n % 2) ** i for n in levels]
        assert (error <= 1.01 * torch.tensor(half_steps) + 1e-6).all()
    assert all(len(codes[:, i].unique()) > 0.6 * quantizer.codebook_size for i in range(4))


def test_residual_fsq_has_the_gradient_of_its_bound_once():
    quantizer = build_quantizer(name="residual", base={"name": "fsq", "levels": [8, 5]})
    z, w = random(2, 2, 9).requires_grad_(), random(2, 2, 9, seed=2)
    (quantizer(z).z_q * w).sum().backward()
    z_2 = z.detach().clone().requires_grad_()
    (quantizer.bound(z_2.mT).mT * w).sum().backward()
    torch.testing.assert_close(z.grad, z_2.grad)


def test_no_lfq_level_outweighs_the_others():
    base = {"name": "lfq", "codebook_size": 64, "entropy_weight": 0.0, "commitment_weight": 1.0}
    norms = []
    for levels in (1, 2, 4, 8):
        quantizer = build_quantizer(name="residual", num_quantizers=levels, base=base).train()
        z = random(4, 6, 50).requires_grad_()
        quantizer(z).loss.backward()
        norms.append(z.grad.norm().item())
    assert norms[3] < 2 * norms[1]


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("base", ["ema", "vq", "simvq"])
def test_the_decoders_gradient_is_passed_on_once(base, levels):
    z, w = random(2, 4, 9).requires_grad_(), random(2, 4, 9, seed=2)
    (residual(base, levels)(z).z_q * w).sum().backward()
    assert torch.equal(z.grad, w)


@pytest.mark.parametrize("base", ["ema", "vq", "simvq", "lfq"])
def test_each_level_keeps_its_commitment_gradient(base):
    quantizer = residual(base, beta=0.25).eval()
    z = random(2, 4, 9).requires_grad_()
    q = quantizer(z)
    q.loss.backward()
    expected = torch.zeros_like(z)
    for n in (1, 2, 3):
        left = (z - quantizer.decode_codes(q.codes[:, :n])).detach()  # z minus the sum so far
        step = 2 * 0.25 * left / z.numel()
        assert step.abs().max() > 1e-4
        expected += step
    torch.testing.assert_close(z.grad, expected)


def test_the_rotation_is_onto_the_sum():
    z, w = random(2, 4, 9).requires_grad_(), random(2, 4, 9, seed=2)
    q = residual(gradient="rotation")(z)
    (q.z_q * w).sum().backward()
    scale = q.z_q.detach().norm(dim=1) / z.detach().norm(dim=1)
    torch.testing.assert_close(z.grad.norm(dim=1), scale * w.norm(dim=1))


def test_dropout_keeps_the_first_levels_of_some_images():
    quantizer = residual("simvq", levels=4, dropout=0.4).train()
    torch.manual_seed(0)
    q = quantizer(random(1000, 4, 6))
    prefixes = torch.stack([quantizer.decode_codes(q.codes[:, :n]) for n in (1, 2, 3, 4)])  # (n, B, D, S)
    same = (prefixes == q.z_q).all(dim=3).all(dim=2)  # (n, B)
    assert (same.sum(dim=0) == 1).all()
    shares = same.float().mean(dim=1)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.1, 0.1, 0.7]), atol=0.04, rtol=0)


def test_without_training_nothing_is_dropped():
    quantizer = residual("simvq", levels=4, dropout=1.0).eval()
    q = quantizer(random(50, 4, 6))
    assert torch.equal(q.z_q, quantizer.decode_codes(q.codes))


def test_dropped_levels_learn_all_the_same():
    quantizer = residual("vq", levels=3, dropout=1.0).train()
    quantizer(random(1, 4, 40)).loss.backward()
    assert all(level.codebook.grad.abs().sum() > 0 for level in quantizer.levels)


@pytest.mark.parametrize("base", ["ema", "fsq", "lfq"])
def test_fewer_codes_decode_too(base):
    quantizer = trained(f"residual of {base}").eval()
    codes = quantizer(random(3, quantizer.code_dim, 5)).codes
    first = quantizer.levels[0].decode_codes(codes[:, :1])
    assert torch.equal(quantizer.decode_codes(codes[:, :1]), first)
