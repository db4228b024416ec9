"""stage1/preview.py: what it prints, its picture and its numbers."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image
from programs import ROOT

RED = (255, 0, 0)
BLUES = (0, 80, 160)


@pytest.fixture
def photos(tmp_path):
    """Twelve images of each of three classes, one of them very wide; a class has one blue and several greens."""
    for blue, name in zip(BLUES, ("ant", "żółw", "猫"), strict=True):
        for i in range(12):
            size = (80, 20) if (name, i) == ("ant", 3) else (32, 32)
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (0, 100 + i, blue)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def has(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(picture) == colour).all(axis=2).any())


def test_a_folder_is_said_and_shown(program, photos, tmp_path):
    code, output, errors = program("stage1/preview.py", f"data.source={photos}", f"out={tmp_path}/out")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0].startswith("images: 3")
    assert lines[0].endswith("held out (5 % by a hash of the names)")
    assert "channels: 3 (the images have colour)" in lines
    assert "hint: 3" in output
    assert "images are fewer than a batch of 64" in output
    assert "the picture's font has not all letters of: 1 = żółw, 2 = 猫" in lines
    assert lines[-1] == f"next: accelerate launch stage1/train.py data.source={photos}"

    found = json.loads((tmp_path / "out/preview.json").read_text("utf-8"))
    assert found["train"] + found["held_out"] == 36
    assert list(found["classes"]) == ["ant", "żółw", "猫"]
    assert sum(found["classes"].values()) == found["train"]
    assert (found["channels"], found["image_size"], found["left_out"]) == (3, 32, {})
    assert found["sizes"]["width"] == {"min": 32, "median": 32, "max": 80}
    picture = Image.open(tmp_path / "out/preview.png")
    assert has(picture, (0, 103, 0))  # the wide one
    assert has(picture, RED)  # the frame around its kept part
    pixels = np.asarray(picture).astype(int)
    seen = (pixels[..., 0] == 0) & (pixels[..., 1] >= 100)
    classes = [set(line[mask, 2]) for line, mask in zip(pixels[:220], seen, strict=False) if mask.any()]
    assert [blues for blues, _ in itertools.groupby(classes)] == [{blue} for blue in BLUES]  # a row for each class
    rows, columns = np.nonzero((pixels == RED).all(axis=2))
    middle = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
    assert tuple(pixels[middle]) == (0, 103, 0)  # the kept part is as it is, and what is cut off is dimmed
    assert 103 < pixels[middle[0], columns.min() - 5][1] < 230


@pytest.mark.parametrize("settings", [["data.resize=pad"], ["data.image_size=8"]])
def test_nothing_is_framed_where_nothing_is_cut_off(program, photos, tmp_path, settings):
    (photos / "ant/3.png").unlink()
    code, _, errors = program("stage1/preview.py", f"data.source={photos}", f"out={tmp_path}/out", *settings)
    assert code == 0, errors
    assert not has(Image.open(tmp_path / "out/preview.png"), RED)


@pytest.mark.parametrize("size", [(16, 16, 1), (300, 300, 3)])
def test_images_without_classes_small_grey_ones_and_large_ones(program, tmp_path, size):
    np.savez(tmp_path / "a.npz", images=np.full((10, *size), 70, np.uint8))
    arguments = [
        f"data.source={tmp_path}/a.npz",
        f"data.image_size={size[0]}",
        "data.channels=3",
        f"out={tmp_path}/out",
    ]
    code, output, errors = program("stage1/preview.py", *arguments)
    assert code == 0, errors
    assert "classes: none\nchannels: 3 (as data.channels says)" in output
    picture = Image.open(tmp_path / "out/preview.png")
    assert has(picture, (70, 70, 70))
    assert picture.width < 1300


def test_a_config_file_of_stage_1_is_read_as_training_reads_it(program, tmp_path):
    code, output, errors = program("stage1/preview.py", "configs/debug/stage1.yaml", f"out={tmp_path}")
    assert code == 0, errors
    assert output.startswith(
        "images: 20,000 to train on, 2,000 held out (test images of the arrays)\nclasses: 10: 0 (1,960), "
    )
    assert output.endswith("next: accelerate launch stage1/train.py configs/debug/stage1.yaml\n")
    assert Image.open(tmp_path / "preview.png").height > 10 * 64


def test_the_picture_never_joins_the_images(program, photos):
    before = sorted(photos.rglob("*"))
    for out in (photos, photos / "ant"):
        code, _, errors = program("stage1/preview.py", f"data.source={photos}", f"out={out}")
        assert code == 2
        assert f"out={out} lies in data.source={photos}" in errors
        assert errors.count("\n") == 1
    assert sorted(photos.rglob("*")) == before


def test_a_source_that_is_not_there_is_one_line_and_leaves_no_folder(program, tmp_path):
    code, output, errors = program("stage1/preview.py", f"data.source={tmp_path}/none", f"out={tmp_path}/out")
    assert (code, output) == (2, "")
    assert errors.startswith("error: data.source=")
    assert not (tmp_path / "out").exists()
    assert not (ROOT / "preview.png").exists()
