"""The patch discriminator: its sizes, its norm, its blur."""

import pytest
import torch

from vqgen.adversarial.discriminators import Blur, PatchDiscriminator
from vqgen.errors import InputError


@pytest.mark.parametrize(("size", "deepest"), [(6, 1), (11, 1), (12, 2), (28, 3), (32, 3), (64, 4), (256, 6)])
def test_the_deepest_that_fits_has_logits_and_one_more_is_refused_by_name(size, deepest):
    disc = PatchDiscriminator(3, layers=deepest, width=4)
    disc.check_size(size)
    side = size // 2**deepest - 2
    assert disc(torch.zeros(2, 3, size, size)).shape == (2, 1, side, side)
    with pytest.raises(
        InputError, match=f"^layers={deepest + 1} is too deep for images of {size} pixels; use {deepest} or fewer"
    ):
        PatchDiscriminator(3, layers=deepest + 1, width=4).check_size(size)


def test_the_shorter_side_decides():
    disc = PatchDiscriminator(3, layers=2, width=4)
    disc.check_size([12, 40])
    assert disc(torch.zeros(2, 3, 12, 40)).shape == (2, 1, 1, 8)
    with pytest.raises(InputError, match=r"^layers=2 is too deep for images of 11 pixels; use 1 or fewer"):
        disc.check_size([40, 11])


def test_images_too_small_for_any():
    with pytest.raises(InputError, match="the least is 6 pixels"):
        PatchDiscriminator(1, layers=1).check_size(5)


@pytest.mark.parametrize(("layers", "seen"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_as_many_pixels_as_it_says(layers, seen):
    size = 2 * seen + 2**layers
    x = torch.zeros(1, 1, size, size, requires_grad=True)
    logits = PatchDiscriminator(1, layers=layers, width=2, norm="none")(x)
    middle = logits.shape[2] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    assert gradient[0, 0].any(dim=1).sum() == seen


def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    disc = PatchDiscriminator(3, layers=2, width=8)
    with torch.no_grad():
        for parameter in disc.parameters():
            parameter.mul_(20)
        for _ in range(30):  # each pass improves the estimate of the largest singular value
            disc(torch.randn(1, 3, 32, 32))
    weights = [layer.weight.flatten(1) for layer in disc.net if hasattr(layer, "weight")]
    assert len(weights) == 4
    assert all(torch.linalg.matrix_norm(w, 2).item() == pytest.approx(1, rel=0.02) for w in weights)


def test_blur_removes_what_halving_would_alias_and_keeps_the_rest():
    blur = Blur()
    flat = torch.full((1, 2, 8, 8), 0.3)
    assert torch.allclose(blur(flat), flat)
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 2, 8, 8)
    assert blur(stripes).abs().max() < 1e-6
    assert PatchDiscriminator(1, layers=2, width=4, blur=True)(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 6, 6)


@pytest.mark.parametrize("options", [{}, {"norm": "none", "blur": True}])
def test_it_compiles_as_one_graph_and_learns(options):
    torch.manual_seed(0)
    disc = PatchDiscriminator(1, layers=1, width=8, **options)
    compiled = torch.compile(disc, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.Adam(disc.parameters(), lr=1e-2)
    for _ in range(30):
        real, fake = compiled(torch.cat([torch.rand(8, 1, 12, 12), -torch.rand(8, 1, 12, 12)])).chunk(2)
        loss = (1 - real).relu().mean() + (1 + fake).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert real.mean() > 0 > fake.mean()


def test_nonsense_is_refused():
    for options in ({"layers": 0}, {"width": 0}):
        with pytest.raises(InputError, match="must be at least 1"):
            PatchDiscriminator(1, **options)
