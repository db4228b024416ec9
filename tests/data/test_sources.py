"""The messages for sources that cannot be used."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data.files import add_to_tar, load, save, write_shard

from vqgen.errors import InputError


def wrong_sources(root: Path) -> dict[str, str]:
    """Sources that cannot be used, each with a pattern that its message must match."""
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").touch()
    save(root / "single" / "a.png")
    (root / "film.mp4").touch()
    (root / "text.npz").write_text("text")
    (root / "zero.npz").touch()
    np.save(root / "plain.npy", np.zeros(3))
    (root / "plain.npy").rename(root / "plain.npz")
    np.savez(root / "names.npz", first=np.zeros((3, 8, 8), np.uint8), second=np.zeros((3, 8, 8), np.uint8))
    np.savez(root / "objects.npz", images=np.array([None, {}]))
    np.savez(root / "strings.npz", images=np.full((3, 8, 8), "x"))
    np.savez(root / "wide.npz", images=np.zeros((9, 8, 8, 5), np.uint8))
    np.savez(root / "one.npz", images=np.zeros((8, 8, 3), np.uint8))
    np.savez(root / "none.npz", images=np.zeros((0, 8, 8), np.uint8))
    np.savez(root / "scalar.npz", images=np.uint8(3))
    np.savez(root / "few.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(2, int))
    np.savez(root / "half.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.full(3, 0.5))
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
    write_shard(root / "label.tar", {"0": (0, b"a\nb"), "1": (1, b"0")})
    with tarfile.open(root / "bare.tar", "w") as tar:
        add_to_tar(tar, "0.txt", b"")
    for name, content in (("text", "cat, dog"), ("dict", '{"a": "b"}'), ("few", '["a", "b"]')):
        (root / f"json_{name}").mkdir()
        write_shard(root / f"json_{name}" / "a.tar", {"0": (0, b"0"), "1": (1, b"4")})
        (root / f"json_{name}" / "classes.json").write_text(content)
    return {
        "photos": "no such file or folder; give a folder of images, a tar, zip, parquet",
        "empty": r"no image among its files, 1 \.txt \(looked for \.png \.jpg .*\); give a folder",
        "single": "is only one image.*; give val_source=",
        "film.mp4": "a file of an unknown type; give a folder",
        "text.npz": r"text\.npz cannot be read \(.*\); repair it",
        "zero.npz": r"cannot be read \(",
        "plain.npz": r"cannot be read \(",
        "cut.npz": r"cannot be read \(",
        "objects.npz": r"cannot be read \(",
        "names.npz": r"no array of images among: first uint8 \(3, 8, 8\), second uint8 .*; write one called images",
        "strings.npz": r"the images are <U1 \(3, 8, 8\); give uint8",
        "wide.npz": r"the images are uint8 \(9, 8, 8, 5\); give",
        "one.npz": r"the images are uint8 \(8, 8, 3\); give",
        "none.npz": r"the images are uint8 \(0, 8, 8\); give",
        "scalar.npz": r"the images are uint8 \(\); give",
        "few.npz": r"the labels are int64 \(2,\); give 3 integers",
        "half.npz": r"the labels are float64 \(3,\); give 3 integers",
        "long" * 2000: "File name too long",
        "below.npz": "one of the labels is -2; give integers from 0, and -1 for no class",
        "idx_cut": r"train-images-idx3-ubyte cannot be read \(",
        "idx_floats": r"cannot be read \(not an IDX file of unsigned bytes\)",
        "idx_no": r"cannot be read \(",
        "idx_zip": r"cannot be read \(",
        "no.tar": r"no shard .*no\.tar; fetch it",
        "no-*.tar": r"no shard .*no-\*\.tar; fetch it",
        "text.tar": r"text\.tar cannot be read \(",
        "cut.tar": r"cut\.tar cannot be read \(",
        "label.tar": r"0\.cls holds 'a\\nb', which is no class; make it a number or a name",
        "bare.tar": r"no image among its files, 1 \.txt \(looked for",
        "json_text/a.tar": r"classes\.json cannot be read \(",
        "json_dict/a.tar": r"classes\.json is no list of class names; make it one",
        "json_few/a.tar": "the list of class names has 2 names, and none for class 4",
    }


def test_sources_that_are_refused(tmp_path):
    for name, pattern in wrong_sources(tmp_path).items():
        with pytest.raises(InputError, match=pattern) as error:
            load(tmp_path / name)
        assert str(error.value).startswith(f"source={tmp_path / name}"), error.value
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^source= is empty; give a folder"):
        load("")
    with pytest.raises(InputError, match=r"the pattern stands for images, such as a\.png; give their folder"):
        load(tmp_path / "single" / "*.png")
    with pytest.raises(InputError, match=r"^val_source=nowhere: no such file or folder; "):
        load("digits", val_source="nowhere")
