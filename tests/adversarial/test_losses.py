"""The losses of discriminators and their opponents against the definitions; and the balance between the two."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.adversarial.losses import (
    LeCam,
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.tokenizers.light import Light
from vqgen.tokenizers.vqmodel import VQModel

NAMES = ("minimax", "non_saturating", "hinge", "least_squares")


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_minimax_objective_is_goodfellows():
    real, fake = logits(64), logits(64, seed=1)
    value = real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()  # eq. 1: D maximises it, G minimises it
    for name in ("minimax", "non_saturating"):
        assert discriminator_loss(name, real, fake).item() == pytest.approx(-value.item())
    assert generator_loss("minimax", fake).item() == pytest.approx((1 - fake.sigmoid()).log().mean().item())
    assert generator_loss("non_saturating", fake).item() == pytest.approx(-fake.sigmoid().log().mean().item())


def test_where_the_discriminator_is_sure_only_the_literal_form_has_no_gradient():
    gradients = {}
    for name in NAMES:
        fake = torch.full((8,), -12.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(generator_loss(name, fake), fake)
        gradients[name] = gradient.sum().item()
    assert gradients["minimax"] == pytest.approx(0, abs=1e-4)
    assert gradients["non_saturating"] == pytest.approx(-1, abs=1e-4)
    assert gradients["hinge"] == pytest.approx(-1)
    assert gradients["least_squares"] == pytest.approx(-13)


def test_hinge_asks_for_a_margin_and_no_more():
    assert discriminator_loss("hinge", torch.tensor([1.0, 7.0]), torch.tensor([-1.0, -3.0])) == 0
    assert discriminator_loss("hinge", torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert discriminator_loss("hinge", torch.tensor([-1.0]), torch.tensor([-1.0])) == 1


def test_least_squares_aims_at_one_and_zero():
    one, zero = torch.ones(3), torch.zeros(3)
    assert discriminator_loss("least_squares", one, zero) == 0
    assert discriminator_loss("least_squares", zero, one) == 1
    assert generator_loss("least_squares", one) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_step_of_either_side_is_a_step_against_the_other(name):
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(discriminator_loss(name, real, fake), (real, fake), allow_unused=True)
    (to_generator,) = torch.autograd.grad(generator_loss(name, fake), fake)
    assert (to_real < 0).all()  # a gradient step raises the logits of real images
    assert (to_fake >= 0).all()  # and lowers those of generated images (for least squares they are optimal already)
    assert (to_generator < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_counts_the_right_side(name):
    sure = torch.full((6,), 9.0)
    assert discriminator_accuracy(name, sure, -sure) == 1
    assert discriminator_accuracy(name, -sure, sure) == 0
    assert discriminator_accuracy(name, sure, sure) == 0.5


def test_r1_is_the_squared_slope_at_real_images_and_trains_the_discriminator():
    disc = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False))
    x = torch.randn(5, 3, 2, 2, requires_grad=True)
    penalty = r1_penalty(disc(x), x)
    weight = disc[1].weight
    assert penalty.item() == pytest.approx(0.5 * weight.square().sum().item())
    penalty.backward()
    assert torch.allclose(weight.grad, weight)


def test_lecam_draws_back_what_is_beyond_the_other_sides_mean():
    lecam = LeCam(decay=0.5)
    real, fake = torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 1.0])
    assert lecam(real, fake).item() == pytest.approx((9 + 0) / 2 + (4 + 0) / 2)  # both means are 0 at first
    assert lecam.real_mean.item() == pytest.approx(0.5)
    assert lecam.fake_mean.item() == pytest.approx(-0.25)
    expected = (F.relu(real + 0.25) ** 2).mean() + (F.relu(0.5 - fake) ** 2).mean()
    assert lecam(real, fake).item() == pytest.approx(expected.item())
    again = LeCam(decay=0.5)
    again.load_state_dict(lecam.state_dict())
    assert again(real, fake).item() == lecam(real, fake).item()


def test_a_step_that_is_not_finite_leaves_lecams_means():
    lecam = LeCam()
    lecam(torch.ones(2), -torch.ones(2))
    before = lecam.real_mean.clone(), lecam.fake_mean.clone()
    lecam(torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf, 0.0]))
    assert (lecam.real_mean, lecam.fake_mean) == before


def vqgan() -> tuple[VQModel, PatchDiscriminator, torch.Tensor]:
    torch.manual_seed(0)
    model = Light(1, 2, [8, 16], quantizer={"codebook_size": 16, "kmeans_iterations": 0}).eval()
    disc = PatchDiscriminator(1, layers=1, width=4, norm="none")
    return model, disc, torch.rand(3, 1, 16, 16) * 2 - 1


def test_the_adaptive_weight_is_the_ratio_of_the_last_layers_gradients():
    model, disc, x = vqgan()
    x_rec = model(x)[0]
    y = x_rec.detach().requires_grad_()
    gradients = [torch.autograd.grad(loss, y)[0] for loss in (F.mse_loss(y, x), generator_loss("hinge", disc(y)))]
    weight = adaptive_weight(*gradients, x_rec, model.last_layer)

    losses = F.mse_loss(x_rec, x), generator_loss("hinge", disc(x_rec))  # VQGAN's eq. 7, word for word
    norms = [torch.autograd.grad(loss, model.last_layer, retain_graph=True)[0].norm() for loss in losses]
    assert weight.item() == pytest.approx((norms[0] / (norms[1] + 1e-6)).item(), rel=1e-5)
    assert weight > 0


def test_gradients_summed_at_the_image_are_those_of_the_summed_losses():
    model, disc, x = vqgan()
    x_rec, q = model(x)
    loss = F.mse_loss(x_rec, x) + 0.7 * generator_loss("hinge", disc(x_rec)) + q[0].loss
    expected = torch.autograd.grad(loss, list(model.parameters()))

    x_rec, q = model(x)
    y = x_rec.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.mse_loss(y, x) + 0.7 * generator_loss("hinge", disc(y)), y)
    got = torch.autograd.grad(q[0].loss + (x_rec * gradient).sum(), list(model.parameters()))
    for one, other in zip(expected, got, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in disc.parameters())


def test_the_perceptual_loss_trains_decoder_and_encoder_and_not_itself():
    model, _, x = vqgan()  # grey images, smaller than the network's minimum
    perceptual = PerceptualDistance("alex").train()
    with torch.autocast("cpu", torch.bfloat16):
        x_rec = model(x)[0]
        loss = perceptual(x_rec, x).mean()
    assert loss.dtype == torch.float32
    loss.backward()
    for weight in (model.encoder[0].weight, model.to_code.weight, model.last_layer):
        assert weight.grad.abs().max() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())
