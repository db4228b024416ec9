"""Latents scaled and turned, and codes replaced: what is drawn, and what the tokenizer makes of it."""

import collections

import numpy as np
import pytest
import torch

from vqgen.quantizers import Replacements
from vqgen.settings import EquivarianceConfig, PerturbConfig
from vqgen.tokenizers import Light
from vqgen.tokenizers.latents import ANNEALED, Transform, draw_ranks, draw_replacements, draw_transform

CPU = torch.device("cpu")


def images(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def small() -> Light:
    """A tokenizer of stride 4 whose codes differ; always the same."""
    torch.manual_seed(0)
    model = Light(channels=1, patch_size=2, widths=[8, 16], quantizer={"codebook_size": 16, "code_dim": 4})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_pixels_are_those_of_the_image_bit_for_bit(quarters, mirrored):
    x = images(size=8)[..., :4]  # (2, 1, 8, 4)
    turned = Transform(4, 2, quarters, mirrored)(x, stride=2)
    expected = x.numpy()
    for _ in range(quarters):
        expected = np.stack(
            [expected[..., i] for i in range(expected.shape[3] - 1, -1, -1)], axis=2
        )  # against the clock
    expected = expected[..., ::-1] if mirrored else expected
    assert np.array_equal(turned.numpy(), expected)


def test_a_latent_and_its_image_are_turned_and_scaled_alike():
    z = images(size=8)  # each position becomes 4 x 4 pixels of its value
    x = z.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for quarters in range(4):
        turn = Transform(8, 8, quarters, True)
        assert torch.equal(turn(x, stride=4), turn(z).repeat_interleave(4, 2).repeat_interleave(4, 3))
    ramp = torch.linspace(-1, 1, 64)[None, None, :, None].expand(1, 1, 64, 64)
    coarse = torch.nn.functional.avg_pool2d(ramp, 4)
    scale = Transform(8, 8, quarters=1)
    inner = scale(ramp, stride=4)[..., 4:-4]  # borders blur alike, but over other distances
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(inner, 4), scale(coarse)[..., 1:-1], rtol=0, atol=1e-2)
    assert scale(ramp[..., :32], stride=4).shape == (1, 1, 32, 32)


def test_transforms_are_drawn_as_often_and_as_widely_as_set():
    config = EquivarianceConfig(share=0.5, flip=True)
    drawn = [draw_transform(config, (8, 16), np.random.default_rng(i)) for i in range(2000)]
    made = [transform for transform in drawn if transform is not None]
    assert 0.46 < len(made) / len(drawn) < 0.54
    assert {(t.height, t.width) for t in made} == {(n, 2 * n) for n in range(2, 8)}
    assert {t.quarters for t in made} == {1, 2, 3}
    assert {t.mirrored for t in made} == {False, True}
    again = draw_transform(config, (8, 16), np.random.default_rng(7))
    assert again == drawn[7]
    still = EquivarianceConfig(share=1.0, scale=1.0)
    only_turned = {draw_transform(still, (4, 4), np.random.default_rng(i)) for i in range(50)}
    assert only_turned == {Transform(4, 4, quarters) for quarters in (1, 2, 3)}
    one = EquivarianceConfig(share=1.0, rotate=False)
    assert draw_transform(one, (1, 3), np.random.default_rng(0)) == Transform(1, 3)  # nothing is smaller than 1


def test_nothing_is_drawn_if_it_is_off():
    torch.manual_seed(0)
    assert draw_replacements(PerturbConfig(), 64, (1, 4, 4), 0.5, CPU) is None
    assert draw_transform(EquivarianceConfig(), (4, 4), np.random.default_rng(0)) is None
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(
    ("share", "level"), [(0.0, 1.0), (ANNEALED[0], 1.0), (0.4, 0.75), (ANNEALED[1], 0.5), (1.1, 0.5)]
)
def test_the_chosen_share_of_codes_gets_the_chosen_ranks_and_less_later(share, level):
    config = PerturbConfig(images=0.1, codes=0.8, nearest=20)
    torch.manual_seed(0)
    drawn = [draw_replacements(config, 16, (2, 8, 8), share, CPU) for _ in range(200)]
    sizes = collections.Counter(len(by.ranks) for by in drawn)
    assert set(sizes) == {1, 2}  # of 16 images, 1.6
    assert sizes[2] / 200 == pytest.approx(0.6, abs=0.1)
    ranks = torch.cat([by.ranks for by in drawn])
    assert ranks.shape[1:] == (2, 8, 8)
    assert (ranks > 0).float().mean().item() == pytest.approx(0.8 * level, abs=0.02)
    assert ranks.unique().tolist() == list(range(round(20 * level) + 1))
    counts = torch.bincount(ranks.flatten())[1:].float()
    assert (counts / counts.mean()).sub(1).abs().max() < 0.2  # all neighbours are as likely
    assert {by.nearest for by in drawn} == {20}


def test_ranks_of_a_share_of_zero_keep_every_code():
    assert not draw_ranks((3, 1, 4, 4), 0.0, 5).any()
    assert draw_ranks((3, 1, 4, 4), 1.0, 5).all()


def test_a_transform_lies_between_encoder_and_quantizer_and_replacements_before_the_decoder():
    model, x = small().train(), images(3)
    transform = Transform(3, 3, quarters=1)
    ranks = torch.arange(9).view(1, 1, 3, 3) % 4
    twin = small().train()
    z = transform(twin.to_code(twin.encoder(x)))
    q = twin.quantizer(z)
    z_q = q.z_q.clone()
    z_q[:1] = twin.quantizer.decode_codes(twin.quantizer.replace(q.codes[:1], Replacements(ranks, 3)))
    z_q[:1] = torch.where(ranks > 0, z_q[:1], q.z_q[:1])
    x_rec, (found,) = model(x, transform=transform, replacements=Replacements(ranks, 3))
    assert x_rec.shape == transform(x, model.stride).shape == (3, 1, 12, 12)
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.loss, q.loss)
    assert torch.equal(x_rec, twin.decoder(twin.from_code(z_q)))
    assert not torch.equal(z_q, q.z_q)


def test_replacements_compile_without_a_graph_break():
    model, compiled = small().train(), small().train()
    ranks = torch.arange(16).view(1, 1, 4, 4) % 4
    x_rec, _ = model(images(), replacements=Replacements(ranks, 3))
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(images(), replacements=Replacements(ranks, 3))[0], x_rec)
