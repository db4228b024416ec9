"""Layouts of images that people have, each with its right reading."""

import csv
import io
import json
import runpy
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from data.files import add_to_tar, load, png
from programs import SHARED, needs_shared

from vqgen.data.images import ImageSet
from vqgen.data.sources.splits import find_split, split_word
from vqgen.data.sources.tree import natural
from vqgen.errors import InputError

PNG = png((200, 30, 30))


def write(root: Path, paths: Iterable[str], content: bytes = PNG) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def ten(pattern: str) -> list[str]:
    return [pattern.format(i) for i in range(10)]


def classes(part: ImageSet) -> dict[str, int]:
    """The number of images of each class that has any; `-` for images without a class."""
    names = [*part.class_names, "-"]
    return dict(Counter(names[i] for i in part.class_ids))


def both(source: Path, **settings) -> dict[str, int]:
    train, held_out = load(source, **settings)
    return dict(Counter(classes(train)) + Counter(classes(held_out)))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    runpy.run_path(str(SHARED.parent / "cases" / "layouts.py"))["main"](folder)
    return folder


@needs_shared
def test_all_layouts_of_the_shared_collection(cases):
    expected = json.loads((cases / "expected.json").read_text())
    assert len(expected) >= 24
    for name, right in expected.items():
        train, held_out = load(right["source"], image_size=16)
        if right["held_out"] is None:
            assert len(train) + len(held_out) == right["train"], name
            assert not train.split, name
        else:
            assert (len(train), len(held_out)) == (right["train"], right["held_out"]), name
            assert train.split, name
        assert train.class_names == sorted(right["classes"], key=natural), name
        assert set(range(len(train.class_names))) <= set(train.class_ids), name
        assert train.channels == right["channels"], name
        said = "\n".join([*train.notes, *(f"{count} {what}" for what, count in train.left_out.items())])
        assert all(word in said for word in right["says"]), (name, said)


# Parts


@pytest.mark.parametrize(
    ("train", "held_out", "others"),
    [
        ("Train", "Test", []), ("training_set", "test_set", []), ("trainset", "validation_set", []),
        ("train2017", "val2017", ["test2017"]), ("train", "valid", ["test"]), ("TRN", "tst", []),
        ("train_images", "test_images", ["train_masks"]), ("images_train", "images_dev", ["images_test"]),
        ("seg_train", "seg_test", ["seg_pred"]), ("train-images", "eval-images", []), ("Train Set", "Val Set", []),
    ],
)  # fmt: skip
def test_names_of_parts(tmp_path, train, held_out, others):
    assert find_split([*others, held_out, train]) == (train, held_out, others)
    write(tmp_path, [f"{train}/{c}/{i}.png" for c in "ab" for i in range(3)])
    write(tmp_path, [f"{name}/a/{i}.png" for name in (held_out, *others) for i in range(2)])
    part, other = load(tmp_path)
    assert (classes(part), classes(other), part.split) == ({"a": 3, "b": 3}, {"a": 2}, f"{held_out}/")
    assert part.left_out == {f"{name}/": 2 for name in others}
    assert all(any(note.startswith(f"{name}/: 2 images") for note in part.notes) for name in others)


@pytest.mark.parametrize("names", [["train", "car", "plane"], ["test", "contest"], ["latest", "trainer", "devil"],
                                   ["cats_train", "dogs_train", "cats_test"], ["a", "b"]])  # fmt: skip
def test_classes_that_are_no_parts(tmp_path, names):
    write(tmp_path, [f"{name}/{i}.png" for name in names for i in range(4)])
    assert both(tmp_path) == dict.fromkeys(names, 4)
    assert split_word("latest") is None


def test_a_vehicle_called_train_beside_a_class_called_test_is_at_least_said(tmp_path):
    write(tmp_path, [f"{name}/{i}.png" for name in ("train", "bus") for i in range(4)])
    train, _ = load(tmp_path)
    assert train.class_names == ["bus", "train"]
    assert train.notes == ["train/: taken for classes like the folders beside, not for parts of a split"]


def test_parts_inside_each_class(tmp_path):
    write(tmp_path, [f"{c}/train/good/{i}.png" for c in ("bottle", "cable") for i in range(6)])
    write(tmp_path, [f"{c}/test/{kind}/{i}.png" for c in ("bottle", "cable") for kind in "xy" for i in range(2)])
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"bottle": 6, "cable": 6}, {"bottle": 4, "cable": 4})
    assert train.split == "*/test/"


def test_parts_that_hold_a_folder_of_their_own_name(tmp_path):
    write(tmp_path, [f"seg_train/seg_train/{c}/{i}.jpg" for c in ("sea", "street") for i in range(4)])
    write(tmp_path, [f"seg_test/seg_test/{c}/{i}.jpg" for c in ("sea", "street") for i in range(2)])
    write(tmp_path, ten("seg_pred/seg_pred/{}.jpg"))
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"sea": 4, "street": 4}, {"sea": 2, "street": 2})
    assert train.left_out["seg_pred/"] == 10


def test_only_a_folder_called_train(tmp_path):
    write(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(5)])
    train, held_out = load(tmp_path)
    assert dict(Counter(classes(train)) + Counter(classes(held_out))) == {"a": 5, "b": 5}
    assert train.split == ""
    write(tmp_path, ten("whatever/{}.png"))
    train, _ = load(tmp_path)
    assert (train.class_names, train.left_out) == (["a", "b"], {"whatever/": 10})


def test_held_out_images_without_classes(tmp_path):
    write(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(5)])
    write(tmp_path, ten("val/{}.png"))
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"a": 5, "b": 5}, {"-": 10})


def test_held_out_classes_that_are_written_in_another_case(tmp_path):
    write(tmp_path, [f"Train/{c}/{i}.png" for c in ("Cat", "Dog") for i in range(3)])
    write(tmp_path, [f"Test/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)])
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"Cat": 3, "Dog": 3}, {"Cat": 2, "Dog": 2})
    write(tmp_path, ["Test/fox/0.png"])
    with pytest.raises(InputError, match="no training image has the held-out class 'fox'"):
        load(tmp_path)


@pytest.mark.parametrize("level", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/train"])
def test_imagenet_at_any_level(tmp_path, level):
    data = tmp_path / "ILSVRC/Data/CLS-LOC"
    write(data, [f"train/{c}/{c}_{i}.JPEG" for c in ("n01440764", "n01443537") for i in range(4)])
    write(data, ten("val/ILSVRC2012_val_0000000{}.JPEG") + ten("test/ILSVRC2012_test_0000000{}.JPEG"))
    write(tmp_path, ["LOC_synset_mapping.txt", "ILSVRC/ImageSets/CLS-LOC/train_cls.txt"], b"n01440764 tench\n")
    write(tmp_path, ["ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000000.xml"], b"<annotation/>")
    train, held_out = load(tmp_path / level)
    assert train.class_names == ["n01440764", "n01443537"]
    if not level.endswith("train"):
        assert (len(train), classes(held_out), train.split) == (8, {"-": 10}, "val/")
        assert train.left_out["test/"] == 10
    else:
        assert len(train) + len(held_out) == 8


# Folders that are no classes


def test_wrappers(tmp_path):
    write(tmp_path / "one", ten("images/{}.jpg"))
    assert both(tmp_path / "one") == {"-": 10}
    write(tmp_path / "two", [f"archive/My Photos/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(5)])
    assert both(tmp_path / "two") == {"cat": 5, "dog": 5}
    write(tmp_path / "three", ten("train/images/{}.jpg") + ten("valid/images/{}.jpg"))
    write(tmp_path / "three", ten("train/labels/{}.txt"), b"0 0.5 0.5 1 1")
    train, held_out = load(tmp_path / "three")
    assert (classes(train), classes(held_out)) == ({"-": 10}, {"-": 10})
    write(tmp_path / "four", ten("images/train/{}.jpg") + ten("images/val/{}.jpg"))
    train, held_out = load(tmp_path / "four")
    assert (classes(train), classes(held_out), train.split) == ({"-": 10}, {"-": 10}, "val/")
    write(tmp_path / "five", ten("cats/{}.jpg"))  # one class
    assert both(tmp_path / "five") == {"cats": 10}


def test_masks_beside_images_are_left_out(tmp_path):
    write(tmp_path, ten("images/{}.png") + ten("masks/{}.png"))
    train, held_out = load(tmp_path)
    assert classes(train).keys() == classes(held_out).keys() == {"-"}
    assert len(train) + len(held_out) == 10
    assert train.left_out == {"masks/": 10}
    assert train.notes[0] == "masks/: 10 images that belong to images/, not used"
    write(tmp_path / "kinds", [f"{c}/{i}.png" for c in ("labels", "stamps") for i in range(4)])
    assert both(tmp_path / "kinds") == {"labels": 4, "stamps": 4}


def test_strays_beside_classes_and_classes_beside_many_images(tmp_path):
    write(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(10)])
    write(tmp_path, [f"{i}.png" for i in range(5)])
    train, held_out = load(tmp_path)
    assert (len(train) + len(held_out), train.class_names) == (20, ["a", "b"])
    assert train.left_out == {"beside the class folders": 5}
    assert train.notes == ["0.png, 1.png, 2.png ...: 5 images beside the class folders, not used"]
    write(tmp_path, [f"{i}.png" for i in range(15)])
    assert both(tmp_path) == {"a": 10, "b": 10, "-": 15}
    write(tmp_path, [f"{i}.png" for i in range(25)])
    assert both(tmp_path) == {"-": 45}


def test_numbers_in_names_of_classes_sort_as_numbers(tmp_path):
    names = ["class 10", "class 2", "class 2b", "10", "9", "007", "x"]
    write(tmp_path, [f"{c}/{i}.png" for c in names for i in range(3)])
    assert load(tmp_path)[0].class_names == ["007", "9", "10", "class 2", "class 2b", "class 10", "x"]


def test_what_is_left_out_is_counted_by_extension(tmp_path):
    write(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(4)])
    write(tmp_path, ["a/x.CR2", "b/x.cr2", "b/film.mp4", "README", "a/.hidden.png", "Thumbs.db", "__MACOSX/a/._0.png"])
    train, _ = load(tmp_path)
    assert train.left_out == {".cr2": 2, ".mp4": 1, "no extension": 1, "hidden": 3}


# Label files


def table(path: Path, rows: Iterable[Iterable[object]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


ROWS = [(f"{i}.png", "cat" if i % 2 else "dog") for i in range(10)]
PETS = {"cat": 5, "dog": 5}


@pytest.mark.parametrize(
    ("name", "rows", "delimiter", "encoding"),
    [
        ("labels.csv", [("file_name", "label"), *ROWS], ",", "utf-8"),
        ("Labels.CSV", [("Filename", "Breed"), *ROWS], ";", "utf-8-sig"),
        ("metadata.tsv", [("image", "class"), *ROWS], "\t", "utf-8"),
        ("anything.csv", [("label", "path"), *((c, f"./{n}") for n, c in ROWS)], ",", "utf-8"),
        ("list.csv", ROWS, ",", "utf-8"),  # no header
        ("ids.csv", [("id", "species"), *((n[:-4], c) for n, c in ROWS)], ",", "utf-8"),
        ("labels.csv", [("file_name", "label", "width"), *((n, c, 8) for n, c in ROWS)], ",", "utf-8"),
    ],
)
def test_tables_of_labels(tmp_path, name, rows, delimiter, encoding):
    write(tmp_path, ten("{}.png"))
    table(tmp_path / name, rows, delimiter, encoding)
    assert both(tmp_path) == PETS
    train, _ = load(tmp_path)
    assert name in train.notes[0]
    assert train.left_out == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", "\n".join(json.dumps({"file_name": n, "label": c}) for n, c in ROWS)),
        ("metadata.jsonl", "\n".join(json.dumps({"file_name": n, "meta": {"label": c}}) for n, c in ROWS)),
        ("labels.json", json.dumps(dict(ROWS))),
        ("dataset.json", json.dumps({"labels": ROWS})),  # StyleGAN's
        ("annotations.json", json.dumps([{"image": n, "category": c} for n, c in ROWS])),
    ],
)
def test_json_of_labels(tmp_path, name, content):
    write(tmp_path, ten("images/{}.png"))
    (tmp_path / name).write_text(content)
    assert both(tmp_path) == PETS


def test_tables_inside_the_parts_and_folders_that_are_no_classes(tmp_path):
    for part in ("train", "val"):
        write(tmp_path / part, ten("{}.png"))
        table(tmp_path / part / "metadata.csv", [("file_name", "label"), *ROWS])
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == (PETS, PETS)
    write(tmp_path / "shards", [f"{i % 3:02}/{i}.png" for i in range(10)])
    table(
        tmp_path / "shards" / "labels.csv", [("file_name", "label"), *((f"{int(n[0]) % 3:02}/{n}", c) for n, c in ROWS)]
    )
    assert both(tmp_path / "shards") == PETS
    assert "00/ 01/ 02/: these folders are not the classes, as there are labels" in load(tmp_path / "shards")[0].notes


def test_parts_by_a_column_and_by_the_tables_names(tmp_path):
    write(tmp_path / "column", ten("{}.png"))
    split = ["train", "train", "valid", "test"]
    rows = [("file_name", "label", "split"), *((n, c, split[i % 4]) for i, (n, c) in enumerate(ROWS))]
    table(tmp_path / "column" / "labels.csv", rows)
    train, held_out = load(tmp_path / "column")
    assert (len(train), len(held_out), train.split) == (6, 2, "valid in the label file")
    assert train.left_out == {"test in the label file": 2}
    write(tmp_path / "files", ten("images/{}.png"))
    table(tmp_path / "files" / "train.csv", [("id", "label"), *ROWS[:7]])
    table(tmp_path / "files" / "test.csv", [("id", "label"), *ROWS[7:]])
    train, held_out = load(tmp_path / "files")
    assert (len(train), len(held_out)) == (7, 3)


def test_which_column_is_the_class(tmp_path):
    write(tmp_path, ten("{}.png"))
    rows = [("file_name", "artist", "year"), *((n, c, 1900 + i % 3) for i, (n, c) in enumerate(ROWS))]
    table(tmp_path / "metadata.csv", rows)
    train, _ = load(tmp_path)
    assert train.class_names == []
    assert train.notes[0] == "metadata.csv: not used for classes; data.label_column= takes one of artist, year"
    assert both(tmp_path, label_column="artist") == PETS
    assert both(tmp_path, label_column="year") == {"1900": 4, "1901": 3, "1902": 3}
    with pytest.raises(InputError, match="label_column=colour is in no label file; the columns are artist, year"):
        load(tmp_path, label_column="colour")


def test_captions_and_measures_are_no_classes(tmp_path):
    write(tmp_path, ten("{}.png"))
    for values in ([f"a picture of {i}" for i in range(10)], [i / 7 for i in range(10)]):
        table(
            tmp_path / "metadata.csv",
            [("file_name", "text"), *((n, v) for (n, _), v in zip(ROWS, values, strict=True))],
        )
        train, _ = load(tmp_path)
        assert train.class_names == []
        assert train.notes[0] == "metadata.csv: not used for classes; data.label_column= takes one of text"


def test_images_that_a_table_does_not_name_have_no_class(tmp_path):
    write(tmp_path, ten("{}.png"))
    table(tmp_path / "labels.csv", [("file_name", "label"), *ROWS[:6], (ROWS[6][0], "")])
    assert both(tmp_path) == {"dog": 3, "cat": 3, "-": 4}
    assert "4 of 10 images have no label: no class" in load(tmp_path)[0].notes


def test_tables_that_are_refused(tmp_path):
    write(tmp_path, ten("{}.png"))
    path = table(tmp_path / "labels.csv", [("file_name", "label"), *ROWS, ("gone.png", "cat"), ("lost.png", "cat")])
    with pytest.raises(InputError, match=r"labels\.csv names 2 images that are not there, first gone\.png; fetch"):
        load(tmp_path)
    table(path, [("file_name", "label"), *((f"x{n}", c) for n, c in ROWS)])
    with pytest.raises(InputError, match=r"names 10 images that are not there, first x0\.png"):
        load(tmp_path)
    table(path, [("file_name", "label"), *ROWS])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "3.png", "label": "cat"}))
    assert both(tmp_path) == PETS  # the two agree
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "3.png", "label": "fox"}))
    with pytest.raises(
        InputError, match=r"labels\.csv and metadata\.jsonl disagree: 3\.png is cat in one and fox in the"
    ):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": ')
    with pytest.raises(InputError, match=r"metadata\.jsonl cannot be read \(.*\); repair it"):
        load(tmp_path)


def test_tables_of_something_else_are_named(tmp_path):
    write(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    table(tmp_path / "prices.csv", [("item", "price"), ("bread", 3)])
    (tmp_path / "package.json").write_text('{"name": "x", "version": "1"}')
    (tmp_path / "classes.json").write_text('["a", "b"]')
    train, _ = load(tmp_path)
    assert train.class_names == ["a", "b"]
    assert train.notes == ["prices.csv: not used, as it names none of the images"]
    assert train.left_out == {".csv": 1, ".json": 1}


# Files beside each image


def test_side_files_in_a_folder(tmp_path):
    write(tmp_path, ten("{}.jpg"))
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("a caption")
        (tmp_path / f"{i}.json").write_text(json.dumps({"place": {"city": "Rome" if i % 2 else "Oslo"}, "n": i}))
    train, _ = load(tmp_path)
    assert train.class_names == []
    assert train.notes == [
        ".json: 10 files, not used; data.label_key= takes one of place.city, n",
        ".txt: 10 files beside the images, not used; data.label_key=txt takes them as classes",
    ]
    assert train.left_out == {".json": 10, ".txt": 10}
    assert both(tmp_path, label_key="place.city") == {"Oslo": 5, "Rome": 5}
    assert both(tmp_path, label_key="txt") == {"a caption": 10}
    with pytest.raises(InputError, match=r"label_key=town is not in 0\.json; its keys are place\.city, n"):
        load(tmp_path, label_key="town")
    with pytest.raises(InputError, match=r"label_key=cls: no \.cls file lies beside an image"):
        load(tmp_path, label_key="cls")


# Archives


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Writes a zip, or a tar that is packed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content, None if name.endswith("0.png") else zipfile.ZIP_STORED)
        return path
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            add_to_tar(tar, name, content)
    return path


NAMES = ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.tar.bz2"]


@pytest.mark.parametrize("name", NAMES)
def test_archives_are_read_like_folders(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {
        f"pets/{part}/{c}/{i}.png": png(i * 20) for part in ("Train", "Test") for c in ("cat", "dog") for i in range(5)
    }
    files |= {"__MACOSX/pets/._x.png": b"", "pets/readme.md": b"", "pets/cover.png": PNG}
    train, held_out = load(pack(tmp_path / name, files), channels=1)
    assert (classes(train), classes(held_out), train.split) == (PETS, PETS, "Test/")
    assert train.left_out == {".md": 1, "hidden": 1, "beside the parts": 1}
    assert [int(train.read(i)[0, 0, 0]) for i in range(10)] == [0, 20, 40, 60, 80] * 2
    again, _ = load(tmp_path / name, channels=1, cache_gb=0)
    assert [int(again.read(i)[0, 0, 0]) for i in range(10)] == [0, 20, 40, 60, 80] * 2
    assert again.fingerprint == train.fingerprint
    moved = tmp_path / "elsewhere" / name
    moved.parent.mkdir()
    (tmp_path / name).rename(moved)
    assert load(moved, channels=1)[0].fingerprint == train.fingerprint


def test_a_table_inside_a_zip(tmp_path):
    content = io.StringIO()
    csv.writer(content).writerows([("file_name", "label"), *ROWS])
    path = pack(tmp_path / "a.zip", {**{n: PNG for n, _ in ROWS}, "labels.csv": content.getvalue().encode()})
    assert both(path) == PETS
    assert "labels.csv: the class is its column label" in load(path)[0].notes


def test_a_folder_of_shards_whose_names_are_the_parts(tmp_path):
    for part, count in (("train", 3), ("test", 1)):
        for shard in range(count):
            files = {f"{i}.{e}": c for i in range(4) for e, c in (("png", PNG), ("cls", b"%d" % (i % 2)))}
            pack(tmp_path / f"x-{part}-{shard:05}.tar", files)
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"0": 6, "1": 6}, {"0": 2, "1": 2})
    assert train.names[:2] == ["x-train-00000.tar/0", "x-train-00000.tar/1"]
    assert classes(load(tmp_path / "x-train-*.tar")[0]).keys() == {"0", "1"}


def test_labels_beside_the_images_of_shards(tmp_path):
    def shard(extension: str, contents: list[bytes]) -> Path:
        files = {
            f"{i:03}.{e}": c for i, content in enumerate(contents) for e, c in (("png", PNG), (extension, content))
        }
        return pack(tmp_path / f"{extension}.tar", files)

    names = [b"cat" if i % 2 else b"dog" for i in range(10)]
    assert both(shard("cls", names)) == PETS
    assert both(shard("cls", [b" 1\n", b"-1", b"3"] * 3)) == {"1": 3, "3": 3, "-": 3}
    objects = [json.dumps({"label": c.decode(), "kind": "x"}).encode() for c in names]
    assert both(shard("json", objects)) == PETS
    assert both(tmp_path / "json.tar", label_key="kind") == {"x": 10}
    assert both(shard("txt", names)) == {"-": 10}
    assert both(tmp_path / "txt.tar", label_key="txt") == PETS


def test_samples_with_several_images_keep_one(tmp_path):
    files = {f"{i}.{kind}.png": PNG for i in range(6) for kind in ("input", "target")}
    train, held_out = load(pack(tmp_path / "a.tar", files))
    assert len(train) + len(held_out) == 6
    assert train.left_out == {"target.png beside input.png": 6}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("member", ["../x.png", "/etc/x.png", "a/../../x.png"])
def test_paths_that_lead_out_of_an_archive_are_refused(tmp_path, monkeypatch, name, member):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = pack(tmp_path / name, {"0.png": PNG, member: PNG})
    with pytest.raises(InputError, match=rf"holds {member}, a path that leads out of it; pack it again without"):
        load(path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_bombs_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = pack(tmp_path / name, {"0.png": PNG, "x10.png": bytes(100 << 20)})
    with pytest.raises(InputError, match=r"is a bomb: .* unpacks from [\d,]+ to [\d,]+ bytes"):
        load(path)
    assert list((tmp_path / "cache").rglob("*.*")) == []


def test_zips_that_are_refused(tmp_path):
    path = pack(tmp_path / "a.zip", {"0.png": PNG, "1.png": PNG})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.zip: 0\.png is encrypted; unpack it, and give the folder"):
        load(path)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("0.png", PNG)
    with pytest.raises(InputError, match=r"0\.png is packed by method 14; unpack it"):
        load(tmp_path / "b.zip")
    path.write_bytes(content[:-30])
    with pytest.raises(InputError, match=r"a\.zip cannot be read \("):
        load(path)


# The split by a hash


def test_the_hash_split_keeps_an_image_of_each_class_for_training(tmp_path):
    write(tmp_path, [f"{c:02}/{i}.png" for c in range(30) for i in range(2)])
    train, held_out = load(tmp_path, val_fraction=0.9)
    assert set(train.class_ids) == set(range(30))
    assert 0 < len(held_out) <= 30
    write(tmp_path / "single", [f"{c}/x.png" for c in "abcd"] + ["e/0.png", "e/1.png"])
    train, held_out = load(tmp_path / "single", val_fraction=0.0)
    assert set(train.class_ids) == set(range(5))
    assert [held_out.class_names[i] for i in held_out.class_ids] == ["e"]
