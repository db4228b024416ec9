"""Random changes of the images that a discriminator sees."""

import pytest
import torch

from vqgen.adversarial.augment import diff_augment

KINDS = ("color", "translation", "cutout")


def images(batch: int, channels: int = 3, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_no_kinds_change_nothing():
    x = images(2)
    assert diff_augment(x, []) is x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_changed_in_its_own_way(kind, channels):
    torch.manual_seed(0)
    x = images(1, channels).repeat(8, 1, 1, 1)
    changed = diff_augment(x, [kind])
    assert changed.shape == x.shape
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 4


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS])
def test_gradients_are_those_of_finite_differences_twice(kinds):
    """R1 differentiates D's gradient, so the second derivatives count too."""

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return diff_augment(x, kinds).pow(2)

    x = images(2, 3, 4, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)


@pytest.mark.parametrize(("height", "width", "down", "right"), [(16, 24, 2, 3), (20, 12, 3, 2), (5, 30, 1, 4)])
def test_a_translated_image_is_moved_by_up_to_an_eighth_with_zeros_behind(height, width, down, right):
    torch.manual_seed(0)
    x, found = images(300, 3, height, width), set()
    for before, after in zip(x, diff_augment(x, ["translation"]), strict=True):
        matches = [
            (rows, columns)
            for rows in range(-down - 1, down + 2)
            for columns in range(-right - 1, right + 2)
            if torch.equal(after, shifted(before, rows, columns))
        ]
        assert len(matches) == 1
        found |= set(matches)
    assert {rows for rows, _ in found} == set(range(-down, down + 1))
    assert {columns for _, columns in found} == set(range(-right, right + 1))


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    height, width = image.shape[1:]
    result = torch.zeros_like(image)
    rows, columns = range(max(0, down), height + min(0, down)), range(max(0, right), width + min(0, right))
    result[:, rows.start : rows.stop, columns.start : columns.stop] = image[
        :, rows.start - down : rows.stop - down, columns.start - right : columns.stop - right
    ]
    return result


@pytest.mark.parametrize(("height", "width", "largest"), [(16, 24, (8, 12)), (6, 5, (3, 3))])
def test_cutout_takes_a_rectangle_of_half_the_sides_and_leaves_the_rest(height, width, largest):
    torch.manual_seed(0)
    x, sizes = images(300, 3, height, width), []
    for before, after in zip(x, diff_augment(x, ["cutout"]), strict=True):
        gone = (after == 0).all(dim=0)
        rows, columns = gone.any(dim=1).nonzero().flatten(), gone.any(dim=0).nonzero().flatten()
        assert gone[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        assert torch.equal(after[:, ~gone], before[:, ~gone])
        sizes.append((len(rows), len(columns)))
    assert max(sizes) == largest
    assert min(sizes) == tuple((side + 1) // 2 for side in largest)  # its centre is in the image


def test_color_changes_brightness_saturation_and_contrast_only():
    torch.manual_seed(0)
    x = images(500)
    changed = diff_augment(x, ["color"])
    offset = (changed - x).mean(dim=(1, 2, 3))  # saturation and contrast keep an image's mean
    assert_fills(offset, -0.5, 0.5)
    grey, changed_grey = (t.mean(dim=1) - t.mean(dim=(1, 2, 3))[:, None, None] for t in (x, changed))
    contrast = (changed_grey * grey).sum(dim=(1, 2)) / grey.square().sum(dim=(1, 2))
    torch.testing.assert_close(changed_grey, contrast[:, None, None] * grey, rtol=0, atol=1e-5)
    assert_fills(contrast, 0.5, 1.5)
    chroma, changed_chroma = (t - t.mean(dim=1, keepdim=True) for t in (x, changed))
    factor = (changed_chroma * chroma).sum(dim=(1, 2, 3)) / chroma.square().sum(dim=(1, 2, 3)) / contrast
    torch.testing.assert_close(changed_chroma, (factor * contrast)[:, None, None, None] * chroma, rtol=0, atol=1e-5)
    assert_fills(factor, 0, 2)


def assert_fills(values: torch.Tensor, low: float, high: float) -> None:
    """The values lie between the two, and some lie near each."""
    margin = 0.05 * (high - low)
    assert low - 1e-5 <= values.min() < low + margin
    assert high - margin < values.max() <= high + 1e-5
