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
from PIL import Image
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


def test_parts_that_were_unpacked_into_a_folder_of_their_name(tmp_path):
    write(tmp_path, [f"train/train/{c}.{i}.jpg" for c in ("cat", "dog") for i in range(4)] + ten("test1/test1/{}.jpg"))
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out), train.split) == ({"-": 8}, {"-": 10}, "test1/")


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "file_name,label\n" + "".join(f'{n}, "{c}"\n' for n, c in ROWS)),
        ("labels.csv", "file_name,label\n" + "".join(f"{n[:-4]}.JPG,{c}\n" for n, c in ROWS)),
        ("list.csv", ",photo,label\n" + "".join(f"{9 - i},{n},{c}\n" for i, (n, c) in enumerate(ROWS))),  # pandas'
        (
            "metadata.jsonl",
            "\n".join(
                json.dumps({"file_name": n, "label": c, "text": "two\u2028lines"}, ensure_ascii=False) for n, c in ROWS
            ),
        ),
    ],
    ids=["spaces", "other extension", "pandas", "line separators"],
)
def test_tables_that_programs_and_people_write(tmp_path, name, text):
    write(tmp_path, ten("{}.png"))
    (tmp_path / name).write_text(text, "utf-8")
    for part in load(tmp_path):
        assert [part.class_names[i] for i in part.class_ids] == [dict(ROWS)[name] for name in part.names]


@pytest.mark.parametrize(
    ("name", "text"), [("labels.csv", "id,class_name\n0,cat\n1,dog\n"), ("labels.txt", "0 a\n1 b\n")]
)
def test_a_table_of_the_classes_is_none_of_the_images(tmp_path, name, text):
    for numbers in (range(5), range(5, 10)):
        write(tmp_path, [f"{numbers[0] // 5}/{i}.png" for i in numbers])
    (tmp_path / name).write_text(text)
    assert both(tmp_path) == {"0": 5, "1": 5}
    assert load(tmp_path)[0].notes == [f"{name}: not used, as it names none of the images"]


def test_a_column_without_a_label_file_is_said(tmp_path):
    write(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    train, _ = load(tmp_path, label_column="breed")
    assert train.notes == ["label_column=breed: not used, as no label file names the images"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "cat\ndog\n"),
        ("classes.txt", "\ufeff00 cat\n01: dog\n"),
        ("classes.json", '{"00": "cat", "1": "dog"}'),
    ],
)
def test_names_of_classes_with_numbers(tmp_path, name, text):
    write(tmp_path, [f"{c}/{i}.png" for c in ("00", "01") for i in range(5)])
    (tmp_path / name).write_text(text, "utf-8")
    assert both(tmp_path) == {"cat": 5, "dog": 5}


def test_names_of_classes_that_count_from_one(tmp_path):
    write(tmp_path, [f"{c}/{i}.png" for c in "12" for i in range(5)])
    (tmp_path / "classes.txt").write_text("1 cat\n2 dog\n3 fox\n")
    assert both(tmp_path) == {"cat": 5, "dog": 5}
    (tmp_path / "classes.txt").write_text("0 dog\n1 crane\n2 crane\n")
    assert both(tmp_path) == {"crane (1)": 5, "crane (2)": 5}


def test_images_that_a_table_does_not_name_have_no_class(tmp_path):
    write(tmp_path, ten("{}.png"))
    table(tmp_path / "labels.csv", [("file_name", "label"), *ROWS[:6], (ROWS[6][0], ""), ("", "6 in all")])
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


def test_a_table_beside_an_archive_is_said(tmp_path):
    path = pack(tmp_path / "images.zip", dict.fromkeys(ten("{}.png"), PNG))
    table(tmp_path / "labels.csv", [("file_name", "label"), *ROWS])
    for source in (path, tmp_path):
        said = "labels.csv: beside the archives, not used; label files are read inside them only"
        assert load(source)[0].notes == [said]


def test_a_folder_of_shards_whose_names_are_the_parts(tmp_path):
    for part, count in (("train", 3), ("test", 1)):
        for shard in range(count):
            files = {f"{i}.{e}": c for i in range(4) for e, c in (("png", PNG), ("cls", b"%d" % (i % 2)))}
            pack(tmp_path / f"x-{part}-{shard:05}.tar", files)
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"0": 6, "1": 6}, {"0": 2, "1": 2})
    assert train.names[:2] == ["x-train-00000.tar/0", "x-train-00000.tar/1"]
    assert classes(load(tmp_path / "x-train-*.tar")[0]).keys() == {"0", "1"}


def test_a_few_pictures_beside_archives_are_left_out(tmp_path):
    files = {f"{c}/{i}.png": PNG for c in ("cat", "dog") for i in range(5)}
    pack(tmp_path / "images.zip", files)
    write(tmp_path, ["cover.png", "docs/sketch.jpg"])
    train, held_out = load(tmp_path)
    assert dict(Counter(classes(train)) + Counter(classes(held_out))) == PETS
    assert train.left_out["beside the archives"] == 2
    assert train.notes[0] == "cover.png, docs/sketch.jpg: 2 images beside the archives, not used"
    write(tmp_path, ten("{}.png"))  # so many are the images that are meant
    assert len(load(tmp_path)[0]) + len(load(tmp_path)[1]) == 12


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
    files = {f"{i}.{e}": c for i in range(10) for e, c in (("png", PNG), ("cls", b""), ("json", objects[i]))}
    assert both(pack(tmp_path / "empty.tar", files)) == PETS
    assert ".cls: 10 files beside the images, not used" in load(tmp_path / "empty.tar")[0].notes
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


# What strangers' data sets have taught


@pytest.mark.parametrize("name", ["img_align_celeba", "JPEGImages", "leftImg8bit", "My Photos", "all_data", "Raw"])
def test_names_of_folders_that_say_only_that_they_hold_images(tmp_path, name):
    write(tmp_path, ten(f"{name}/{name}/{{}}.jpg"))
    assert both(tmp_path) == {"-": 10}


def test_folders_of_images_that_are_numbered_are_no_classes(tmp_path):
    write(tmp_path / "scans", [f"HAM_images_part_{k}/{k}{i}.jpg" for k in (1, 2) for i in range(5)])
    assert both(tmp_path / "scans") == {"-": 10}
    write(tmp_path / "chests", [f"images_{k:03}/images/{k}{i}.png" for k in (1, 2) for i in range(5)])
    assert both(tmp_path / "chests") == {"-": 10}
    assert "images_001/ images_002/: no classes, by their names" in load(tmp_path / "chests")[0].notes[0]
    write(tmp_path / "pets", [f"{c}_images/{i}.jpg" for c in ("cat", "dog") for i in range(5)])
    assert both(tmp_path / "pets") == {"cat_images": 5, "dog_images": 5}


def test_folders_and_files_that_belong_to_images(tmp_path):
    write(
        tmp_path / "voc", ten("JPEGImages/{}.jpg") + ten("SegmentationClass/{}.png") + ten("SegmentationObject/{}.png")
    )
    assert both(tmp_path / "voc") == {"-": 10}
    write(tmp_path / "cub", [f"cub/images/{c}/{i}.jpg" for c in "ab" for i in range(4)])
    write(tmp_path / "cub", [f"segmentations/{c}/{i}.png" for c in "ab" for i in range(4)])
    assert both(tmp_path / "cub") == {"a": 4, "b": 4}
    write(tmp_path / "loose", ten("{}.jpg") + ten("masks/{}.png"))
    assert both(tmp_path / "loose") == {"-": 10}
    write(
        tmp_path / "city",
        [f"{k}/{p}/{i}.png" for k in ("leftImg8bit", "gtFine") for p in ("train", "val") for i in "ab"],
    )
    train, held_out = load(tmp_path / "city")
    assert (len(train), len(held_out), train.left_out) == (2, 2, {"gtFine/": 4})
    write(
        tmp_path / "files",
        [f"{c}/{c} ({i}){end}.png" for c in "ab" for i in range(4) for end in ("", "_mask", "_mask_1")],
    )
    train, _ = load(tmp_path / "files")
    assert both(tmp_path / "files") == {"a": 4, "b": 4}
    assert train.left_out == {"that belong to the images of the same names": 16}
    write(tmp_path / "inside", [f"{c}/{k}/{i}.png" for c in "ab" for k in ("images", "masks") for i in range(4)])
    assert both(tmp_path / "inside") == {"a": 4, "b": 4}
    assert load(tmp_path / "inside")[0].left_out == {"*/masks/": 8}
    write(tmp_path / "rooms", [f"{k}/{i}.png" for k in ("rgb", "depth") for i in range(4)])
    assert both(tmp_path / "rooms") == {"-": 4}
    write(tmp_path / "icons", [*ten("{}.png"), "9-preview.png"])
    assert both(tmp_path / "icons") == {"-": 11}


@pytest.mark.parametrize("names", [("trainA", "testA", "trainB", "testB"), ("A_train", "A_val", "B_train", "B_val")])
def test_folders_that_name_both_part_and_class(tmp_path, names):
    write(tmp_path, [f"{name}/{i}.png" for name in names for i in range(4 if "train" in name else 2)])
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"A": 4, "B": 4}, {"A": 2, "B": 2})
    assert "parts and classes (A, B) in one name" in train.notes[0]


def test_the_same_pictures_in_several_sizes_are_said(tmp_path):
    write(
        tmp_path, [f"icons/{size}/{i}.png" for size in ("16x16", "22x22", "48x48@2x") for i in ("open", "close", "new")]
    )
    assert any("the same pictures in several sizes" in note for note in load(tmp_path)[0].notes)
    write(tmp_path / "digits", [f"{digit}/{i}.png" for digit in range(3) for i in range(4)])
    assert load(tmp_path / "digits")[0].notes == []


def test_folders_inside_classes_and_folders_without_files_are_said(tmp_path):
    write(tmp_path, [f"{c}/large/{i}.png" for c in "ab" for i in range(4)])
    (tmp_path / "empty").mkdir()
    notes = load(tmp_path)[0].notes
    assert notes == ["empty/: no file in it", "a/large/: folders inside a class do not divide it"]


def test_words_in_names_that_may_be_classes_are_said(tmp_path):
    write(tmp_path, [f"train/{c}.{i}.jpg" for c in ("cat", "dog") for i in range(5)])
    assert "cat (5), dog (5): how the names begin" in "\n".join(load(tmp_path)[0].notes)


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{n} {c}\n" for n, c in ROWS),
        "".join(f"./{n}\t{c}\n" for n, c in ROWS),
        "# made by hand\n" + "".join(f"{n}, {c}\n" for n, c in ROWS),
        "image label\n" + "".join(f"{n[:-4]} {c}\n" for n, c in ROWS),
    ],
)
def test_lists_of_labels(tmp_path, text):
    write(tmp_path, ten("{}.png"))
    (tmp_path / "labels.txt").write_text(text)
    (tmp_path / "readme.txt").write_text("Ten images.\nMade by hand.")
    assert both(tmp_path) == PETS
    assert load(tmp_path)[0].left_out == {".txt": 1}


def test_a_list_without_a_header_whose_name_says_that_it_divides_the_images(tmp_path):
    write(tmp_path, ten("img_align_celeba/{}.jpg"))
    (tmp_path / "identity_CelebA.txt").write_text("".join(f"{i}.jpg {i % 2}\n" for i in range(10)))
    (tmp_path / "list_eval_partition.txt").write_text("".join(f"{i}.jpg {(i > 5) + (i > 7)}\n" for i in range(10)))
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"0": 3, "1": 3}, {"0": 1, "1": 1})


def test_lists_that_divide_the_images(tmp_path):
    write(tmp_path / "food", [f"images/{c}/{i}.jpg" for c in ("pie", "soup") for i in range(5)])
    (tmp_path / "food" / "meta").mkdir()
    for part, numbers in (("train", (0, 1, 2)), ("test", (3, 4))):
        text = "".join(f"{c}/{i}\n" for c in ("pie", "soup") for i in numbers)
        (tmp_path / "food" / "meta" / f"{part}.txt").write_text(text)
    train, held_out = load(tmp_path / "food")
    assert (classes(train), classes(held_out)) == ({"pie": 3, "soup": 3}, {"pie": 2, "soup": 2})
    assert "meta/test.txt, meta/train.txt: divides the images into train and test" in train.notes
    write(tmp_path / "few", ten("images/{}.jpg"))
    (tmp_path / "few" / "train.txt").write_text("0\n1\n")
    (tmp_path / "few" / "val.txt").write_text("2\n")
    train, _ = load(tmp_path / "few")
    assert (both(tmp_path / "few"), train.split) == ({"-": 10}, "")
    assert "train and val in label files: not used, as most images are in no part" in train.notes


def test_labels_of_held_out_images_only(tmp_path):
    write(tmp_path, [f"train/{c}/images/{i}.png" for c in ("n01", "n02") for i in range(5)] + ten("val/images/{}.png"))
    rows = "".join(f"{i}.png\tn0{i % 2 + 1}\t0\t0\t62\t62\n" for i in range(10))
    (tmp_path / "val" / "val_annotations.txt").write_text(rows)
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"n01": 5, "n02": 5}, {"n01": 5, "n02": 5})


def test_a_column_of_numbers_for_the_parts(tmp_path):
    write(tmp_path, ten("faces/{}.jpg"))
    rows = [("image_id", "partition"), *((f"{i}.jpg", 0 if i < 6 else 1 if i < 8 else 2) for i in range(10))]
    table(tmp_path / "list_eval_partition.csv", rows)
    train, held_out = load(tmp_path)
    assert (len(train), len(held_out)) == (6, 2)
    assert "the parts are its column partition, taken as 0 train, 1 val, 2 test" in "".join(train.notes)


@pytest.mark.parametrize("root", ["/home/me/data", r"C:\Users\me\data", "../elsewhere"])
def test_paths_of_other_machines(tmp_path, root):
    write(tmp_path, [f"images/{k}/{i}.png" for k in ("s1", "s2") for i in range(5)])
    slash = "\\" if "\\" in root else "/"
    rows = [
        (slash.join([root, "images", k, f"{i}.png"]), "dog" if i % 2 else k) for k in ("s1", "s2") for i in range(5)
    ]
    table(tmp_path / "labels.csv", [("path", "label"), *rows])
    assert both(tmp_path) == {"s1": 3, "s2": 3, "dog": 4}


@pytest.mark.parametrize("column", ["label", "grade"])
def test_labels_that_are_names_of_images_as_well(tmp_path, column):
    write(tmp_path, ten("{}.png"))
    rows = [("file", column), *((f"{i}.png", i % 2) for i in range(11))]
    table(tmp_path / "labels.csv", rows)
    with pytest.raises(InputError, match=r"labels\.csv names an image that is not there, first 10\.png"):
        load(tmp_path)
    table(tmp_path / "labels.csv", rows[:-1])
    assert both(tmp_path) == {"0": 5, "1": 5}


@pytest.mark.parametrize("name", ["train_labels.csv", "trainLabels.csv"])
def test_a_table_of_one_part_means_the_images_of_that_part(tmp_path, name):
    write(tmp_path, ten("train/{}.png") + ten("test/{}.png"))
    table(tmp_path / name, [("id", "label"), *((n[:-4], c) for n, c in ROWS)])
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == (PETS, {"-": 10})


def test_names_that_several_images_share(tmp_path):
    write(tmp_path, [f"{part}/{i}.png" for part in ("train", "test") for i in range(4)])
    for part, label in (("train", "cat"), ("test", "dog")):
        table(tmp_path / f"{part}.csv", [("id", "label"), *((f"{i}.png", "cat" if i % 2 else label) for i in range(4))])
    (tmp_path / "test.csv").write_text((tmp_path / "test.csv").read_text().replace("dog", "cat"))
    train, held_out = load(tmp_path)
    assert (classes(train), classes(held_out)) == ({"cat": 4}, {"cat": 4})
    write(tmp_path / "same", [f"{k}/{i}.png" for k in "ab" for i in range(4)])
    table(tmp_path / "same" / "labels.csv", [("file", "label"), *((f"{i}.png", "cat") for i in range(4))])
    with pytest.raises(InputError, match=r"labels\.csv names 0\.png, which is the name of several images; write their"):
        load(tmp_path / "same")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_letters_of_tables(tmp_path, encoding):
    write(tmp_path, ten("{}.png"))
    table(tmp_path / "labels.csv", [("file", "label"), *((n, c.replace("o", "ö")) for n, c in ROWS)], encoding=encoding)
    assert both(tmp_path) == {"cat": 5, "dög": 5}
    assert any("read as Windows-1252" in note for note in load(tmp_path)[0].notes) == (encoding == "cp1252")


def test_columns_of_zeros_and_ones(tmp_path):
    write(tmp_path, ten("{}.png"))
    rows = [("image", "cat", "dog"), *((n[:-4], float(c == "cat"), float(c == "dog")) for n, c in ROWS)]
    table(tmp_path / "GroundTruth.csv", rows)
    assert both(tmp_path) == PETS
    assert "GroundTruth.csv: its columns of 0 and 1 are the classes: cat, dog" in load(tmp_path)[0].notes
    table(
        tmp_path / "GroundTruth.csv", [("image", "smiling", "hat"), *((n, 1, i % 2) for i, (n, _) in enumerate(ROWS))]
    )
    assert both(tmp_path) == {"-": 10}


def test_what_may_be_labels_is_named(tmp_path):
    write(tmp_path, ten("{}.jpg"))
    write(
        tmp_path,
        ["imagelabels.mat", "Annotations/0.xml", "labels/0.txt", "labels/1.txt", "labels.feather"],
        b"0 0.5 0.5",
    )
    notes = load(tmp_path)[0].notes
    assert notes[0].startswith("Annotations/, imagelabels.mat, labels.feather and 1 more: not used; perhaps labels")
    assert ".mat: 1 file not read; Matlab's: save its arrays as .npz, such as images and labels" in notes


def test_two_labels_of_one_image(tmp_path):
    write(tmp_path, ten("{}.png"))
    table(tmp_path / "boxes.csv", [("file", "label"), *ROWS, *((n, "cat") for n, _ in ROWS)])
    with pytest.raises(
        InputError, match=r"boxes\.csv has dog and cat for 0\.png; leave one, or give data\.label_column="
    ):
        load(tmp_path)


def test_archives_that_are_one_class_each(tmp_path):
    for name in ("cat.zip", "dog.tar"):
        pack(tmp_path / "a" / name, {f"{i}.png": PNG for i in range(5)})
    assert both(tmp_path / "a") == PETS
    assert "cat.zip ...: each archive is taken for a class, as all have names" in load(tmp_path / "a")[0].notes
    for number in (1, 2):
        pack(tmp_path / "b" / f"images_{number:03}.zip", {f"images/{number}{i}.png": PNG for i in range(5)})
    assert both(tmp_path / "b") == {"-": 10}
    for name in ("first.zip", "second.zip"):
        pack(tmp_path / "c" / name, {f"{c}/{name}{i}.png": PNG for c in ("cat", "dog") for i in range(3)})
    assert both(tmp_path / "c") == {"cat": 6, "dog": 6}


def test_archives_by_content_and_in_folders(tmp_path):
    files = {f"{c}/{i}.png": PNG for c in ("cat", "dog") for i in range(5)}
    pack(tmp_path / "a.zip", files).rename(tmp_path / "a.cbz")
    assert both(tmp_path / "a.cbz") == PETS
    pack(tmp_path / "a.tar", files).rename(tmp_path / "a.images")
    assert both(tmp_path / "a.images") == PETS
    pack(tmp_path / "deep" / "data" / "a.zip", files)
    assert both(tmp_path / "deep") == PETS


def test_links_in_tars_are_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(5):
            add_to_tar(tar, f"./cat/{i}.png", PNG)
            for name, kind, target in (
                ("dog", tarfile.LNKTYPE, f"./cat/{i}.png"),
                ("fox", tarfile.SYMTYPE, f"../cat/{i}.png"),
            ):
                link = tarfile.TarInfo(f"./{name}/{i}.png")
                link.type, link.linkname = kind, target
                tar.addfile(link)
        link = tarfile.TarInfo("fox/lost.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/lost.png"
        tar.addfile(link)
    assert both(tmp_path / "a.tar") == {"cat": 5, "dog": 5, "fox": 5}
    assert load(tmp_path / "a.tar")[0].left_out == {"links out of the archive or to folders": 1}


def test_a_tga_in_a_tar_is_read(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 200)).save(content, "TGA")
    train, held_out = load(pack(tmp_path / "a.tar", {f"{i}.tga": content.getvalue() for i in range(4)}))
    assert len(train) + len(held_out) == 4


def test_a_list_of_classes_inside_a_shard(tmp_path):
    files = {f"{i}.{e}": c for i in range(10) for e, c in (("png", PNG), ("cls", b"%d" % ((i + 1) % 2)))}
    pack(tmp_path / "a.tar", {**files, "classes.txt": b"cat\ndog\n"})
    assert both(tmp_path / "a.tar") == PETS


def test_a_few_files_of_the_same_name_in_a_tar_are_no_samples(tmp_path):
    files = {
        f"{name}.{e}": PNG
        for name, kinds in (("logo", ("png", "gif")), ("a", ("png",)), ("b", ("png",)))
        for e in kinds
    }
    train, held_out = load(pack(tmp_path / "a.tar", files), val_fraction=0.1)
    assert sorted([*train.names, *held_out.names]) == ["a.tar/a", "a.tar/b", "a.tar/logo.gif", "a.tar/logo.png"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train", b"\x80\x04}", "a pickle, which may run any program and is not read; save its arrays as .npz"),
        ("x.csv", b"label,pixel1\n", "a table; give the folder of the images that it names"),
        ("x.png", PNG, "a single image; give a folder"),
        ("x.7z", b"7z", r"a file of an unknown type \(unpack it first\); give"),
        ("folder/data_batch_1", b"\x80\x04}", "folder/data_batch_1 is a pickle, which may run any program: save its"),
        ("folder/x.svg", b"<svg/>", r"these are drawings: convert them to \.png"),
    ],
)
def test_what_is_said_of_files_that_are_no_source(tmp_path, name, content, said):
    write(tmp_path / "source", [name], content)
    with pytest.raises(InputError, match=said.replace("folder/", "")):
        load(tmp_path / "source" / name.partition("/")[0])
