"""Every kind of image and of source, read into known pixels; what is broken, and what the message says."""

import gzip
import hashlib
import io
import json
import logging
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ENVIRONMENT, ROOT, SHARED, needs_shared
from soak.hostile import make_hostile, make_valid
from torch.utils.data import DataLoader

from vqgen.data import folders as folders_module
from vqgen.data import images as images_module
from vqgen.data.folders import list_images, user_cache_folder
from vqgen.data.images import ImageSet, load_images, load_set, some_rows
from vqgen.data.skipped import SkippedFile, count_skipped, one_line, read_skipped
from vqgen.errors import InputError
from vqgen.settings import DataConfig

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\..*")  # as the loader has it, whose filter pytest sets aside

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, image: Image.Image | tuple | int = 0, **options) -> Path:
    """Saves an image, or an 8 x 8 one of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.new("L" if isinstance(image, int) else "RGB", (8, 8), image)
    image.save(path, **options)
    return path


def load(source, **settings) -> tuple[ImageSet, ImageSet]:
    return load_images(DataConfig(source=str(source), **{"image_size": 8, **settings}))


def read_one(path: Path, **settings) -> np.ndarray:
    """The pixels (C, H, W) of the image saved at a path in an otherwise empty folder."""
    save(path.parents[1] / "val" / "other.png")
    train, _ = load(path.parent, val_source=str(path.parents[1] / "val"), **settings)
    assert len(train) == 1
    pixels = train.read(0)
    assert pixels.dtype == np.uint8
    return pixels


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(colour, size=8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, tuple[int, bytes | None]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (colour, label) in samples.items():
            add_to_tar(tar, f"{key}.png", png(colour))
            add_to_tar(tar, f"{key}.json", b"{}")
            if label is not None:
                add_to_tar(tar, f"{key}.cls", label)


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">3sB{array.ndim}I", b"\0\0\x08", array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty grey images in two classes; image k of a class is of brightness k, plus 100 in the second."""
    for class_name, offset in (("cat", 0), ("dog", 100)):
        for k in range(10):
            save(tmp_path / "pets" / class_name / f"{k}.png", offset + k)
    return tmp_path / "pets"


# Kinds of image


def test_transparency_is_composited_on_the_background(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (0, 0, 255, 255)
    pixels[4:, 4:, 3] = 128
    path = save(tmp_path / "a" / "rgba.png", Image.fromarray(pixels))
    read = read_one(path, background="red")
    assert tuple(read[:, 0, 0]) == RED
    assert tuple(read[:, 0, 7]) == BLUE
    np.testing.assert_allclose(read[:, 7, 7], (127, 0, 128), atol=1)
    assert tuple(read_one(path)[:, 0, 0]) == (255, 255, 255)


def test_grey_with_alpha_stays_grey(tmp_path):
    pixels = np.full((8, 8, 2), (50, 255), np.uint8)
    pixels[0, 0, 1] = 0
    read = read_one(save(tmp_path / "a" / "la.png", Image.fromarray(pixels)))
    assert read.shape == (1, 8, 8)
    assert (read[0, 0, 0], read[0, 7, 7]) == (255, 50)


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette_with_a_transparent_entry(tmp_path, extension):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putpixel((0, 0), 0)
    image.putpixel((1, 0), 2)
    read = read_one(save(tmp_path / "a" / f"p.{extension}", image, transparency=0), background="#102030")
    assert [tuple(read[:, 0, x]) for x in range(3)] == [(0x10, 0x20, 0x30), BLUE, GREEN]


def test_palette_without_transparency(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*GREEN, *BLUE])
    assert tuple(read_one(save(tmp_path / "a" / "p.png", image))[:, 3, 3]) == GREEN


def test_one_bit(tmp_path):
    image = Image.new("1", (8, 8), 0)
    image.putpixel((2, 1), 1)
    read = read_one(save(tmp_path / "a" / "bit.png", image))
    assert read.shape == (1, 8, 8)
    assert read[0, 1, 2] == 255
    assert read.sum() == 255


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, extension):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    read = read_one(save(tmp_path / "a" / f"deep.{extension}", Image.fromarray(values)))
    np.testing.assert_array_equal(read[0], np.rint(values / 257))


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), 1),
        (np.linspace(0, 200, 64, dtype=np.float32), 255),
        (np.linspace(0, 60000, 64, dtype=np.float32), 65535),
        (np.linspace(0, 60000, 64, dtype=np.int32), 65535),
        (np.linspace(0, 1e6, 64, dtype=np.int32), 1e6),
    ],
)
def test_wide_grey_is_scaled_to_the_usual_white_above_it(tmp_path, values, white):
    read = read_one(save(tmp_path / "a" / "wide.tiff", Image.fromarray(values.reshape(8, 8))))
    np.testing.assert_allclose(read.ravel(), values / white * 255, atol=0.51)


def test_float_nan_is_black(tmp_path):
    values = np.full((8, 8), np.nan, np.float32)
    values[0, 0] = 1
    read = read_one(save(tmp_path / "a" / "nan.tiff", Image.fromarray(values)))
    assert (read[0, 0, 0], read[0, 1, 1]) == (255, 0)


def test_cmyk_jpeg(tmp_path):
    read = read_one(save(tmp_path / "a" / "print.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))
    np.testing.assert_allclose(read[:, 4, 4], RED, atol=3)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path, extension):
    image = Image.new("RGB", (8, 8), "blue")
    image.paste("red", (0, 0, 8, 4))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned a quarter clockwise: red on the right
    read = read_one(save(tmp_path / "a" / f"turned.{extension}", image, exif=exif, quality=100))
    assert (read[0, :, 7] > 200).all()
    assert (read[2, :, 0] > 200).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, RED)]
    for extension in ("gif", "webp"):
        path = save(tmp_path / extension / f"a.{extension}", frames[0], save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(read_one(path)[:, 4, 4], GREEN, atol=3)


@pytest.mark.parametrize("extension", ["png", "jpg", "JPEG", "webp", "bmp", "gif", "tif", "TIFF", "ppm", "pgm", "PbM"])
def test_every_extension_in_any_case(tmp_path, extension):
    image = Image.new("1" if extension == "PbM" else "L", (8, 8), 255)
    read = read_one(save(tmp_path / "a" / f"x.{extension}", image, format="PPM" if extension == "PbM" else None))
    np.testing.assert_allclose(read, 255, atol=1)


# Size


def test_crop_scales_the_short_side_and_takes_the_centre(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8))
    read = read_one(save(tmp_path / "a" / "wide.png", noise))
    expected = np.asarray(noise.resize((32, 8), Image.Resampling.BICUBIC))[:, 12:20]
    np.testing.assert_allclose(read.transpose(1, 2, 0), expected, atol=1)


def test_crop_scales_a_small_image_up(tmp_path):
    assert (read_one(save(tmp_path / "a" / "small.png", Image.new("L", (4, 6), 90))) == 90).all()


def test_pad_only_shrinks_and_centres(tmp_path):
    small = read_one(save(tmp_path / "a" / "s.png", Image.new("RGB", (4, 2), BLUE)), resize="pad", background="red")
    assert (small[:, 3:5, 2:6] == np.array(BLUE)[:, None, None]).all()
    assert (small[2] == 255).sum() == 8
    assert tuple(small[:, 0, 0]) == RED
    large = read_one(save(tmp_path / "b" / "l.png", Image.new("RGB", (64, 32), BLUE)), resize="pad", background="red")
    assert (large[:, 2:6] == np.array(BLUE)[:, None, None]).all()
    assert (large[2] == 255).sum() == 32
    thin = read_one(save(tmp_path / "c" / "t.png", Image.new("RGB", (1000, 1), BLUE)), resize="pad", background="red")
    assert (thin[2] == 255).sum() == 8


def test_pad_of_grey_images_takes_the_grey_of_the_background(tmp_path):
    read = read_one(save(tmp_path / "a" / "s.png", Image.new("L", (4, 4), 7)), resize="pad", background="#646464")
    assert (read[0, 0, 0], read[0, 4, 4]) == (100, 7)


# Channels


def test_channels_are_probed(folder):
    assert load(folder)[0].channels == 1
    save(folder / "cat" / "grey_as_rgb.png", (9, 9, 9))
    assert load(folder)[0].channels == 1
    (folder / "cat" / "broken.png").write_bytes(b"")
    assert load(folder)[0].channels == 1
    for k in range(10):
        save(folder / "cat" / f"colour{k}.png", (9, 9, 10))
    train, val = load(folder)
    assert train.channels == val.channels == 3
    assert train.read(0).shape == (3, 8, 8)


def test_channels_that_are_given_are_kept(folder, tmp_path):
    assert load(folder, channels=3)[0].read(0).shape == (3, 8, 8)
    colours = tmp_path / "colours"
    for k in range(3):
        save(colours / f"{k}.png", RED)
    read = load(colours, channels=1)[0].read(0)
    assert read.shape == (1, 8, 8)
    assert (read == 76).all()  # the luma of red


# Folders


def test_folder_classes_names_and_batches(folder):
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    (folder / "cat" / "notes.txt").write_text("no image")
    save(folder / "dog" / "deep" / "er" / "11.png", 111)
    save(folder / ".thumbnails" / "1.png")
    train, val = load(folder, val_fraction=0.3)
    assert train.class_names == val.class_names == ["cat", "dog"]
    assert train.class_ids.dtype == np.int64
    assert train.names == sorted(train.names)
    everything = dict(zip(train.names + val.names, [*train.class_ids, *val.class_ids], strict=True))
    assert len(everything) == len(train) + len(val) == 21
    assert everything["dog/deep/er/11.png"] == 1
    for part in (train, val):
        pixels, class_ids = part.__getitems__(range(len(part)))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (len(part), 1, 8, 8)
        assert torch.equal(class_ids, torch.from_numpy(part.class_ids))
        brightness = [
            int(Path(name).stem) + 100 * (class_id == 1) for name, class_id in zip(part.names, class_ids, strict=True)
        ]
        brightness = [111 if "deep" in name else b for name, b in zip(part.names, brightness, strict=True)]
        assert pixels[:, 0, 4, 4].tolist() == brightness


def test_folder_without_classes(tmp_path, caplog):
    for k in range(4):
        save(tmp_path / "flat" / f"{k}.png", k)
    train, val = load(tmp_path / "flat")
    assert train.class_names == []
    assert set(train.class_ids) == set(val.class_ids) == {-1}
    assert not caplog.records
    save(tmp_path / "flat" / "sub" / "x.png")
    assert load(tmp_path / "flat")[0].class_names == []
    assert "no classes" in caplog.messages[0]


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_given_split(tmp_path, held_out):
    for part, classes in (("train", "ab"), (held_out, "b")):
        for name in classes:
            save(tmp_path / part / name / f"{part}.png")
    train, val = load(tmp_path)
    assert train.names == ["train/a/train.png", "train/b/train.png"]
    assert val.names == [f"{held_out}/b/{held_out}.png"]
    assert val.class_names == train.class_names == ["a", "b"]
    assert val.class_ids.tolist() == [1]


def test_given_split_prefers_val_to_test_and_may_have_neither(tmp_path):
    for part in ("train", "test", "val"):
        save(tmp_path / "both" / part / "x.png")
    assert load(tmp_path / "both")[1].names == ["val/x.png"]
    for k in range(5):
        save(tmp_path / "only" / "train" / "a" / f"{k}.png")
    train, val = load(tmp_path / "only")
    assert (len(train) + len(val), train.class_names) == (5, ["a"])
    save(tmp_path / "only" / "other" / "x.png")  # then train is a class as any other
    assert load(tmp_path / "only")[0].class_names == ["other", "train"]


def test_names_in_any_script_load_and_order_is_that_of_the_names(tmp_path):
    names = ["猫/一.png", "кот/ёж.png", "gâteau/été.png", "emoji/🐱 a.PNG", "a/b.png", "a/B.png"]
    for name in names:
        save(tmp_path / "one" / name)
    for name in reversed(names):
        save(tmp_path / "two" / name)
    (one, one_val), (two, two_val) = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.names == sorted(one.names)
    assert one.names == two.names
    assert sorted(one.names + one_val.names) == sorted(names)
    assert (one.fingerprint, one_val.fingerprint) == (two.fingerprint, two_val.fingerprint)


@needs_shared
def test_emoji_folder():
    train, val = load(SHARED / "emoji64", image_size=64, cache_gb=0)
    assert len(train) + len(val) == 1911
    assert len(train.class_names) == 10
    assert train.channels == 3
    assert 50 < len(val) < 150
    assert tuple(train.read(0)[:, 0, 0]) == (255, 255, 255)


# Held-out images


def test_split_does_not_depend_on_the_other_images(tmp_path):
    root = tmp_path / "flat"
    for k in range(60):
        save(root / f"{k}.png")
    before = set(load(root, val_fraction=0.3)[1].names)
    assert 6 < len(before) < 30
    for k in range(60, 90):
        save(root / f"{k}.png")
    after = set(load(root, val_fraction=0.3)[1].names)
    assert {name for name in after if int(Path(name).stem) < 60} == before
    for k in range(0, 60, 2):
        (root / f"{k}.png").unlink()
    assert set(load(root, val_fraction=0.3)[1].names) == {name for name in after if (root / name).exists()}


@pytest.mark.parametrize("val_fraction", [0, 0.999999])
def test_split_leaves_one_image_on_each_side(tmp_path, val_fraction):
    for k in range(2):
        save(tmp_path / "flat" / f"{k}.png")
    train, val = load(tmp_path / "flat", val_fraction=val_fraction)
    assert (len(train), len(val)) == (1, 1)


def test_val_source_classes_are_matched_by_name(folder, tmp_path):
    save(tmp_path / "held" / "dog" / "x.png", 3)
    train, val = load(folder, val_source=str(tmp_path / "held"))
    assert len(train) == 20
    assert val.class_ids.tolist() == [1]
    assert val.class_names == ["cat", "dog"]
    save(tmp_path / "held" / "bird" / "y.png")
    with pytest.raises(InputError, match="'bird'"):
        load(folder, val_source=str(tmp_path / "held"))
    for k in range(2):
        save(tmp_path / "flat" / f"{k}.png")
    _, val = load(tmp_path / "flat", val_source=str(tmp_path / "held"))
    assert (val.class_names, set(val.class_ids)) == ([], {-1})


def test_val_source_with_a_test_part_gives_that_part():
    _, val = load("digits", val_source="digits", image_size=32)
    assert len(val) == 2000


# Arrays


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


# Tar shards


def test_tar_shards(tmp_path):
    write_shard(tmp_path / "train-08.tar", {"a/00": (8, b"1\n"), "a/01": (9, b"0")})
    write_shard(tmp_path / "train-09.tar", {"00": (10, b"2"), "./01": (11, None)})
    write_shard(tmp_path / "train-10.tar", {"00": (12, b"0")})
    write_shard(tmp_path / "test.tar", {"00": (50, b"1")})
    test = str(tmp_path / "test.tar")
    train, val = load(tmp_path / "train-{08..10}.tar", val_source=test)
    assert train.names == [
        f"train-{key}" for key in ("08.tar/a/00", "08.tar/a/01", "09.tar/00", "09.tar/01", "10.tar/00")
    ]
    assert train.class_ids.tolist() == [1, 0, 2, -1, 0]
    assert train.class_names == ["0", "1", "2"]
    assert [train.read(i)[0, 0, 0] for i in range(5)] == [8, 9, 10, 11, 12]
    assert (val.names, val.class_ids.tolist()) == (["test.tar/00"], [1])
    for pattern in (
        "train-*.tar",
        "train-{08,09,10}.tar",
        "tr{a}in-{0,1}[890].tar",
        "{train-08,train-09,train-10}.tar",
    ):
        assert load(tmp_path / pattern, val_source=test)[0].names == train.names

    (tmp_path / "classes.json").write_text(json.dumps(["chat", "chien", "été"]))
    train, val = load(tmp_path / "train-*.tar", val_source=test)
    assert train.class_names == val.class_names == ["chat", "chien", "été"]
    (tmp_path / "train-09.tar").unlink()
    with pytest.raises(InputError, match=r"no shard .*train-09\.tar; "):
        load(tmp_path / "train-{08..10}.tar")


def test_tar_samples_end_at_the_first_dot_of_the_name(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key in ("v1.0/0", "v1.0/1"):
            add_to_tar(tar, f"{key}.mask.png", png(1))
            add_to_tar(tar, f"{key}.PNG", png(2))
            add_to_tar(tar, f"{key}.cls", b"0")
        add_to_tar(tar, "only.cls", b"7")
    train, val = load(tmp_path / "x.tar")
    assert sorted(train.names + val.names) == ["x.tar/v1.0/0", "x.tar/v1.0/1"]
    assert train.read(0)[0, 0, 0] == 2


@needs_shared
def test_cifar_shards():
    train, val = load(
        SHARED / "cifar10" / "train-{00000..00001}.tar",
        val_source=str(SHARED / "cifar10" / "test-*.tar"),
        image_size=32,
        cache_gb=0,
    )
    assert (len(train), len(val), train.channels) == (4000, 3000, 3)
    assert train.class_names[0] == "airplane"
    with tarfile.open(SHARED / "cifar10" / "train-00001.tar") as tar:
        key = train.names[3999].partition("/")[2]
        expected = np.asarray(Image.open(tar.extractfile(f"{key}.jpg")).convert("RGB"))
        assert int(tar.extractfile(f"{key}.cls").read()) == train.class_ids[3999]
    np.testing.assert_array_equal(train.read(3999).transpose(1, 2, 0), expected)


# In memory or not


def identity(batch):
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_and_in_memory_agree_and_serve_a_data_loader(folder, workers):
    (cached, _), (lazy, _) = load(folder), load(folder, cache_gb=0)
    assert cached.in_memory
    assert not lazy.in_memory
    assert pickle.loads(pickle.dumps(lazy)).names == lazy.names  # for workers that are spawned
    batches = []
    for images in (cached, lazy):
        loader = DataLoader(images, batch_size=7, collate_fn=identity, num_workers=workers if images is lazy else 0)
        batches.append(list(loader))
    for (x, class_ids), (lazy_x, lazy_class_ids) in zip(*batches, strict=True):
        assert torch.equal(x, lazy_x)
        assert torch.equal(class_ids, lazy_class_ids)
        assert lazy_x.is_contiguous()
    assert torch.equal(cached[[1, 2]][0], lazy[np.array([1, 2])][0])


def test_cache_is_used_up_to_its_size(folder, tmp_path):
    save(tmp_path / "held" / "cat" / "x.png")
    num_bytes = 20 * 8 * 8
    assert load(folder, val_source=str(tmp_path / "held"), cache_gb=num_bytes / 2**30)[0].in_memory
    assert not load(folder, val_source=str(tmp_path / "held"), cache_gb=(num_bytes - 1) / 2**30)[0].in_memory


# Broken images


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """The folder with cat/3 cut short, cat/4 empty and dog/0 a dead link; all of it is for training."""
    (folder / "cat" / "3.png").write_bytes((folder / "cat" / "3.png").read_bytes()[:-30])
    (folder / "cat" / "4.png").write_bytes(b"")
    (folder / "dog" / "0.png").unlink()
    (folder / "dog" / "0.png").symlink_to(folder / "nowhere.png")
    save(tmp_path / "held" / "cat" / "x.png")
    return folder


def test_broken_images_are_dropped_in_memory(damaged, tmp_path, caplog):
    train, _ = load(damaged, val_source=str(tmp_path / "held"))
    assert len(train) == len(train.names) == len(train.class_ids) == 17
    assert not {"cat/3.png", "cat/4.png", "dog/0.png"} & set(train.names)
    brightness = [int(Path(name).stem) + 100 * name.startswith("dog") for name in train.names]
    assert train.__getitems__(range(17))[0][:, 0, 0, 0].tolist() == brightness
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("skipped 3 images that do not load, first: cat/3.png (")
    assert caplog.records[0].levelno == logging.WARNING


def test_broken_images_are_replaced_by_the_next_where_lazy(damaged, tmp_path, caplog):
    train, _ = load(damaged, val_source=str(tmp_path / "held"), cache_gb=0)
    assert len(train) == 20
    assert train.read(3) is None
    assert train.read(4) is None
    assert train.read(5)[0, 0, 0] == 5
    pixels, class_ids = train.__getitems__([2, 3, 4, 10])
    assert pixels[:, 0, 0, 0].tolist() == [2, 5, 5, 101]
    assert class_ids.tolist() == [0, 0, 0, 1]
    assert len(caplog.messages) == 1
    assert "first: cat/3.png (" in caplog.messages[0]
    (damaged / "dog" / "9.png").write_bytes(b"no image")
    assert train.__getitems__([19])[0][0, 0, 0, 0] == 0  # goes round


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_broken_images_raise_if_asked_to(damaged, tmp_path, cache_gb):
    with pytest.raises(InputError, match=r"^an image does not load: cat/3\.png \([^\n]*data\.on_error=skip$"):
        load(damaged, val_source=str(tmp_path / "held"), on_error="raise", cache_gb=cache_gb)[0].__getitems__(range(20))


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty, or no image"), (b"%!PS-Adobe", "empty, or no image")])
def test_reason_is_short(damaged, tmp_path, caplog, content, reason):
    (damaged / "cat" / "0.png").write_bytes(content)
    load(damaged, val_source=str(tmp_path / "held"))
    assert caplog.messages == [f"skipped 4 images that do not load, first: cat/0.png ({reason})"]


@pytest.mark.parametrize(
    "settings", [{}, {"channels": 1}, {"channels": 3, "on_error": "raise"}, {"channels": 1, "cache_gb": 0}]
)
def test_no_image_loads(tmp_path, settings):
    for k in range(3):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{k}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"does not load|none of . images loads"):
        load(tmp_path / "flat", **settings)[0].__getitems__([0])


def test_every_kind_of_damage_is_skipped(tmp_path, caplog):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for extension in ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "avif"):
        whole = save(
            tmp_path / "whole" / f"x.{extension}", noise, **({} if extension == "ppm" else {"exif": exif})
        ).read_bytes()
        for k in range(40):
            content = bytearray(whole[: rng.integers(len(whole)) if k % 4 == 0 else None])
            for at in rng.integers(0, max(1, min(len(content), (40, 200, 10**6)[k % 3])), 4):
                content[at : at + 1] = [rng.integers(256)]
            (tmp_path / "damaged").mkdir(exist_ok=True)
            (tmp_path / "damaged" / f"{k}.{extension}").write_bytes(content)
    train, val = load(tmp_path / "damaged", channels=3)
    assert 0 < len(train) + len(val) < 320
    assert all(message.startswith("skipped ") for message in caplog.messages)


def test_damage_to_the_exif_is_none_to_the_image(tmp_path):
    image = Image.new("RGB", (8, 8), GREEN)
    for k, exif in enumerate(
        (b"Exif\0\0", b"Exif\0\0XX*\0\1", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\4\0\0\0\xff")
    ):
        read = read_one(save(tmp_path / str(k) / "a" / "x.jpg", image, exif=exif, quality=100))
        np.testing.assert_allclose(read[:, 4, 4], GREEN, atol=3)


def test_channels_are_those_of_what_loads_where_the_sample_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "PROBED_IMAGES", 2)
    for k in range(1, 4):
        save(tmp_path / "x" / f"{k}.png", RED)
    for k in (0, 4):
        (tmp_path / "x" / f"{k}.png").write_bytes(b"")
    save(tmp_path / "held" / "x.png")
    train, _ = load(tmp_path / "x", val_source=str(tmp_path / "held"))
    assert (len(train), train.channels) == (3, 3)


# Images from strangers


@pytest.mark.parametrize("cache_gb", [1, 0])
def test_each_hostile_file_is_counted_and_named_and_each_odd_one_loads(tmp_path, cache_gb):
    root, report = tmp_path / "strangers", tmp_path / "skipped.txt"
    valid, hostile = make_valid(root, 80, seed=0), make_hostile(root, 120, seed=0)
    for _ in range(2):  # the second time as a run that goes on does it
        train, val = load(root, cache_gb=cache_gb, image_size=16, channels=3)
        assert int(train.fingerprint, 16) != int(val.fingerprint, 16)
        for part in (train, val):
            part.report_skipped(report)
            if cache_gb == 0:
                for _ in DataLoader(part, batch_size=5, collate_fn=identity, num_workers=2):
                    pass
            else:
                assert {*part.names} <= {*valid}
        reasons = read_skipped(report)
        assert reasons.keys() == {one_line(name) for name in hostile}
        assert all(reasons.values())
        assert count_skipped(report) == len(hostile)
    assert len(train) + len(val) == (len(valid) if cache_gb else len(valid) + len(hostile))


def test_hostile_files_put_nothing_but_one_line_on_the_screen(tmp_path):
    make_valid(tmp_path / "x", 40, seed=1)
    make_hostile(tmp_path / "x", 80, seed=1)
    save(tmp_path / "held" / "x.png")
    code = f"""
from vqgen.settings import DataConfig
from vqgen.data.images import load_images
load_images(DataConfig(source={str(tmp_path / "x")!r}, val_source={str(tmp_path / "held")!r}, image_size=16))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("skipped 80 images that do not load, first: ")
    assert done.stderr.count("\n") == 1


def test_a_hostile_file_raises_one_line_if_asked_to(tmp_path):
    for i, name in enumerate(make_hostile(tmp_path / "x", 60, seed=2)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / "x" / name).rename(tmp_path / str(i) / name)
        save(tmp_path / str(i) / "other.png")
        parts = load(tmp_path / str(i), on_error="raise", cache_gb=0, channels=3)
        (part,) = (part for part in parts if part.names == [name])
        with pytest.raises(InputError, match=r"^an image does not load: .*data\.on_error=skip$") as error:
            part.read(0)
        assert len(str(error.value).splitlines()) == 1


def test_a_pipe_with_an_image_s_name_is_never_waited_for(folder):
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "dog" / "zero.png").symlink_to("/dev/zero")
    with (folder / "dog" / "vast.png").open("wb") as file:
        file.truncate(1 << 41)
    train, val = load(folder, val_fraction=0.3)
    assert len(train) + len(val) == 20
    assert sorted((train._broken | val._broken).values()) == [
        "2,048.0 GiB, which is too large for an image", "a pipe, a socket or a device", "a pipe, a socket or a device"
    ]  # fmt: skip
    assert train.fingerprint != val.fingerprint


def test_names_that_are_no_text_or_more_than_one_line(tmp_path, caplog):
    names = [os.fsdecode(b"caf\xe9/\xff.png"), "two\nlines/a\tb.png", "back\\slash/x.png", "猫/一.png"]
    for name in names:
        save(tmp_path / "x" / name, RED)
        save(tmp_path / "x" / name.replace(".png", ".jpg")).write_bytes(b"")
    save(tmp_path / "held" / "猫" / "x.png")
    train, val = load(tmp_path / "x", val_source=str(tmp_path / "held"))
    assert train.names == sorted(names)
    assert train.class_names == ["back\\slash", "caf\\udce9", "two\nlines", "猫"]
    json.dumps(train.class_names, ensure_ascii=False).encode()
    assert train.fingerprint != val.fingerprint
    train.report_skipped(tmp_path / "skipped.txt")
    written = read_skipped(tmp_path / "skipped.txt")
    assert written.keys() == {
        r"caf\udce9/\udcff.jpg", r"two\nlines/a\tb.jpg", r"back\\slash/x.jpg", "猫/一.jpg"
    }  # fmt: skip
    had_back = [name.encode("latin-1", "backslashreplace").decode("unicode_escape") for name in written]
    assert sorted(had_back) == sorted(name.replace(".png", ".jpg") for name in names)
    assert all("\n" not in message and message.isprintable() for message in caplog.messages)


def test_skipped_images_of_another_source_are_told_apart(damaged, tmp_path):
    (tmp_path / "held" / "cat" / "3.png").write_bytes(b"")
    for part in load(damaged, val_source=str(tmp_path / "held")):
        part.report_skipped(tmp_path / "skipped.txt")
    names = read_skipped(tmp_path / "skipped.txt").keys()
    assert names == {"cat/3.png", "cat/4.png", "dog/0.png", f"{tmp_path}/held/cat/3.png"}


def test_a_list_of_skipped_images_that_cannot_be_written_ends_a_run_only_at_its_start(damaged, tmp_path):
    settings = {"val_source": str(tmp_path / "held")}
    (tmp_path / "file").touch()
    train, _ = load(damaged, **settings)
    with pytest.raises(InputError, match=r"/file/skipped\.txt cannot be written \(Not a directory\)"):
        train.report_skipped(tmp_path / "file" / "skipped.txt")
    train, _ = load(damaged, **settings, cache_gb=0)
    train.report_skipped(tmp_path / "gone" / "skipped.txt")
    assert train.__getitems__([3])[0][0, 0, 0, 0] == 5
    assert count_skipped(tmp_path / "gone" / "skipped.txt") == 0


def test_processes_and_threads_that_skip_the_same_images_name_each_once(tmp_path):
    path = tmp_path / "skipped.txt"
    code = f"""
from pathlib import Path
from vqgen.data.skipped import SkippedFile
mine = SkippedFile(Path({str(path)!r}))
for i in range(300):
    mine.add({{f"{{i}}.png": "empty"}})
"""
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT) for _ in range(2)]
    ours = SkippedFile(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: ours.add({f"{i % 300}.png": "empty"}), range(900)))
    assert [process.wait() for process in running] == [0, 0]
    assert count_skipped(path) == len(read_skipped(path)) == 300


# Large images


def test_large_images_are_in_memory_one_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(images_module, "LARGE_PIXELS", 100)
    save(folder / "cat" / "large.png", Image.new("L", (11, 10)))
    train, _ = load(folder, channels=1, cache_gb=0, val_fraction=0)
    large, small = train.names.index("cat/large.png"), train.names.index("cat/0.png")
    with ThreadPoolExecutor(2) as pool:
        with images_module._one_large:  # as by the thread that has another one
            assert pool.submit(train.read, small).result(60) is not None
            waiting = pool.submit(train.read, large)
            with pytest.raises(StillWaiting):
                waiting.result(0.2)
        assert waiting.result(60) is not None


def test_an_image_in_strips_is_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = {
        "rgba.png": rng.integers(0, 256, (31, 20, 4), np.uint8),
        "la.png": rng.integers(0, 256, (31, 20, 2), np.uint8),
        "deep.png": rng.integers(0, 65536, (31, 20), np.uint16),
        "float.tif": np.where(np.eye(31, 20), np.nan, rng.random((31, 20), np.float32) * 1000),
        "int.tif": rng.integers(-10, 1 << 20, (31, 20), np.int32),
    }
    for name, pixels in images.items():
        save(tmp_path / "x" / name, Image.fromarray(pixels.astype(np.float32) if name == "float.tif" else pixels))
    palette = Image.fromarray(rng.integers(0, 256, (31, 20, 3), np.uint8)).quantize(16)
    save(tmp_path / "x" / "palette.png", palette, transparency=3)
    read = []
    for strip_pixels in (1 << 20, 50):
        monkeypatch.setattr(images_module, "STRIP_PIXELS", strip_pixels)
        train, _ = load(tmp_path / "x", val_source="digits", channels=3, background="#306090")
        assert len(train) == 6
        read.append(train.__getitems__(range(6))[0])
        assert load(tmp_path / "x", val_source="digits")[0].channels == 3
    assert torch.equal(*read)


def test_a_very_wide_image_takes_no_minutes(tmp_path):
    wide = tmp_path / "a" / "wide.pgm"
    wide.parent.mkdir()
    wide.write_bytes(b"P5\n60000000 1\n255\n" + bytes(60_000_000))
    start = time.monotonic()
    assert read_one(wide).max() == 0
    assert time.monotonic() - start < 10


# Listing


def test_links_to_folders_are_followed_but_no_folder_is_entered_below_itself(tmp_path):
    root = tmp_path / "x"
    save(root / "cat" / "1.png")
    save(tmp_path / "elsewhere" / "2.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "up").symlink_to("..")
    (root / "cat" / "itself").symlink_to(".")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "loop").symlink_to("loop")
    (root / "one").symlink_to("other")
    (root / "other").symlink_to("one")
    (root / "folder.png").mkdir()
    save(root / "folder.png" / "3.png")
    assert list_images(root) == ["cat/1.png", "dog/2.png", "folder.png/3.png"]


def test_links_that_lead_to_a_folder_in_ever_more_ways_come_to_an_end(tmp_path, caplog):
    for level in range(40):  # 2 to the power of 40 paths to the last
        save(tmp_path / f"{level}" / "x.png")
        for name in "ab" if level < 39 else "":
            (tmp_path / f"{level}" / name).symlink_to(f"../{level + 1}")
    names = list_images(tmp_path / "0")
    assert len(names) == 1 + 2 + 4 + 8 + 36 * folders_module.MAX_VISITS
    assert names == list_images(tmp_path / "0")
    assert all("is linked to more than 16 times" in message for message in caplog.messages)


def test_a_folder_that_cannot_be_listed_is_named_and_left_out(tmp_path, caplog):
    save(tmp_path / "x" / "a.png")
    at = os.open(tmp_path / "x", os.O_RDONLY)
    for _ in range(20):  # a path of more than 4096 bytes, which no process can name at once
        os.mkdir("d" * 250, dir_fd=at)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    assert list_images(tmp_path / "x") == ["a.png"]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"skipping a folder that cannot be listed: {'d' * 250}/")
    assert caplog.messages[0].endswith("(File name too long)")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """A folder of images in two folders, nothing in it new, so large that its listing is kept."""
    monkeypatch.setattr(folders_module, "KEPT_FROM", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a/0", "a/1", "b/2", "3"):
        save(tmp_path / "x" / f"{name}.png")
    settle(tmp_path / "x")
    return tmp_path / "x"


def settle(root: Path) -> None:
    """Makes as if nothing had changed for ten seconds."""
    for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(path, ns=(0, time.time_ns() - 10**10))


def listings() -> list[Path]:
    return sorted((user_cache_folder() / "listings").glob("*"))


def test_the_listing_of_a_large_folder_is_kept(kept):
    names = ["3.png", "a/0.png", "a/1.png", "b/2.png"]
    assert list_images(kept) == names
    (path,) = listings()
    content = path.read_bytes().partition(b"\n")[2].replace(b"b/2.png", b"b/9.png")
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    kept.parent.joinpath("link").symlink_to(kept)
    assert list_images(kept.parent / "link") == [*names[:3], "b/9.png"]  # so this is where it comes from

    for damage in (content, content[:-9], b"", b"\xff\n\xff", path.read_bytes().replace(b"9", b"8")):
        path.write_bytes(damage)
        assert list_images(kept) == names
    save(kept / "b" / "4.png")
    assert list_images(kept) == [*names, "b/4.png"]
    (kept / "a" / "0.png").rename(kept / "a" / "5.png")
    assert list_images(kept) == ["3.png", "a/1.png", "a/5.png", "b/2.png", "b/4.png"]


def test_a_listing_that_may_not_last_is_not_kept(kept, monkeypatch):
    save(kept / "b" / "new.png")
    list_images(kept)
    assert listings() == []
    settle(kept)
    (kept / "a" / "later").symlink_to(kept.parent / "later")
    settle(kept)
    list_images(kept)
    assert listings() == []
    save(kept.parent / "later" / "6.png")
    assert "a/later/6.png" in list_images(kept)
    settle(kept)
    settle(kept.parent / "later")
    list_images(kept)
    assert len(listings()) == 1


def test_a_cache_that_cannot_be_written_does_not_matter(kept, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("in its place")
    assert len(list_images(kept)) == 4
    assert len(list_images(kept)) == 4


def test_ten_thousand_files_are_listed_in_seconds_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save(tmp_path / "0.png")
    (tmp_path / "x").mkdir()
    for k in range(10_000):
        os.link(tmp_path / "0.png", tmp_path / "x" / f"{k}.png")
    settle(tmp_path / "x")
    start = time.monotonic()
    train, val = load(tmp_path / "x", cache_gb=0)
    assert time.monotonic() - start < 5
    assert len(train) + len(val) == 10_000
    assert len(listings()) == 1


# Fingerprint


def rewrite(path: Path, at: int) -> None:
    """Changes one byte, and neither the size nor the time of modification."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_fingerprint_follows_content_names_and_classes(folder):
    def fingerprints(**settings):
        return [part.fingerprint for part in load(folder, **settings)]

    before = fingerprints()
    assert before == fingerprints()
    assert before[0] != before[1]
    int(before[0], 16)
    for settings in ({"image_size": 16}, {"resize": "pad"}, {"background": "red"}, {"cache_gb": 0}, {"channels": 3}):
        assert fingerprints(**settings) == before

    rewrite(folder / "cat" / "3.png", -20)
    one_byte = fingerprints()
    assert one_byte[0] != before[0]
    (folder / "cat").rename(folder / "bat")
    renamed = fingerprints()
    assert renamed[0] != one_byte[0]
    save(folder / "bat" / "new.png")
    assert fingerprints()[0] != renamed[0]


def test_fingerprint_is_of_the_images_that_load_or_not(damaged, tmp_path):
    settings = {"val_source": str(tmp_path / "held")}
    assert load(damaged, **settings)[0].fingerprint == load(damaged, **settings, cache_gb=0)[0].fingerprint


def test_fingerprint_of_large_files_is_of_size_and_time(folder, monkeypatch):
    monkeypatch.setattr(images_module, "HASHED_BYTES", 100)
    before = load(folder)[0].fingerprint
    rewrite(folder / "cat" / "3.png", -20)
    assert load(folder)[0].fingerprint == before
    os.utime(folder / "cat" / "3.png", ns=(0, 0))
    assert load(folder)[0].fingerprint != before


def test_fingerprint_of_arrays_and_shards(tmp_path):
    pixels = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    before = load(tmp_path / "a.npz")[0].fingerprint
    stat = (tmp_path / "a.npz").stat()
    pixels[3, 7, 7] = 1
    np.savez(tmp_path / "a.npz", images=pixels)
    os.utime(tmp_path / "a.npz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (tmp_path / "a.npz").stat().st_size == stat.st_size
    assert load(tmp_path / "a.npz")[0].fingerprint != before

    write_shard(tmp_path / "a.tar", {str(k): (k, b"0") for k in range(4)})
    before = load(tmp_path / "a.tar")[0].fingerprint
    rewrite(tmp_path / "a.tar", (tmp_path / "a.tar").read_bytes().index(b"{}"))
    assert load(tmp_path / "a.tar")[0].fingerprint != before


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "stretch"}, "data.resize=stretch is not known; use crop or pad"),
        ({"on_error": "ignore"}, "data.on_error=ignore is not known; use skip or raise"),
        ({"channels": 4}, "data.channels=4 is not known; use 1 or 3 or null"),
        ({"background": "blu"}, "data.background=blu is not a colour; use a name or #rrggbb"),
        ({"image_size": 0}, "data.image_size=0 is no number of pixels; use 32, for example"),
        ({"image_size": 10**6}, "data.image_size=1000000: must be at most 32768"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0 is not from 0 to below 1; use 0.05, for example"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        load("digits", **settings)
    assert str(error.value) == message


def wrong_sources(root: Path) -> dict[str, str]:
    """Sources that cannot be used, and a pattern in what is said of each."""
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").touch()
    (root / "shards").mkdir()
    (root / "shards" / "a.tar").touch()
    save(root / "single" / "a.png")
    (root / "film.mp4").touch()
    (root / "text.npz").write_text("text")
    (root / "zero.npz").touch()
    np.save(root / "plain.npy", np.zeros(3))
    (root / "plain.npy").rename(root / "plain.npz")
    np.savez(root / "names.npz", pictures=np.zeros((3, 8, 8), np.uint8))
    np.savez(root / "objects.npz", images=np.array([None, {}]))
    np.savez(root / "floats.npz", images=np.zeros((3, 8, 8)))
    np.savez(root / "first.npz", images=np.zeros((9, 3, 8, 8), np.uint8))
    np.savez(root / "none.npz", images=np.zeros((0, 8, 8), np.uint8))
    np.savez(root / "scalar.npz", images=np.uint8(3))
    np.savez(root / "few.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(2, int))
    np.savez(root / "half.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(3))
    np.savez(root / "vast.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 1, 1 << 40]))
    np.savez(root / "below.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.full(3, -2))
    (root / "cut.npz").write_bytes((root / "few.npz").read_bytes()[:300])
    for name, content in (("cut", b"\0\0\x08\3\0\0\0\1"), ("floats", b"\0\0\x0d\1\0\0\0\0"), ("no", b"")):
        (root / f"idx_{name}").mkdir()
        (root / f"idx_{name}" / "train-images-idx3-ubyte").write_bytes(content)
    (root / "idx_zip").mkdir()
    (root / "idx_zip" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(1000))[:-9])
    (root / "text.tar").write_text("text " * 300)
    write_shard(root / "whole.tar", {"0": (0, b"0"), "1": (1, b"0")})
    (root / "cut.tar").write_bytes((root / "whole.tar").read_bytes()[:600])
    (root / "zipped.tar.gz").write_bytes(gzip.compress((root / "whole.tar").read_bytes()))
    (root / "zipped.tar").write_bytes(gzip.compress((root / "whole.tar").read_bytes()))
    write_shard(root / "label.tar", {"0": (0, b"cat"), "1": (1, b"0")})
    write_shard(root / "vast.tar", {"0": (0, b"1099511627776"), "1": (1, b"0")})
    with tarfile.open(root / "bare.tar", "w") as tar:
        add_to_tar(tar, "0.txt", b"")
    for name, content in (("text", "cat, dog"), ("dict", "{}"), ("few", "[]")):
        (root / f"json_{name}").mkdir()
        write_shard(root / f"json_{name}" / "a.tar", {"0": (0, b"0"), "1": (1, b"0")})
        (root / f"json_{name}" / "classes.json").write_text(content)
    return {
        "photos": "no such file or folder; give a folder of images, an .npz, a .tar pattern, or digits",
        "empty": r"no image in this folder \(looked for \.png \.jpg .*\); give a folder",
        "shards": r"no image in this folder .*; give .*shards/\*\.tar for its shards",
        "single": "is one image.*; give data.val_source",
        "film.mp4": "a file of an unknown type; give a folder",
        "zipped.tar.gz": "a file of an unknown type; give a folder",
        "text.npz": r"text\.npz cannot be read \(.*\); repair it",
        "zero.npz": r"cannot be read \(",
        "plain.npz": r"cannot be read \(",
        "cut.npz": r"cannot be read \(",
        "objects.npz": r"cannot be read \(",
        "names.npz": "no array named `images`",
        "floats.npz": r"the images are float64 \(3, 8, 8\); give uint8",
        "first.npz": r"the images are uint8 \(9, 3, 8, 8\); give",
        "none.npz": r"the images are uint8 \(0, 8, 8\); give",
        "scalar.npz": r"the images are uint8 \(\); give",
        "few.npz": r"the labels are int64 \(2,\); give 3 integers",
        "half.npz": r"the labels are float64 \(3,\); give 3 integers",
        "vast.npz": r"one of the labels is 1099511627776; number the classes from 0, up to 999999",
        "vast.tar": r"vast\.tar/0\.cls holds b'1099511627776'; make it an integer below 1000000",
        "long" * 2000: "File name too long",
        "below.npz": r"the labels are int64 \(3,\); give 3 integers",
        "idx_cut": r"train-images-idx3-ubyte cannot be read \(",
        "idx_floats": r"cannot be read \(not an IDX file of unsigned bytes\)",
        "idx_no": r"cannot be read \(",
        "idx_zip": r"cannot be read \(",
        "no.tar": r"no shard .*no\.tar; fetch it",
        "no-*.tar": r"no shard .*no-\*\.tar; fetch it",
        "text.tar": r"text\.tar cannot be read \(",
        "cut.tar": r"cut\.tar cannot be read \(",
        "zipped.tar": r"zipped\.tar cannot be read \(",
        "label.tar": r"label\.tar/0\.cls holds b'cat'; make it an integer",
        "bare.tar": r"no image in bare\.tar \(looked for",
        "json_text/a.tar": r"classes\.json cannot be read \(",
        "json_dict/a.tar": r"classes\.json is not a list of all 1 class names",
        "json_few/a.tar": r"classes\.json is not a list of all 1 class names",
    }


def test_sources_that_are_refused(tmp_path):
    for name, pattern in wrong_sources(tmp_path).items():
        with pytest.raises(InputError, match=pattern) as error:
            load(tmp_path / name)
        assert str(error.value).startswith(f"data.source={tmp_path / name}"), error.value
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^data\.val_source=nowhere: no such file or folder; "):
        load("digits", val_source="nowhere")


def test_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load("~/pets")[0]) > 0


def test_some_rows_are_always_the_same_ones_of_every_class_in_turn():
    assert some_rows(5, None).tolist() == some_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    rows = some_rows(1000, 100)
    assert rows.tolist() == sorted(set(rows.tolist())) == some_rows(1000, 100).tolist()
    assert len(rows) == 100
    assert set((rows % 10).tolist()) == set(range(10))  # ten classes in turn


def test_a_whole_set_has_the_size_of_its_images_or_the_one_asked_for(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    data = DataConfig(source=f"{tmp_path}/images.npz")
    whole, held_out = load_set("images", data)
    assert (len(whole), whole.image_size, whole.channels, held_out) == (12, 20, 3, None)
    assert np.array_equal(whole.__getitems__(range(12))[0].permute(0, 2, 3, 1).numpy(), images)
    assert load_set("images", data, 16)[0].image_size == 16


def test_a_set_with_parts_comes_with_its_held_out_part():
    train, held_out = load_set("reference", DataConfig())
    assert (len(train), len(held_out)) == (20_000, 2_000)
    assert train.class_names == held_out.class_names
