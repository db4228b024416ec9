"""Codes replaced by near ones, against distances and gradients written out here."""

import pytest
import torch
from helpers import VARIANTS, random, trained

from vqgen.errors import InputError
from vqgen.quantizers import Replacements, build_quantizer
from vqgen.quantizers.common import nearest_others
from vqgen.quantizers.residual import ResidualQuantizer

every_variant = pytest.mark.parametrize("variant", VARIANTS)
COUNT = 5


def ranks_of(codes: torch.Tensor, images: int = 2) -> torch.Tensor:
    """About half of the codes of the first images keep their code, which is rank 0."""
    source = torch.Generator().manual_seed(1)
    shape = (images, *codes.shape[1:])
    return torch.randint(1, COUNT + 1, shape, generator=source) * (torch.rand(shape, generator=source) < 0.5)


@every_variant
def test_neighbours_are_the_codes_whose_vectors_are_nearest(variant):
    quantizer = trained(variant).eval()
    codes = quantizer(random(1, quantizer.code_dim, 40)).codes[0].T  # (N, Q)
    near = quantizer.neighbours(codes, COUNT)
    assert near.shape == (40, quantizer.num_codebooks, 1 + COUNT)
    assert torch.equal(near[..., 0], codes)
    levels = list(quantizer.levels) if isinstance(quantizer, ResidualQuantizer) else [quantizer]
    for level, own, others in zip(levels, codes.T, near.unbind(dim=1), strict=True):
        vectors = level.decode(torch.arange(level.codebook_size)[:, None]).detach().double()
        for code, found in zip(own, others, strict=True):
            distances = (vectors - vectors[code]).norm(dim=1)
            distances[code] = -1  # itself comes first, and is not among the others
            nearest = distances.sort().values[: 1 + COUNT]
            torch.testing.assert_close(distances[found], nearest, rtol=0, atol=1e-5)
            assert len(found.unique()) == 1 + COUNT


def test_a_code_comes_before_others_with_the_same_vector():
    codebook = torch.tensor([[0.0], [0.0], [0.0], [5.0]])
    found = nearest_others(torch.tensor([1, 2, 0, 3]), codebook, 2)
    assert found[:, 0].tolist() == [1, 2, 0, 3]
    assert {tuple(sorted(row.tolist())) for row in found[:3]} == {(0, 1, 2)}


@every_variant
def test_only_chosen_codes_are_replaced_and_by_the_chosen_neighbour(variant):
    quantizer = trained(variant).eval()
    q = quantizer(random(3, quantizer.code_dim, 3, 4))
    ranks = ranks_of(q.codes)
    assert 0.3 < (ranks > 0).float().mean() < 0.7
    replaced = quantizer.replace(q.codes[:2], Replacements(ranks, COUNT))
    near = quantizer.neighbours(q.codes[:2].movedim(1, -1).flatten(0, 2), COUNT).view(2, 3, 4, -1, 1 + COUNT)
    for index in torch.cartesian_prod(*map(torch.arange, ranks.shape)):
        b, level, y, x = index.tolist()
        assert replaced[b, level, y, x] == near[b, y, x, level, ranks[b, level, y, x]]
    assert torch.equal(replaced != q.codes[:2], ranks > 0)


@every_variant
def test_the_decoder_sees_replaced_vectors_and_z_gets_its_usual_gradient(variant):
    quantizer, alike = (trained(variant).eval() for _ in range(2))
    z, z_alike = (random(3, quantizer.code_dim, 3, 4).requires_grad_() for _ in range(2))
    gradient = random(3, quantizer.code_dim, 3, 4, seed=1)
    q = quantizer(z)
    ranks = ranks_of(q.codes)
    seen = quantizer.perturbed(q, Replacements(ranks, COUNT))
    vectors = quantizer.decode_codes(quantizer.replace(q.codes[:2], Replacements(ranks, COUNT)))
    kept = (ranks == 0).all(dim=1, keepdim=True).expand_as(vectors)
    assert torch.equal(seen[:2][~kept], vectors[~kept])
    assert torch.equal(seen[:2][kept], q.z_q[:2][kept])
    assert torch.equal(seen[2], q.z_q[2])
    assert not torch.equal(seen, q.z_q)
    seen.backward(gradient)
    alike(z_alike).z_q.backward(gradient)
    assert torch.equal(z.grad, z_alike.grad)
    for p, p_alike in zip(quantizer.parameters(), alike.parameters(), strict=True):
        assert (p.grad is None) == (p_alike.grad is None)
        assert p.grad is None or torch.equal(p.grad, p_alike.grad)


@every_variant
def test_no_image_may_have_replaced_codes(variant):
    """A pass of few images often has none: see draw_replacements."""
    quantizer = trained(variant).train()
    z = random(3, quantizer.code_dim, 3, 4).requires_grad_()
    q = quantizer(z)
    none = q.codes.new_zeros(0, *q.codes.shape[1:])
    seen = quantizer.perturbed(q, Replacements(none, COUNT))
    assert torch.equal(seen, q.z_q)
    seen.sum().backward()
    assert z.grad.abs().sum() > 0


def test_replacing_is_in_fp32_under_autocast():
    quantizer = trained("simvq").eval()
    q = quantizer(random(2, 4, 9))
    by = Replacements(ranks_of(q.codes), COUNT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.perturbed(q, by), quantizer.perturbed(q, by).float())
        under = quantizer.replace(q.codes, by)
    assert torch.equal(under, quantizer.replace(q.codes, by))


@pytest.mark.parametrize(
    ("options", "nearest", "said"),
    [
        ({"name": "ema", "codebook_size": 8}, 8, "nearest=8: a code has only 7 others; use that, or fewer"),
        ({"name": "lfq", "codebook_size": 2**19}, 8, "nearest=8: not for 524288 codes; 262144 are the most to search"),
        ({"name": "residual", "dropout": 0.5}, 8, "nearest=8: not with the quantizer's dropout=0.5: "),
        ({"name": "residual", "base": {"name": "ema", "codebook_size": 4}}, 4, "nearest=4: a code has only 3 others"),
    ],
)
def test_neighbours_that_do_not_exist_are_refused(options, nearest, said):
    with pytest.raises(InputError) as caught:
        build_quantizer(**options).check_nearest(nearest)
    assert str(caught.value).startswith(said)
