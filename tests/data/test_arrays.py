"""Images that are arrays: the built-in digits, IDX files and .npz."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import load, write_idx
from programs import SHARED, needs_shared

from vqgen.errors import InputError


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
    padded, padded_held_out = load("digits", image_size=32)
    train, val = load(SHARED / "mnist20k.npz", image_size=28)
    assert (len(train), len(val)) == (20000, 2000)
    everything = range(20000)
    assert torch.equal(padded.__getitems__(everything)[0][:, :, 2:-2, 2:-2], train.__getitems__(everything)[0])
    np.testing.assert_array_equal(padded.class_ids, train.class_ids)
    held_out = load(SHARED / "mnist20k.npz", image_size=32, resize="pad", background="black", cache_gb=0)[1]
    assert torch.equal(held_out.__getitems__(range(2000))[0], padded_held_out.__getitems__(range(2000))[0])


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
    assert train.class_names == ["0", "1", "4"]  # no class without an image
    colour = pixels[..., None] if num_channels is None else pixels[..., :-1] if num_channels in (2, 4) else pixels
    for part in (train, val):
        for i, name in enumerate(part.names):
            assert part.class_ids[i] == [0, 2, -1, 1, 1, 1][int(name)]
            assert part.read(i).shape == (train.channels, image_size, image_size)
            if image_size == 8:
                np.testing.assert_array_equal(part.read(i), colour[int(name)].transpose(2, 0, 1))


def test_npz_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.full(3, -1))
    train, _ = load(tmp_path / "a.npz")
    assert (train.class_names, set(train.class_ids)) == ([], {-1})


PIXELS = np.arange(20 * 64, dtype=np.uint8).reshape(20, 8, 8)
LABELS = np.arange(20) % 4


@pytest.mark.parametrize(
    ("arrays", "train", "held_out", "notes"),
    [
        ({"x_train": 12, "y_train": 12, "x_test": 8, "y_test": 8}, 12, 8, []),
        ({"train_images": 10, "train_labels": 10, "val_images": 6, "val_labels": 6, "test_images": 4, "test_labels": 4},
         10, 6, ["test images: 4 images of this part, not used"]),
        ({"train_data": 12, "train_targets": 12, "valid_data": 8, "valid_targets": 8}, 12, 8, []),
        ({"train": 12, "test": 8}, 12, 8, []),
        ({"arr_0": 20, "arr_1": 20}, 20, None, []),
        ({"X": 20, "Y": 20}, 20, None, []),
        ({"faces": 20, "labels": 20}, 20, None, []),
    ],
)  # fmt: skip
def test_names_of_arrays(tmp_path, arrays, train, held_out, notes):
    images = ("x_", "_images", "_data", "arr_0", "X", "faces", "train", "test")
    content = {}
    for name, count in arrays.items():
        is_labels = any(word in name for word in ("y_", "labels", "targets", "arr_1", "Y"))
        assert is_labels or any(word in name for word in images)
        content[name] = LABELS[:count, None] if is_labels else PIXELS[:count]
    np.savez(tmp_path / "a.npz", **content)
    part, other = load(tmp_path / "a.npz")
    assert len(part) + len(other) == train + (held_out or 0)
    assert held_out is None or len(other) == held_out
    assert bool(part.split) == (held_out is not None)
    assert part.class_names == ([] if len(arrays) == 2 and "train" in arrays else ["0", "1", "2", "3"])
    assert part.notes == notes
    assert [int(part.read(i)[0, 0, 0]) for i in range(3)] == [int(PIXELS[int(n), 0, 0]) for n in part.names[:3]]


def test_labels_that_are_one_hot_or_names_and_channels_that_come_first(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=colour.transpose(0, 3, 1, 2), labels=np.eye(4, dtype=int)[LABELS])
    train, held_out = load(tmp_path / "a.npz")
    assert train.notes == [
        "images (20, 3, 8, 8): taken as (N, C, H, W)", "labels (20, 4): taken as one-hot, one column for each class"
    ]  # fmt: skip
    for part in (train, held_out):
        for i, name in enumerate(part.names):
            np.testing.assert_array_equal(part.read(i), colour[int(name)].transpose(2, 0, 1))
            assert part.class_names[part.class_ids[i]] == str(LABELS[int(name)])
    names = np.array(["cat", "dog", "été", "10"])[LABELS]
    np.savez(tmp_path / "b.npz", images=colour, labels=names)
    assert load(tmp_path / "b.npz")[0].class_names == ["10", "cat", "dog", "été"]
    np.savez(tmp_path / "c.npz", images=colour, labels=LABELS.astype(float), ages=LABELS)
    train, _ = load(tmp_path / "c.npz")
    assert (train.class_names, train.notes) == (["0", "1", "2", "3"], ["ages (20,): not used"])


def test_npy_and_arrays_of_truth_values(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    train, held_out = load(tmp_path / "a.npy")
    assert (len(train) + len(held_out), train.class_names, train.channels) == (20, [], 1)
    np.save(tmp_path / "b.npy", PIXELS > 60)
    train, _ = load(tmp_path / "b.npy")
    np.testing.assert_array_equal(train.read(0)[0], (PIXELS[int(train.names[0])] > 60) * 255)


def test_arrays_of_more_than_8_bits_have_one_white_level(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS.astype(np.uint16) * 16)  # 12 bits, up to 4080
    train, _ = load(tmp_path / "a.npz")
    expected = np.rint(PIXELS.astype(float) * 16 / 4095 * 255)
    np.testing.assert_allclose(
        [train.read(i)[0] for i in range(5)], expected[[int(n) for n in train.names[:5]]], atol=1
    )
    assert "4095" in " ".join(train.notes)
    np.savez(tmp_path / "b.npz", images=np.stack([PIXELS / 255 * 1.05] * 3, -1))
    train, _ = load(tmp_path / "b.npz")
    expected = np.rint(np.clip(PIXELS / 255 * 1.05, 0, 1) * 255)
    np.testing.assert_allclose(
        [train.read(i)[0] for i in range(5)], expected[[int(n) for n in train.names[:5]]], atol=1
    )


def test_folders_of_arrays(tmp_path):
    def save(folder: str, **arrays) -> Path:
        (tmp_path / folder).mkdir()
        for name, array in arrays.items():
            np.save(tmp_path / folder / f"{name}.npy", array)
        return tmp_path / folder

    images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 2
    train, held_out = load(save("xy", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2]))
    assert (len(train), len(held_out), train.class_names) == (6, 2, ["0", "1"])
    train, _ = load(save("classes", bear=np.zeros((4, 64), np.uint8), cat=np.ones((5, 64), np.uint8)))
    assert train.class_names == ["bear", "cat"]
    assert "bear.npy ...: each of 2 files is taken for a class" in train.notes
    assert "bear (4, 64): taken as rows of 8 x 8 pixels" in train.notes
    with pytest.raises(InputError, match="have images of several sizes; give one of the files"):
        load(save("sizes", bear=np.zeros((4, 64), np.uint8), cat=np.ones((5, 100), np.uint8)))
    (tmp_path / "parts").mkdir()
    for part, count in (("train", 6), ("val", 2)):
        np.savez(tmp_path / "parts" / f"{part}.npz", images=images[:count], labels=labels[:count])
    train, held_out = load(tmp_path / "parts")
    assert (len(train), len(held_out), train.class_names) == (6, 2, ["0", "1"])
    np.savez(tmp_path / "parts" / "more.npz", images=images)
    np.savez(tmp_path / "parts" / "others.npz", images=images)
    with pytest.raises(InputError, match=r"others\.npz and another file both have an array images; give one of them"):
        load(tmp_path / "parts")


def test_names_of_classes_in_an_npz(tmp_path):
    names = np.array(["cat", "dog"])
    np.savez(tmp_path / "x.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.arange(6) % 2, class_names=names)
    train, _ = load(tmp_path / "x.npz")
    assert (train.class_names, train.notes) == (["cat", "dog"], [])


def test_idx_files_in_the_only_folder(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 2)):
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", np.zeros((count, 8, 8), np.uint8))
    train, held_out = load(tmp_path)
    assert (len(train), len(held_out)) == (6, 2)


def test_an_array_called_classes_that_has_a_name_for_each_image(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS, classes=np.array(["cat", "dog"] * 10))
    train, _ = load(tmp_path / "a.npz")
    assert train.class_names == ["cat", "dog"]
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=LABELS, classes=np.array(["cat", "dog", "fox", "owl"]))
    train, _ = load(tmp_path / "a.npz")
    assert (train.class_names, train.notes) == (["cat", "dog", "fox", "owl"], [])
