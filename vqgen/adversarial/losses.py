"""The losses of a discriminator D and its opponent G, and the terms that keep the two in balance."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.distributed import all_reduce_sum, world_size

WON_ACCURACY = 0.99  # D has won if it tells more than this share of images or patches apart


def discriminator_loss(name: str, real: Tensor, fake: Tensor) -> Tensor:
    """D's loss, a scalar, from its logits of real and of generated images, which may have any shapes.

    `minimax` and `non_saturating`: -log D(x) - log(1 - D(G(z))), the negative of the GAN's eq. 1 (Goodfellow et al.
    2014). `hinge`: Lim and Ye 2017, algorithm 1, halved as in VQGAN's code. `least_squares`: Mao et al. 2017, eq. 9.
    """
    if name == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if name == "least_squares":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    assert name in ("minimax", "non_saturating"), name
    return F.softplus(-real).mean() + F.softplus(fake).mean()  # softplus(-a) = -log sigmoid(a)


def generator_loss(name: str, fake: Tensor) -> Tensor:
    """G's loss, a scalar, from D's logits of generated images, which may have any shape.

    `minimax` is the literal log(1 - D(G(z))), whose gradient vanishes where D is sure. `non_saturating` is
    -log D(G(z)), which has the same fixed point, and a gradient where D is sure (Goodfellow et al. 2014, section 3).
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
    """Share of the logits on the right side of the boundary, a scalar; 0.5 means that D cannot tell."""
    boundary = 0.5 if name == "least_squares" else 0.0  # least squares aims at 1 and 0, the others at + and -
    return 0.5 * ((real > boundary).float().mean() + (fake < boundary).float().mean())


class DiscriminatorWatch:
    """Notices when a discriminator has won, because its opponent then learns little from it."""

    def __init__(self) -> None:
        self.has_won = False

    def has_just_won(self, figures: Mapping[str, float]) -> bool:
        """Whether `disc_accuracy` has risen above WON_ACCURACY since the last call; False if the figure is missing."""
        before, self.has_won = self.has_won, figures.get("disc_accuracy", 0.0) > WON_ACCURACY
        return self.has_won and not before


def r1_penalty(real: Tensor, x: Tensor) -> Tensor:
    """E |grad_x D(x)|^2 / 2, a scalar, which penalises a D that is steep at real images (Mescheder et al. 2018, eq. 9).

    For a patch discriminator, D(x) is the sum over the patches. So the penalty grows with the image, and larger images
    need a smaller weight.

    Args:
        real: D's logits of x.
        x: real images (B, C, H, W) that require a gradient.
    """
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


class LeCam(nn.Module):
    """Pulls D's logits of real images towards the running mean of its logits of generated images, and vice versa.

    Tseng et al. 2021, eq. 5, one-sided as in their code: it penalises real logits above the mean of generated ones and
    generated logits below the mean of real ones. The running means belong in the checkpoint.

    Args:
        decay: decay of the running means per pass.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the penalty for D's logits, a scalar, and updates the running means, over all processes."""
        penalty = F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()
        with torch.no_grad():
            now = all_reduce_sum(torch.stack([real.mean(), fake.mean()]).float()) / world_size()
            for mean, value in zip((self.real_mean, self.fake_mean), now, strict=True):
                mean.lerp_(torch.where(value.isfinite(), value, mean), 1 - self.decay)
        return penalty


def adaptive_weight(image_gradient: Tensor, adv_gradient: Tensor, x_rec: Tensor, last_layer: Tensor) -> Tensor:
    """The scalar weight at which D's gradient at the last layer is as large as the other losses' (VQGAN, eq. 7).

    Both gradients with respect to x_rec are known already, so this takes two products with one layer's Jacobian instead
    of two backward passes. The weight is the same on all processes.

    Args:
        image_gradient: gradient (B, C, H, W) of the reconstruction and perceptual losses with respect to x_rec.
        adv_gradient: gradient (B, C, H, W) of the adversarial loss with respect to x_rec.
        x_rec: the decoder's output.
        last_layer: the weight of the decoder's last layer.
    """
    norms = []
    for gradient in (image_gradient, adv_gradient):
        (at_layer,) = torch.autograd.grad(x_rec, last_layer, gradient.to(x_rec.dtype), retain_graph=True)
        norms.append((all_reduce_sum(at_layer.float()) / world_size()).norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4)
