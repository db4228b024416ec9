"""The codes of an image that stay, and those that are drawn anew."""

import torch

from vqgen.codes import CodeLayout
from vqgen.priors.completion import below, known_tokens, scattered


def test_a_code_is_drawn_if_any_of_its_part_of_the_image_is():
    layout = CodeLayout(((1, 2, 2), (2, 4, 4)), (5, 7))  # two resolutions, and two codebooks in the finer one
    codes = [torch.zeros(1, *shape, dtype=torch.int64) for shape in layout.shapes]
    redrawn = torch.zeros(1, 16, 16, dtype=torch.bool)
    redrawn[0, 15, 3] = True  # one pixel, in the last row and the first column of both maps
    known = known_tokens(layout, codes, redrawn)
    assert torch.equal(known >= 0, known == layout.flatten(codes))
    coarse, fine = layout.unflatten(torch.where(known < 0, 1000, 0))
    assert (coarse > 500).nonzero().tolist() == [[0, 0, 1, 0]]
    assert (fine > 500).nonzero().tolist() == [[0, 0, 3, 0], [0, 1, 3, 0]]


def test_the_rows_below_a_share_of_the_height():
    assert below(0.5, 4, 3)[0].tolist() == [[False] * 3] * 2 + [[True] * 3] * 2
    assert below(0.0, 4, 3).all()
    assert below(0.9, 4, 1).sum() == 0  # rounded


def test_scattered_places_are_those_with_the_lowest_noise():
    noise = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    chosen = scattered(0.25, noise)
    assert (chosen.flatten(1).sum(dim=1) == 16).all()
    assert (noise[chosen].view(5, 16).amax(dim=1) < noise[~chosen].view(5, 48).amin(dim=1)).all()
    assert (scattered(0.001, noise).flatten(1).sum(dim=1) == 1).all()
