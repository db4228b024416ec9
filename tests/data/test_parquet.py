"""Parquet files: patterns, folders, parts by the files' names, and damage."""

import shutil

import numpy as np
import pytest
from data.files import greys, load, save, write_shard, write_table

from vqgen.data.sources import open_source
from vqgen.errors import InputError
from vqgen.settings import DataConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(source, **settings):
    return open_source("source", source, DataConfig(source=str(source), **settings))


def write_hub_folder(root) -> None:
    """A folder as a data set of the Hub has it: 3 + 3 training images from 0 on, 2 to validate, 4 to test."""
    for number in range(2):
        images = {"image": greys(3, 3 * number), "label": ["cat", "dog", "cat"]}
        write_table(root / "data" / f"train-{number:05}-of-00002.parquet", images)
    write_table(root / "data" / "validation-00000-of-00001.parquet", {"image": greys(2, 50), "label": ["dog", "cat"]})
    write_table(root / "data" / "test-00000-of-00001.parquet", {"image": greys(4, 70), "label": ["dog"] * 4})
    (root / "README.md").write_text("# Pets")
    (root / ".gitattributes").touch()


def test_a_folder_of_the_hub(tmp_path):
    write_hub_folder(tmp_path / "pets")
    found = opened(tmp_path / "pets")
    assert list(found.train.names) == [f"train-0000{n}-of-00002.parquet/{k}" for n in range(2) for k in range(3)]
    assert found.held_out is not None
    assert list(found.held_out.names) == [f"validation-00000-of-00001.parquet/{k}" for k in range(2)]
    assert found.split == "validation"
    assert found.left_out == {".md": 1, "of the split test": 4}
    assert "test: 4 images, not used" in found.notes
    train, held_out = load(tmp_path / "pets")
    assert [int(train.read(k)[0, 0, 0]) for k in range(6)] == list(range(6))
    assert (train.class_names, train.class_ids.tolist()) == (["cat", "dog"], [0, 1, 0, 0, 1, 0])
    assert (held_out.class_names, held_out.class_ids.tolist()) == (["cat", "dog"], [1, 0])


def test_that_images_are_copied_is_said_once_and_before(tmp_path, caplog):
    write_hub_folder(tmp_path / "pets")
    opened(tmp_path / "pets")
    (message,) = caplog.messages
    assert message.startswith(f"the images of tables are copied once to {tmp_path / 'cache'}")
    opened(tmp_path / "pets")
    assert caplog.messages == [message]


def test_patterns_name_files(tmp_path):
    write_hub_folder(tmp_path / "pets")
    data = tmp_path / "pets" / "data"
    names = [f"train-0000{n}-of-00002.parquet/{k}" for n in range(2) for k in range(3)]
    for pattern in ("train-*.parquet", "train-{00000..00001}-of-00002.parquet", "tr{a}in-0000[01]*.parquet"):
        found = opened(data / pattern)
        assert (list(found.train.names), found.held_out, found.left_out) == (names, None, {})
    found = opened(data / "*.parquet")
    assert (list(found.train.names), found.split) == (names, "validation")
    single = opened(data / "test-00000-of-00001.parquet")
    assert (len(single.train.names), single.notes) == (4, opened(data / "train-*.parquet").notes)
    train, held_out = load(data / "train-*.parquet", val_source=str(data / "test-*.parquet"))
    assert (len(train), len(held_out), held_out.class_ids.tolist()) == (6, 4, [1] * 4)
    with pytest.raises(InputError, match=r"no shard .*valid-\*\.parquet; fetch it"):
        opened(data / "valid-*.parquet")


@pytest.mark.parametrize(
    ("files", "train", "split", "left_out"),
    [
        (["a.parquet", "b.parquet"], ["a.parquet", "b.parquet"], "", {}),
        (["train.parquet", "val.parquet", "test.parquet"], ["train.parquet"], "val", {"of the split test": 2}),
        (["train/0.parquet", "dev/0.parquet", "more/0.parquet"], ["train/0.parquet"], "dev", {"of the split more": 2}),
        (["train/0000.parquet", "test/0000.parquet"], ["train/0000.parquet"], "test", {}),
        (["Train.parquet", "Dev.parquet"], ["Train.parquet"], "Dev", {}),
        (["partial-train/0.parquet", "partial-test/0.parquet"], ["partial-train/0.parquet"], "partial-test", {}),
        (["cifar-train-0.parquet", "cifar-test-0.parquet"], ["cifar-train-0.parquet"], "cifar-test", {}),
        (["train-0.parquet", "train-1.parquet"], ["train-0.parquet", "train-1.parquet"], "", {}),
        (["train/0.parquet", "extra/0.parquet"], ["train/0.parquet"], "", {"of the split extra": 2}),
        (["test-00000-of-00001.parquet"], ["test-00000-of-00001.parquet"], "", {}),
        (["x.parquet/part-0.snappy.parquet", "x.parquet/_SUCCESS"], ["part-0.snappy.parquet"], "", {"no extension": 1}),
    ],
)  # fmt: skip
def test_parts_by_name(tmp_path, files, train, split, left_out):
    for name in files:
        if name.endswith(".parquet"):
            write_table(tmp_path / "set" / name, {"image": greys(2)})
        else:
            (tmp_path / "set" / name).touch()
    found = opened(tmp_path / "set")
    assert list(dict.fromkeys(name.rpartition("/")[0] for name in found.train.names)) == train
    assert (found.split, found.left_out) == (split, left_out)
    alone = any(line.startswith("test: the only split, so all its images are used") for line in found.notes)
    assert alone == (files[0].startswith("test-"))


def test_parts_that_are_not_clear_are_asked_for(tmp_path):
    for name in ("train_a", "train_b", "test"):
        write_table(tmp_path / f"{name}.parquet", {"image": greys(2)})
    message = r"the splits are test, train_a, train_b: it is not clear which one is for training; give the files"
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_folders_read_as_one_are_named(tmp_path):
    for name in ("english", "french"):
        write_table(tmp_path / name / "0.parquet", {"image": greys(2)})
    found = opened(tmp_path)
    assert len(found.train.names) == 4
    assert "english, french: read as one data set" in found.notes


def test_tables_beside_images_only_describe_them(tmp_path):
    pets = tmp_path / "pets"
    for k in range(4):
        save(pets / f"{k}.png", k)
    write_table(pets / "metadata.parquet", {"file_name": [f"{k}.png" for k in range(4)]})
    assert sorted(opened(pets).train.names) == ["0.png", "1.png", "2.png", "3.png"]
    write_hub_folder(tmp_path / "hub")
    save(tmp_path / "hub" / "assets" / "example.png")
    found = opened(tmp_path / "hub")
    assert (len(found.train.names), found.left_out[".png"]) == (6, 1)
    write_table(tmp_path / "shards" / "index.parquet", {"id": [1]})
    write_shard(tmp_path / "shards" / "a.tar", {"0": (0, b"0"), "1": (1, b"0")})
    assert list(opened(tmp_path / "shards").train.names) == ["a.tar/0", "a.tar/1"]


def test_links_in_a_circle_do_no_harm(tmp_path):
    write_table(tmp_path / "set" / "data" / "a.parquet", {"image": greys(3)})
    (tmp_path / "set" / "data" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "linked.parquet").symlink_to(tmp_path / "set" / "data" / "a.parquet")
    assert len(opened(tmp_path / "set").train.names) == 6


def test_damaged_files_are_refused(tmp_path):
    path = write_table(tmp_path / "x.parquet", {"image": greys(300), "label": ["a", "b"] * 150})
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    wrong = {
        "cut": (whole[:-40], r"cut\.parquet cannot be read \(.*\); repair it"),
        "middle": (whole[:2000] + bytes(4000) + whole[6000:], r"middle\.parquet cannot be read \("),
        "nothing": (b"", r"nothing\.parquet cannot be read \(neither a Parquet nor an Arrow file\); repair"),
        "text": (b"a,b\n1,2\n", r"text\.parquet cannot be read \(neither a Parquet nor an Arrow file\); repair"),
        "pointer": (pointer, r"pointer\.parquet is only Git LFS's pointer to the file; run `git lfs pull`"),
    }
    for name, (content, pattern) in wrong.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(InputError, match=pattern) as error:
            opened(tmp_path / f"{name}.parquet")
        assert "\n" not in str(error.value)
    assert not [*(tmp_path / "cache").rglob("*.tmp")]
    write_table(tmp_path / "two" / "a.parquet", {"image": greys(2), "label": ["a", "b"]})
    write_table(tmp_path / "two" / "b.parquet", {"image": greys(2)})
    with pytest.raises(InputError, match=r"b\.parquet has no column label, which other files have"):
        opened(tmp_path / "two")


def test_random_damage_never_ends_in_a_traceback(tmp_path):
    whole = write_table(tmp_path / "x.parquet", {"image": greys(40), "label": ["a", "b"] * 20}).read_bytes()
    random = np.random.default_rng(0)
    for number in range(60):
        content = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            content[int(random.integers(4, len(content)))] = int(random.integers(256))
        (tmp_path / f"{number}.parquet").write_bytes(content)
        try:
            found = opened(tmp_path / f"{number}.parquet")
        except InputError:
            continue
        for row in range(len(found.train.names)):
            found.train.num_bytes(row)


def test_the_fingerprint_follows_content_and_not_place_or_time(tmp_path):
    write_hub_folder(tmp_path / "one")
    first = [part.fingerprint for part in load(tmp_path / "one")]
    shutil.copytree(tmp_path / "one", tmp_path / "else" / "two", copy_function=shutil.copyfile)
    assert [part.fingerprint for part in load(tmp_path / "else" / "two")] == first
    write_table(
        tmp_path / "one" / "data" / "train-00001-of-00002.parquet", {"image": greys(3, 90), "label": ["cat"] * 3}
    )
    assert load(tmp_path / "one")[0].fingerprint != first[0]
