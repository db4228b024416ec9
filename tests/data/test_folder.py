"""Folders of images: classes, a given split, names of any kind, and the listing of files."""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import RED, load, save, write_shard
from programs import SHARED, needs_shared

from vqgen.data.skipped import read_skipped
from vqgen.data.sources import folder as folder_module
from vqgen.data.sources import index as index_module
from vqgen.data.sources import listing as listing_module
from vqgen.data.sources.index import user_cache_folder
from vqgen.data.sources.listing import list_files

# Classes and split


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


def test_folder_without_classes(tmp_path):
    for k in range(4):
        save(tmp_path / "flat" / f"{k}.png", k)
    train, val = load(tmp_path / "flat")
    assert train.class_names == []
    assert set(train.class_ids) == set(val.class_ids) == {-1}
    assert train.notes == []
    save(tmp_path / "flat" / "sub" / "x.png")
    train, val = load(tmp_path / "flat")
    assert (train.class_names, len(train) + len(val)) == ([], 5)
    assert train.notes == ["sub/: no classes, as most images lie beside the folders, such as 0.png"]


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
    save(tmp_path / "only" / "other" / "x.png")  # then train is a class like any other
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


def test_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load("~/pets")[0]) > 0
    assert len(load("digits", val_source="~/pets/cat", channels=1, cache_gb=0)[1]) == 10
    write_shard(folder.parent / "0.tar", {str(k): (k, b"0") for k in range(3)})
    np.savez(folder.parent / "a.npz", images=np.zeros((3, 8, 8), np.uint8))
    for source in ("~/0.tar", "~/{0..0}.tar", "~/*.tar", "~/a.npz"):
        assert len(load("~/pets/cat", val_source=source)[1]) == 3


# Odd files and names


def test_a_pipe_with_an_image_s_name_is_never_waited_for(folder):
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "dog" / "zero.png").symlink_to("/dev/zero")
    with (folder / "dog" / "vast.png").open("wb") as file:
        file.truncate(1 << 41)
    train, val = load(folder, val_fraction=0.3)
    assert len(train) + len(val) == 20
    assert sorted((train._broken | val._broken).values()) == [
        "2,048.0 GiB, too large for an image", "a pipe, a socket or a device", "a pipe, a socket or a device"
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
    images = [name for name in list_files(root).names if name.endswith(".png")]
    assert images == ["cat/1.png", "dog/2.png", "folder.png/3.png"]


def test_links_that_lead_to_a_folder_in_ever_more_ways_come_to_an_end(tmp_path, caplog):
    for level in range(40):  # 2 to the power of 40 paths lead to the last folder
        save(tmp_path / f"{level}" / "x.png")
        for name in "ab" if level < 39 else "":
            (tmp_path / f"{level}" / name).symlink_to(f"../{level + 1}")
    names = list_files(tmp_path / "0").names
    assert len(names) == 1 + 2 + 4 + 8 + 36 * listing_module.MAX_VISITS
    assert names == list_files(tmp_path / "0").names
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
    assert list_files(tmp_path / "x").names == ["a.png"]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"skipping a folder that cannot be listed: {'d' * 250}/")
    assert caplog.messages[0].endswith("(File name too long)")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """Two folders of images, so large that their index is kept, and without recent changes."""
    monkeypatch.setattr(index_module, "KEPT_FROM", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a/0", "a/1", "b/2", "b/3"):
        save(tmp_path / "x" / f"{name}.png")
    settle(tmp_path / "x")
    return tmp_path / "x"


def settle(root: Path) -> None:
    """Sets all times back, as if nothing had changed for ten seconds."""
    for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(path, ns=(0, time.time_ns() - 10**10))


def kept_indices() -> list[Path]:
    return sorted((user_cache_folder() / "index").glob("*"))


def found(root: Path) -> dict[str, str]:
    """Each image's name and class."""
    names: dict[str, str] = {}
    for part in load(root, cache_gb=0, channels=1):
        classes = [*part.class_names, "none"]
        names |= {name: classes[i] for name, i in zip(part.names, part.class_ids, strict=True)}
    return names


def test_the_index_of_a_large_folder_is_kept_until_the_folder_changes(kept, monkeypatch):
    names = {"a/0.png": "a", "a/1.png": "a", "b/2.png": "b", "b/3.png": "b"}
    assert found(kept) == names
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "list_files", forbidden)
        kept.parent.joinpath("link").symlink_to(kept)
        assert found(kept) == found(kept.parent / "link") == names
    (folder,) = kept_indices()
    for file in sorted(folder.rglob("*.*")):
        content = file.read_bytes()
        for damage in (b"", content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
            file.write_bytes(damage)
            assert found(kept) == names
    save(kept / "b" / "4.png")
    assert found(kept) == {**names, "b/4.png": "b"}
    settle(kept)
    (kept / "a" / "0.png").rename(kept / "a" / "5.png")
    assert found(kept).keys() == {"a/1.png", "a/5.png", "b/2.png", "b/3.png", "b/4.png"}


def test_the_index_follows_a_label_file_that_changes_in_place(kept):
    rows = "".join(f"{name},{label}\n" for name, label in zip(("a/0", "a/1", "b/2", "b/3"), "xxyy", strict=True))
    table = kept / "labels.csv"
    table.write_text("file_name,label\n" + rows.replace(",", ".png,"))
    settle(kept)
    assert found(kept) == {"a/0.png": "x", "a/1.png": "x", "b/2.png": "y", "b/3.png": "y"}
    assert len(kept_indices()) == 1
    table.write_text(table.read_text().replace(",x", ",z"))
    assert set(found(kept).values()) == {"z", "y"}


def test_an_index_that_may_not_last_is_not_kept(kept):
    save(kept / "b" / "new.png")
    found(kept)
    assert kept_indices() == []
    settle(kept)
    (kept / "a" / "later").symlink_to(kept.parent / "later")
    settle(kept)
    found(kept)
    assert kept_indices() == []
    save(kept.parent / "later" / "6.png")
    assert "a/later/6.png" in found(kept)
    settle(kept)
    settle(kept.parent / "later")
    found(kept)
    assert len(kept_indices()) == 1


def test_a_cache_that_cannot_be_written_does_not_matter(kept, tmp_path):
    (tmp_path / "cache").write_text("in its place")
    assert len(found(kept)) == 4
    assert len(found(kept)) == 4


def test_a_mapped_index_is_mapped_again_where_it_is_sent(kept):
    found(kept)
    index = load(kept, cache_gb=0)[0]._source.index
    assert isinstance(index.places, np.memmap)
    sent = pickle.dumps(index)
    assert len(sent) < 400
    assert pickle.loads(sent).names == index.names == ["a/0.png", "a/1.png", "b/2.png", "b/3.png"]


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
    assert len(kept_indices()) == 1


def forbidden(*args: object) -> None:
    raise AssertionError("the kept index makes this unnecessary")
