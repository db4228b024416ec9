"""The files that drawn images are written to."""

import re

import numpy as np
import pytest
from PIL import Image

from vqgen.data.samples import check_free, folder_names, load_samples, save_samples, save_single_files
from vqgen.errors import InputError


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_come_back_as_they_went(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 12, channels), dtype=np.uint8)
    save_samples(tmp_path / "samples.npz", images, np.arange(5) - 1)
    loaded, class_ids = load_samples(tmp_path / "samples.npz")
    assert np.array_equal(loaded, images)
    assert class_ids.tolist() == [-1, 0, 1, 2, 3]
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["images"].shape == arrays["arr_0"].shape == ((5, 8, 12) if channels == 1 else (5, 8, 12, 3))


def test_a_folder_s_name_is_the_class_s_unless_a_system_refuses_it():
    plain = ["cat", "a b", "猫", "007", "x.y", "été"]
    assert folder_names(plain) == plain
    odd = [
        "AC/DC",
        "a:b",
        "..",
        ".hidden",
        "end.",
        "end ",
        "con",
        "COM1.x",
        "a%b",
        "",
        "a\nb",
        "Cat",
        "cat",
        "no_class",
    ]
    names = folder_names([*odd, "x" * 500, "x" * 501])
    assert names[:3] == ["AC%2FDC", "a%3Ab", "%2E%2E"]
    assert len({name.casefold() for name in names}) == len(names)
    assert "no_class" not in names
    numbered = folder_names(["cat%", "cat", *map(str, range(23)), "CAT"])  # CAT gets its id, 25, as %25; so has cat%
    assert len({name.casefold() for name in numbered}) == 26
    for name in names:
        assert not re.search(r'[\x00-\x1f/\\:*?"<>|]|^[. ]|[. ]$', name), name
        assert len(name.encode()) <= 255
        assert name.partition(".")[0].casefold() not in ("con", "com1")


def test_single_files_have_the_number_of_their_image(tmp_path):
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    assert save_single_files(tmp_path / "a", images, np.array([1, -1, 0, 1]), ["AC/DC", "b"])
    files = {path.relative_to(tmp_path / "a").as_posix(): path for path in (tmp_path / "a").glob("*/*")}
    assert sorted(files) == ["AC%2FDC/00002.png", "b/00000.png", "b/00003.png", "no_class/00001.png"]
    for path in files.values():
        assert (np.asarray(Image.open(path)) == int(path.stem)).all()
    assert not save_single_files(tmp_path / "b", images, np.full(4, -1), ["x"])
    assert len(list((tmp_path / "b").glob("*.png"))) == 4


def test_single_files_never_mix_with_others(tmp_path):
    check_free(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    check_free(tmp_path)
    (tmp_path / "cat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cat/x.png")
    with pytest.raises(InputError, match=r"has images already, such as cat/x\.png: the new ones would mix"):
        check_free(tmp_path)
