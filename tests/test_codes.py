"""Code maps <-> one token sequence, for every kind of layout."""

import pytest
import torch
from torch import Tensor

from vqgen.codes import ORDERS, CodeLayout

LAYOUTS = {
    "1-D": CodeLayout(((1, 5),), (7,)),
    "2-D": CodeLayout(((1, 2, 3),), (7,)),
    "3-D": CodeLayout(((1, 2, 2, 3),), (7,)),
    "residual": CodeLayout(((3, 2, 2),), (5,)),
    "two maps": CodeLayout(((1, 2, 2), (1, 4, 4)), (7, 11)),
    "everything": CodeLayout(((2, 3), (1, 6), (3, 2, 2)), (4, 9, 5)),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def random_codes(layout: CodeLayout, batch: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(size, (batch, *shape), generator=generator)
        for shape, size in zip(layout.shapes, layout.codebook_sizes, strict=True)
    ]


@each_layout
def test_unflatten_inverts_flatten(layout):
    codes = random_codes(layout)
    tokens = layout.flatten(codes)
    assert tokens.shape == (4, layout.num_tokens)
    assert tokens.dtype == torch.int64
    for given, back in zip(codes, layout.unflatten(tokens), strict=True):
        assert torch.equal(given, back)


@each_layout
def test_tokens_lie_in_the_range_of_their_position(layout):
    tokens, ranges = layout.flatten(random_codes(layout, batch=64)), layout.token_ranges()
    assert ranges.shape == (layout.num_tokens, 2)
    assert (tokens >= ranges[:, 0]).all()
    assert (tokens < ranges[:, 1]).all()
    assert torch.equal(tokens.amax(dim=0), ranges[:, 1] - 1)  # and no range is wider than its codebook


@each_layout
def test_each_codebook_has_a_range_of_its_own_and_they_fill_the_vocabulary(layout):
    ranges = sorted(set(map(tuple, layout.token_ranges().tolist())))
    sizes = [k for shape, k in zip(layout.shapes, layout.codebook_sizes, strict=True) for _ in range(shape[0])]
    assert [end - first for first, end in ranges] == sizes
    assert [first for first, _ in ranges] == [0, *[end for _, end in ranges[:-1]]]
    assert ranges[-1][1] == layout.vocab_size


def test_vocab_size_and_num_tokens_count_every_codebook_and_position():
    layout = LAYOUTS["everything"]
    assert layout.vocab_size == 2 * 4 + 1 * 9 + 3 * 5
    assert layout.num_tokens == 2 * 3 + 1 * 6 + 3 * 2 * 2


def test_codes_of_a_position_stay_together_and_coarse_maps_come_first():
    layout = CodeLayout(((2, 3), (1, 2)), (10, 5))
    codes = [torch.tensor([[[0, 1, 2], [3, 4, 5]]]), torch.tensor([[[0, 4]]])]
    assert layout.flatten(codes).tolist() == [[0, 13, 1, 14, 2, 15, 20, 24]]


def test_grids_are_written_row_by_row():
    layout = CodeLayout(((1, 2, 3),), (6,))
    assert layout.flatten([torch.arange(6).view(1, 1, 2, 3)]).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_maps_of_another_number_are_refused():
    layout = LAYOUTS["two maps"]
    with pytest.raises(ValueError, match="zip"):
        layout.flatten(random_codes(layout)[:1])


def column_by_column(shapes):
    """A toy order, for maps of 2 x 3 positions with one code each."""
    ((_, height, width),) = shapes
    return [y * width + x for x in range(width) for y in range(height)]


def test_another_order_is_a_name_and_a_function(monkeypatch):
    monkeypatch.setitem(ORDERS, "columns", column_by_column)
    codes = [torch.arange(12).reshape(2, 1, 2, 3)]
    layout = CodeLayout(((1, 2, 3),), (16,), order="columns")
    assert layout.flatten(codes)[0].tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(layout.unflatten(layout.flatten(codes))[0], codes[0])


def test_legal_tokens_follow_the_order(monkeypatch):
    monkeypatch.setitem(ORDERS, "fine first", lambda shapes: [2, 3, 4, 5, 0, 1])
    layout = CodeLayout(((2, 1, 1), (1, 2, 2)), (4, 8), order="fine first")
    assert layout.token_ranges().tolist() == [[8, 16]] * 4 + [[0, 4], [4, 8]]
    codes = [torch.tensor([[[[3]], [[1]]]]), torch.tensor([[[[0, 1], [2, 7]]]])]
    tokens = layout.flatten(codes)[0]
    assert tokens.tolist() == [8, 9, 10, 15, 3, 5]
    assert all(torch.equal(a, b) for a, b in zip(layout.unflatten(tokens[None]), codes, strict=True))
