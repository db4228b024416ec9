"""What a discriminator and its opponent minimise, and what keeps the two in balance."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.distributed import all_reduce_sum, world_size

WON_ACCURACY = 0.99  # share of images or patches that a discriminator which has won tells apart


def discriminator_loss(name: str, real: Tensor, fake: Tensor) -> Tensor:
    """What D minimises, a scalar, given its logits of real and of generated images, of any shapes.

    `minimax` and `non_saturating`: -log D(x) - log(1 - D(G(z))), the GAN's eq. 1 (Goodfellow et al. 2014) with the sign
    turned; `hinge`: Lim and Ye 2017, algorithm 1, halved as in VQGAN's code; `least_squares`: Mao et al. 2017, eq. 9.
    """
    if name == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if name == "least_squares":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    assert name in ("minimax", "non_saturating"), name
    return F.softplus(-real).mean() + F.softplus(fake).mean()  # softplus(-a) = -log sigmoid(a)


def generator_loss(name: str, fake: Tensor) -> Tensor:
    """What G minimises, a scalar, given D's logits of its images, of any shape.

    `minimax` is the literal log(1 - D(G(z))), whose gradient vanishes where D is sure; `non_saturating` is
    -log D(G(z)), which has the same fixed point and a gradient there (Goodfellow et al. 2014, section 3).
    """
    if name == "hinge":
        return -fake.mean()
    if name == "least_squares":
        return 0.5 * (fake - 1).square().mean()
    if name == "minimax":
        return -F.softplus(fake).mean()  # log(1 - sigmoid(a))
    assert name == "non_saturating", name
    return F.softplus(-fake).mean()


def discriminator_accuracy(name: str, real: Tensor, fake: Tensor) -> Tensor:
    """Share of the logits on the right side, a scalar; 0.5 is a discriminator that cannot tell."""
    boundary = 0.5 if name == "least_squares" else 0.0  # least squares aims at 1 and 0, the others at both signs
    return 0.5 * ((real > boundary).float().mean() + (fake < boundary).float().mean())


class DiscriminatorWatch:
    """Notices when a discriminator has won: it has learned more than it can teach."""

    def __init__(self) -> None:
        self.has_won = False

    def has_just_won(self, figures: Mapping[str, float]) -> bool:
        """Whether `disc_accuracy` has risen above WON_ACCURACY since the last call; without that figure it has not."""
        before, self.has_won = self.has_won, figures.get("disc_accuracy", 0.0) > WON_ACCURACY
        return self.has_won and not before


def r1_penalty(real: Tensor, x: Tensor) -> Tensor:
    """E |grad_x D(x)|^2 / 2, a scalar (Mescheder et al. 2018, eq. 9): D must not be steep around real images.

    Of a patch discriminator, D(x) is the sum over the patches: the penalty grows with the image, and wants a smaller
    weight there.

    Args:
        real: D's logits of x.
        x: real images (B, C, H, W), which must require a gradient.
    """
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


class LeCam(nn.Module):
    """Holds D's logits of real images near the mean of those of generated ones, and the other way round.

    Tseng et al. 2021, eq. 5, one-sided as in their code: only logits further out than the other mean are drawn back.
    The running means belong in the checkpoint.

    Args:
        decay: of the running means, per pass.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty, a scalar, for D's logits; then takes their means in, over all processes."""
        penalty = F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()
        with torch.no_grad():
            now = all_reduce_sum(torch.stack([real.mean(), fake.mean()]).float()) / world_size()
            for mean, value in zip((self.real_mean, self.fake_mean), now, strict=True):
                mean.lerp_(torch.where(value.isfinite(), value, mean), 1 - self.decay)
        return penalty


def adaptive_weight(image_gradient: Tensor, adv_gradient: Tensor, x_rec: Tensor, last_layer: Tensor) -> Tensor:
    """The weight, a scalar, at which D pulls as hard at the decoder's last layer as the other losses (VQGAN, eq. 7).

    Both gradients with respect to x_rec are known already, so this takes two products with one layer's Jacobian, not
    two backward passes. It is the same on all processes.

    Args:
        image_gradient: of the reconstruction and the perceptual loss with respect to x_rec (B, C, H, W).
        adv_gradient: of the adversarial loss, likewise.
        x_rec: the decoder's output.
        last_layer: the weight that it came out of last.
    """
    norms = []
    for gradient in (image_gradient, adv_gradient):
        (at_layer,) = torch.autograd.grad(x_rec, last_layer, gradient.to(x_rec.dtype), retain_graph=True)
        norms.append((all_reduce_sum(at_layer.float()) / world_size()).norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4)
