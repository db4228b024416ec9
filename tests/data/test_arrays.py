"""Images that are arrays: the built-in digits, IDX files and .npz."""

import numpy as np
import pytest
import torch
from data.files import load, write_idx
from programs import SHARED, needs_shared


def test_digits_are_built_in():
    train, val = load("digits", image_size=32, cache_gb=0)
    assert (len(train), len(val), train.channels) == (20000, 2000, 1)
    assert train.class_names == [str(digit) for digit in range(10)]
    assert train.in_memory  # an array of the right shape is never decoded
    pixels, class_ids = train.__getitems__([5, 0, 19999])
    assert pixels.shape == (3, 1, 32, 32)
    assert class_ids.tolist() == [train.class_ids[i] for i in (5, 0, 19999)]


@needs_shared
def test_digits_are_mnist_padded():
    padded, _ = load("digits", image_size=32)
    train, val = load(SHARED / "mnist20k.npz", image_size=28)
    assert (len(train), len(val)) == (20000, 2000)
    everything = range(20000)
    assert torch.equal(padded.__getitems__(everything)[0][:, :, 2:-2, 2:-2], train.__getitems__(everything)[0])
    np.testing.assert_array_equal(padded.class_ids, train.class_ids)
    held_out = load(SHARED / "mnist20k.npz", image_size=32, resize="pad", background="black")[1]
    assert torch.equal(
        held_out.__getitems__(range(2000))[0], load("digits", image_size=32)[1].__getitems__(range(2000))[0]
    )


@needs_shared
def test_idx_folder():
    train, val = load(SHARED / "fashion_mnist", image_size=28)
    assert (len(train), len(val), train.channels, len(train.class_names)) == (60000, 10000, 1, 10)
    assert np.bincount(train.class_ids).tolist() == [6000] * 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_zipped_or_not(tmp_path, suffix):
    pixels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", pixels)
    train, val = load(tmp_path)
    assert train.class_names == []
    assert len(train) + len(val) == 4
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.array([2, 0, 1, 2], np.uint8))
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", pixels[:1])
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.array([1], np.uint8))
    train, val = load(tmp_path)
    np.testing.assert_array_equal(np.stack([train.read(i)[0] for i in range(4)]), pixels)
    assert (train.class_ids.tolist(), val.class_ids.tolist()) == ([2, 0, 1, 2], [1])


@pytest.mark.parametrize("num_channels", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("image_size", [8, 16])
def test_npz_of_any_channels_with_and_without_resizing(tmp_path, num_channels, image_size):
    shape = (6, 8, 8) if num_channels is None else (6, 8, 8, num_channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if num_channels in (2, 4):
        pixels[..., -1] = 255  # opaque
    np.savez(tmp_path / "a.npz", images=pixels, class_ids=np.array([0, 4, -1, 1, 1, 1]))
    train, val = load(tmp_path / "a.npz", image_size=image_size)
    assert train.channels == (3 if num_channels in (3, 4) else 1)
    assert train.class_names == ["0", "1", "2", "3", "4"]
    colour = pixels[..., None] if num_channels is None else pixels[..., :-1] if num_channels in (2, 4) else pixels
    for part in (train, val):
        for i, name in enumerate(part.names):
            assert part.class_ids[i] == [0, 4, -1, 1, 1, 1][int(name)]
            assert part.read(i).shape == (train.channels, image_size, image_size)
            if image_size == 8:
                np.testing.assert_array_equal(part.read(i), colour[int(name)].transpose(2, 0, 1))


def test_npz_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.full(3, -1))
    train, _ = load(tmp_path / "a.npz")
    assert (train.class_names, set(train.class_ids)) == ([], {-1})
