"""The description of a source: its numbers, its lines, and its hints."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from data.files import RED, load, save, write_shard
from PIL import Image

import vqgen
from vqgen.data.describe import Description, describe


def described(source: Path, batch_size: int | None = 8, **settings) -> Description:
    return describe(*load(source, **settings), batch_size)


def pictures(folder: Path, *sizes: tuple[int, int]) -> Path:
    """Writes 20 images of each size (width, height)."""
    for width, height in sizes:
        for i in range(20):
            save(folder / f"{width}x{height}_{i}.png", Image.new("RGB", (width, height), (i, 0, 0)))
    return folder


def test_all_there_is_to_say_about_a_folder(damaged):
    found = described(damaged, val_source=str(damaged.parent / "held"))
    assert (found.train, found.held_out, found.classes) == (17, 1, {"cat": 8, "dog": 9})
    assert (found.channels, found.image_size, found.left_out) == (1, 8, {"broken": 3})
    assert found.sizes == {side: {"min": 8, "median": 8, "max": 8} for side in ("width", "height")}
    assert found.lines() == [
        f"images: 17 to train on, 1 held out (data.val_source={damaged.parent / 'held'})",
        "classes: 2: cat (8), dog (9)",
        "channels: 1 (no image that was looked at has colour)",
        "size: 8x8, as they are",
        "left out: 3 broken",
        "hint: under 10 images in classes cat (8), dog (9); so few are learned by heart or not at all",
    ]
    assert found.short_lines()[0] == found.lines()[0] + ", grey, 8x8, as they are"
    assert found.short_lines()[1:] == [line for line in found.lines() if line.startswith(("classes", "left", "hint"))]


def test_the_numbers_as_json(folder):
    content = json.loads(described(folder, batch_size=64).as_json())
    assert list(content) == [
        "train", "held_out", "classes", "channels", "image_size", "sizes", "left_out", "notes",
    ]  # fmt: skip
    assert (content["train"], content["held_out"], content["classes"]) == (17, 3, {"cat": 9, "dog": 8})
    assert [note for note in content["notes"] if "fewer than a batch of 64" in note]


def test_where_the_split_comes_from_and_how_the_channels_were_decided(folder, tmp_path):
    assert "(5 % by a hash of the names)" in described(folder).lines()[0]
    assert "(0.1 % by a hash of the names)" in described(folder, val_fraction=0.001).lines()[0]
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both/train")
    save(tmp_path / "both/val/cat/1.png", RED)
    assert "1 held out (val/)" in described(tmp_path / "both").lines()[0]
    assert "channels: 3 (as data.channels says)" in described(tmp_path / "both", channels=3).lines()
    save(tmp_path / "both/train/cat/red.png", RED)
    assert "channels: 3 (the images have colour)" in described(tmp_path / "both").lines()


def test_sizes_are_those_of_upright_originals(tmp_path):
    for i in range(5):
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        save(tmp_path / f"{i}.jpg", Image.new("RGB", (30 + i, 20)), exif=exif if i == 4 else Image.Exif())
    save(tmp_path / "flat.png", Image.new("RGB", (100, 10)))
    (tmp_path / "broken.png").write_bytes(b"broken")
    found = described(tmp_path, val_source=str(tmp_path))
    assert found.sizes == {
        "width": {"min": 20, "median": 31, "max": 100},
        "height": {"min": 10, "median": 20, "max": 34},
    }
    assert "size: 8x8, cropped from 20 to 100 wide and 10 to 34 high, median 31x20" in found.lines()
    assert "size: 8x8, padded with white from" in "\n".join(described(tmp_path, resize="pad").lines())


def test_many_classes_are_counted_and_the_first_are_named(tmp_path):
    for i in range(30):
        save(tmp_path / f"class {i:02d}" / "a.png", i)
        save(tmp_path / f"class {i:02d}" / "b.png", i)
    found = described(tmp_path, val_source=str(tmp_path))
    (line,) = [line for line in found.lines() if line.startswith("classes: ")]
    assert line.startswith("classes: 30: class 00 (2), class 01 (2), ")
    assert line.endswith("class 11 (2), ... and 18 more")
    assert found.short_lines()[1].endswith("class 05 (2), ... and 24 more")
    assert len(found.classes) == 30
    (hint,) = found.hints
    assert hint.startswith("under 10 images in classes class 00 (2), class 01 (2), class 02 (2) and 27 more;")


def test_a_name_takes_one_short_line(tmp_path):
    for name in ("a\nb", "c" * 100):
        for i in range(10):
            save(tmp_path / name / f"{i}.png", i)
    found = described(tmp_path)
    assert "a\nb" in found.classes
    assert re.fullmatch(r"classes: 2: a\\nb \(\d+\), c{37}\.\.\. \(\d+\)", found.lines()[1])


def test_a_class_without_an_image_is_none(tmp_path):
    write_shard(tmp_path / "a.tar", {f"{i}": (i, b"2" if i % 2 else b"0") for i in range(40)})
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog", "eel", "fox"]))
    assert list(described(tmp_path / "a.tar").classes) == load(tmp_path / "a.tar")[0].class_names == ["cat", "eel"]


def test_images_without_a_class_among_others_are_counted(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((30, 8, 8), np.uint8), labels=np.arange(30) % 3 - 1)
    found = described(tmp_path / "a.npz", val_source=str(tmp_path / "a.npz"))
    assert sum(found.classes.values()) == 20
    assert "10 images have no class" in found.notes


HINTS = {  # sizes of the images, settings, what the hint says
    "all are enlarged": ([(16, 16)], {"image_size": 32}, "all images are smaller than 32x32 and are enlarged; data.im"),
    "the size that enlarges none": ([(20, 20)], {"image_size": 32}, "data.image_size=16 or data.resize=pad would not"),
    "some are enlarged": ([(16, 90), (64, 64)], {"image_size": 32}, "are smaller than 32x32 and are enlarged"),
    "wide": ([(60, 40)], {"image_size": 32}, "wide, like 60x40, and lose 33 % in the crop; data.image_size=[32,48] or"),
    "tall": ([(45, 80)], {"image_size": 32}, "lose 44 % in the crop; data.image_size=[56,32] or data.resize=pad would"),
    "wide and small": ([(60, 40)], {"image_size": 64}, "data.image_size=[40,56] or data.resize=pad would keep it"),
    "a batch": ([(8, 8)], {"batch_size": 64}, "19 images are fewer than a batch of 64, so a step sees some"),
}


@pytest.mark.parametrize("case", HINTS)
def test_a_hint_is_given_where_it_is_due(tmp_path, case):
    sizes, settings, said = HINTS[case]
    assert said in "\n".join(described(pictures(tmp_path, *sizes), **settings).hints)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ([(8, 8)], {}),
        ([(16, 16)], {"batch_size": 8}),
        ([(9, 8)], {}),  # hardly anything is lost
        ([(16, 8), (8, 16)], {}),  # no shape is that of most
        ([(32, 8), (24, 8), (8, 8)], {}),
        ([(6, 6)], {"resize": "pad"}),  # nothing is enlarged
        ([(16, 8)], {"resize": "pad"}),
    ],
)
def test_no_hint_is_given_where_none_is_due(tmp_path, sizes, settings):
    assert described(pictures(tmp_path, *sizes), **settings).hints == []


def test_one_class_tells_nothing(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((30, 8, 8), np.uint8), labels=np.zeros(30, int))
    assert described(tmp_path / "a.npz").hints == ["all images have one class, 0, so it tells a model nothing"]
    assert described(tmp_path / "a.npz", batch_size=None).hints == []  # nothing is trained


def test_load_images_from_python_as_documented(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    train, held_out = vqgen.load_images("pets", image_size=16)
    assert (len(train), len(held_out), train.class_names, train.channels) == (17, 3, ["cat", "dog"], 1)
    assert sorted([*train.class_ids, *held_out.class_ids]) == [0] * 10 + [1] * 10
    assert train.read(0).shape == (1, 16, 16)
    assert (train.split, train.notes, sum(train.left_out.values())) == ("", [], 0)
