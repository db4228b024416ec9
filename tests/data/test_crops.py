"""Crops: random ones against Pillow's, the same for any processes and passes; the versions in a token store."""

import itertools

import numpy as np
import pytest
import torch
from data.files import load
from PIL import Image

from vqgen.data import order
from vqgen.data.crops import Versions, random_crops
from vqgen.data.images import ImageSet
from vqgen.data.order import Place, image_batches
from vqgen.errors import InputError
from vqgen.settings import DataConfig


@pytest.fixture
def photos(tmp_path):
    """Twelve images of 40 x 24 pixels (width x height), all different, as random as noise."""
    random = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (24, 40, 3), np.uint8)).save(tmp_path / f"photos/{i:02}.png")
    return tmp_path / "photos"


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process take itself for one of several."""

    def become(rank: int, world_size: int) -> None:
        monkeypatch.setattr(order, "rank", lambda: rank)
        monkeypatch.setattr(order, "world_size", lambda: world_size)

    return become


# Random crops


def test_a_random_crop_is_what_pillow_makes_of_its_box():
    random = np.random.default_rng(0)
    planes = random.uniform(-0.5, 0.5, (2, 1, 24, 40)).astype(np.float32)
    draws = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.0, 0.5]])
    made = random_crops(torch.from_numpy(planes), draws, [0.6, 1.0])
    for plane, crop, (share, top, left) in zip(planes, made, ((0.6, 0.25, 1.0), (0.8, 0.0, 0.5)), strict=True):
        height, width = 24 * share, 40 * share
        x, y = left * (40 - width), top * (24 - height)
        image = Image.fromarray(plane[0]).resize((40, 24), Image.Resampling.BICUBIC, (x, y, x + width, y + height))
        np.testing.assert_allclose(crop[0].numpy(), np.asarray(image).clip(-1, 1), atol=1e-5)


def test_a_crop_of_share_one_is_the_image_itself():
    x = torch.rand(3, 3, 24, 40) * 2 - 1
    assert torch.equal(random_crops(x, torch.rand(3, 3), [1.0, 1.0]), x)


def test_crops_stay_in_the_range_of_images():
    x = torch.randint(0, 2, (16, 1, 16, 16)) * 2.0 - 1  # an interpolation between these would leave the range
    assert random_crops(x, torch.rand(16, 3), [0.7, 0.9]).abs().max() == 1


def batches(images: ImageSet, place: Place, count: int, **data) -> list[torch.Tensor]:
    """The images of so many passes from a place on."""
    stream = image_batches(images, place, data=DataConfig(workers=1, **data), device=torch.device("cpu"))
    return [x for x, _ in itertools.islice(stream, count)]


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_the_same_from_memory_and_from_workers_and_from_any_place_on(photos, flip):
    settings = {"augment": [0.5, 0.9], "flip": flip}
    stored, decoded = (load(photos, image_size=[16, 24], cache_gb=gb)[0] for gb in (1.0, 0.0))
    assert (stored.in_memory, decoded.in_memory) == (True, False)
    whole = batches(stored, Place(3, 4, 2, 0), 6, **settings)
    assert whole[0].shape == (4, 3, 16, 24)
    for a, b in zip(whole, batches(decoded, Place(3, 4, 2, 0), 6, **settings), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole[4:], batches(stored, Place(3, 4, 2, 4), 2, **settings), strict=True):
        assert torch.equal(a, b)
    plain, other_seed = (
        batches(stored, Place(seed, 4, 2, 0), 6, **settings | more) for seed, more in ((3, {"augment": None}), (4, {}))
    )
    assert not any(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other_seed, strict=True))


def test_crops_are_drawn_alike_however_many_processes_and_passes_share_a_step(as_rank):
    place, parts = Place(seed=1, micro_batch=12, accumulation=1, first=7), []
    whole = next(place.crops())
    for i, rank in itertools.product(range(3), range(2)):
        as_rank(rank, 2)
        parts.append(next(Place(seed=1, micro_batch=2, accumulation=3, first=21 + i).crops()))
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == (12, 3)
    assert len(whole.unique()) == 36
    as_rank(0, 1)
    assert not torch.equal(next(place._replace(first=8).crops()), whole)


@pytest.mark.parametrize("augment", [[0.5], [0.9, 0.5], [0.0, 1.0], [0.5, 1.1], [0.5, 0.6, 0.7]])
def test_shares_that_are_no_range_are_refused(augment):
    with pytest.raises(InputError, match=r"^data\.augment=.* \[0\.8,1\]"):
        DataConfig(augment=augment)


# Versions


def test_ten_versions_are_the_image_and_the_corners_of_a_larger_one_each_mirrored(photos):
    images = load(photos, image_size=[20, 30])[0]
    versions = Versions(images, 10, mirror=False)
    made = versions.read(4)
    assert (len(versions), made.shape) == (10, (10, 3, 20, 30))
    larger = load(photos, image_size=[22, 33])[0].read(4)
    expected = [images.read(4), larger[:, :20, :30], larger[:, :20, 3:], larger[:, 2:, :30], larger[:, 2:, 3:]]
    for number, image in enumerate(expected):
        assert np.array_equal(made[2 * number], image)
        assert np.array_equal(made[2 * number + 1], image[..., ::-1])
    assert np.array_equal(Versions(images, 5, mirror=False).read(4), made[::2])
    assert np.array_equal(Versions(images, 1, mirror=True).read(4), made[:2])
    assert np.array_equal(Versions(images, 1, mirror=False).read(4), made[:1])


def test_versions_are_those_of_the_images_that_load(photos):
    name = load(photos, cache_gb=0)[0].names[2]
    whole = Versions(load(photos)[0], 5, mirror=False)
    expected = whole.read(3)
    (photos / name).write_bytes(b"")
    in_memory = Versions(load(photos)[0], 5, mirror=False)  # which has dropped the third image
    assert np.array_equal(in_memory.read(2), expected)
    later = Versions(load(photos, cache_gb=0)[0], 5, mirror=False)
    assert later.read(2) is None
    assert np.array_equal(later.read(3), expected)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"crops": 2}, "for the image and its mirror image use data.flip=true"),
        ({"crops": 0}, "use 1, 5 or 10"),
        ({"crops": 20}, "use 1, 5 or 10"),
        ({"crops": 5, "flip": True}, "use data.crops=10 or data.flip=false"),
    ],
)
def test_other_numbers_of_crops_are_refused_with_what_to_use(settings, remedy):
    with pytest.raises(InputError, match=rf"^data\.crops={settings['crops']}: .*; {remedy}$"):
        DataConfig(**settings)
