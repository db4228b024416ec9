"""Shards: patterns, classes, and samples read in place."""

import json
import tarfile

import numpy as np
import pytest
from data.files import add_to_tar, load, png, write_shard
from PIL import Image
from programs import SHARED, needs_shared

from vqgen.errors import InputError


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
