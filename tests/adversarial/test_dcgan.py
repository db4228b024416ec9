"""The plain GAN's two networks: shapes, classes, batch normalisation."""

import pytest
import torch
from safetensors.torch import save_file

from vqgen.adversarial.dcgan import DCGANDiscriminator, DCGANGenerator, load_gan, settle_batch_norm
from vqgen.errors import InputError


@pytest.mark.parametrize(
    ("size", "channels", "classes"), [(8, 1, []), (32, 1, ["a", "b"]), (64, 3, ["a"]), (64, 3, [])]
)
def test_noise_to_images_to_logits(size, channels, classes):
    generator = DCGANGenerator(size, channels, classes, width=4)
    disc = DCGANDiscriminator(size, channels, len(classes), width=4)
    class_ids = torch.tensor([0, -1, 0]) if classes else torch.full((3,), -1)
    images = generator(torch.randn(3, 100), class_ids)
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1
    assert disc(images, class_ids).shape == (3,)


@pytest.mark.parametrize(("size", "first"), [([32, 48], (4, 6)), ([24, 8], (12, 4)), ([64, 80], (4, 5))])
def test_images_that_are_no_squares_begin_with_four_pixels_along_the_shorter_side(tmp_path, size, first):
    generator, disc = DCGANGenerator(size, 3, ["a"], width=4), DCGANDiscriminator(size, 3, 1, width=4)
    class_ids = torch.zeros(2, dtype=torch.int64)
    images = generator(torch.randn(2, 100), class_ids)
    assert images.shape == (2, 3, *size)
    assert disc(images, class_ids).shape == (2,)
    assert generator.first.kernel_size == disc.to_logit.kernel_size == first
    generator.eval().save_pretrained(tmp_path)
    z = torch.randn(2, 100)
    assert torch.equal(load_gan(tmp_path)(z, class_ids), generator(z, class_ids))


@pytest.mark.parametrize(
    ("size", "use"), [("[30,48]", "[16,48]"), ("[48,64]", "[32,64]"), ("[33,32]", "[32,32]"), ("[4,9]", "[8,8]")]
)
def test_other_shapes_are_refused_with_one_that_fits(size, use):
    for make in (DCGANGenerator, DCGANDiscriminator):
        with pytest.raises(InputError) as error:
            make(list(map(int, size[1:-1].split(","))), 1, [] if make is DCGANGenerator else 0)
        assert str(error.value).startswith(f"image_size={size} does not suit a DCGAN, whose shorter side is 8, 16, ")
        assert str(error.value).endswith(f"; use {use}")


def test_the_papers_sizes():
    generator = DCGANGenerator(64, 3, [], width=128)  # DCGAN, figure 1
    assert [layer.in_channels for layer in generator.layers] == [1024, 512, 256, 128]
    assert generator.first.in_channels == 100


@pytest.mark.parametrize(("size", "use"), [(48, "32 or 64"), (4, "8 or 16"), (2, "8 or 16"), (33, "32 or 64")])
def test_other_sizes_are_refused_with_those_that_fit(size, use):
    for make in (lambda: DCGANGenerator(size, 1, []), lambda: DCGANDiscriminator(size, 1, 0)):
        with pytest.raises(InputError, match=f"^image_size={size} .*; use {use}"):
            make()


def test_the_class_matters_once_its_rows_differ():
    torch.manual_seed(0)
    generator, disc = DCGANGenerator(8, 1, ["a", "b"], width=4).eval(), DCGANDiscriminator(8, 1, 2, width=4).eval()
    z, x = torch.randn(1, 100).expand(2, -1), torch.rand(1, 1, 8, 8).expand(2, -1, -1, -1)
    class_ids = torch.tensor([0, 1])
    assert torch.equal(*disc(x, class_ids))  # at first the class makes no difference
    with torch.no_grad():
        for table in (generator.norms[0].bias, disc.embedding):
            table.weight.normal_()
    assert not torch.allclose(*generator(z, class_ids))
    assert not torch.allclose(*disc(x, class_ids))


def test_settled_batch_norm_does_in_eval_mode_what_it_did_in_training():
    torch.manual_seed(0)
    generator = DCGANGenerator(16, 1, ["a", "b"], width=8)
    z, class_ids = torch.randn(512, 100), torch.arange(512) % 2
    with torch.no_grad():
        trained = generator.train()(z, class_ids)
        unsettled = (generator.eval()(z, class_ids) - trained).abs().mean()
        settle_batch_norm(generator, z, class_ids)
        settled = (generator(z, class_ids) - trained).abs().mean()
        once = generator(z, class_ids)
        settle_batch_norm(generator, z, class_ids)
    assert not generator.training
    assert settled < 0.1 * unsettled
    assert torch.equal(generator(z, class_ids), once)
    assert generator.norms[0].norm.momentum == 0.1


def test_both_compile_as_one_graph():
    generator, disc = DCGANGenerator(16, 1, ["a"], width=4), DCGANDiscriminator(16, 1, 1, width=4)
    class_ids = torch.zeros(4, dtype=torch.long)
    images = torch.compile(generator, fullgraph=True, backend="aot_eager")(torch.randn(4, 100), class_ids)
    torch.compile(disc, fullgraph=True, backend="aot_eager")(images, class_ids).sum().backward()
    assert all(p.grad is not None for p in generator.parameters())


def test_to_disk_and_back(tmp_path):
    torch.manual_seed(0)
    generator = DCGANGenerator(16, 1, ["a", "b"], latent_dim=7, width=4).eval()
    generator.save_pretrained(tmp_path / "g")
    again = load_gan(tmp_path / "g")
    assert again.class_names == ["a", "b"]
    z, class_ids = torch.randn(3, 7), torch.tensor([0, 1, -1])
    assert torch.equal(again(z, class_ids), generator(z, class_ids))
    save_file({"first.weight": torch.zeros(1)}, tmp_path / "g/model.safetensors")
    with pytest.raises(InputError, match="does not load as a generator"):
        load_gan(tmp_path / "g")
    with pytest.raises(InputError, match="does not load as a generator"):
        load_gan(tmp_path / "missing")
