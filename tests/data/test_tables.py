"""Tables: which column has the images, which the classes, and how each kind of column is read."""

import errno
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.files import greys, load, png, save, write_table
from PIL import Image
from torch.utils.data import DataLoader

from vqgen.data.sources import arrow as arrow_module
from vqgen.data.sources import index as index_module
from vqgen.data.sources import open_source
from vqgen.errors import InputError
from vqgen.settings import DataConfig

COUNT = 12
LABELS = ["eel", "cat", "dog"] * 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vqgen"


def opened(source, **settings):
    return open_source("source", source, DataConfig(source=str(source), **settings))


def values(source) -> list[int]:
    """The grey of each image's first pixel."""
    return [source.open(row).convert("L").getpixel((0, 0)) for row in range(len(source.names))]


def columns_of_images() -> dict[str, pa.Array]:
    """Images 0 to 11 in every form that a column may have."""
    files = greys(COUNT)
    squares = [np.full((8, 8), k, np.uint8) for k in range(COUNT)]
    tensors = np.stack([np.stack([square] * 3, axis=2) for square in squares])
    return {
        "binary": pa.array(files),
        "large binary": pa.array(files, pa.large_binary()),
        "view": pa.array(files, pa.binary_view()),
        "dictionary": pa.array(files).dictionary_encode(),
        "list of bytes": pa.array([list(file) for file in files], pa.list_(pa.uint8())),
        "struct": pa.array([{"bytes": file, "path": "x.png"} for file in files]),
        "struct of bytes": pa.array([{"bytes": file} for file in files]),
        "grey": pa.array([square.tolist() for square in squares], pa.list_(pa.list_(pa.uint8()))),
        "grey of int64": pa.array([square.tolist() for square in squares]),
        "fixed lists": pa.array([square.tolist() for square in squares], pa.list_(pa.list_(pa.uint8(), 8), 8)),
        "height first": pa.array(list(map(np.ndarray.tolist, tensors)), pa.list_(pa.list_(pa.list_(pa.uint8())))),
        "channels first": pa.array(list(map(np.ndarray.tolist, np.moveaxis(tensors, 3, 1)))),
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(tensors),
    }


@pytest.mark.parametrize("kind", columns_of_images())
def test_columns_that_hold_images(tmp_path, kind):
    image = columns_of_images()[kind]
    write_table(tmp_path / "x.parquet", {"id": range(COUNT), "image": image}, row_group_size=5)
    with pa.ipc.new_file(tmp_path / "x.arrow", pa.schema([("image", image.type)])) as writer:
        for start in (0, 5):
            writer.write_batch(pa.record_batch([image[start : start + 5]], names=["image"]))
    for name, count in (("x.parquet", COUNT), ("x.arrow", 10)):
        train = opened(tmp_path / name).train
        assert values(train) == list(range(count))
        assert train.open(0).size == (8, 8)
        assert list(train.names) == [f"{name}/{k}" for k in range(count)]
        assert train.num_bytes(0) > 50


def test_compressed_arrow_files_are_copied(tmp_path, cache):
    files = pa.array([png(k, 64) + bytes(9000) for k in range(COUNT)])
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(tmp_path / "x.arrow", pa.schema([("image", files.type)]), options=options) as writer:
        writer.write_batch(pa.record_batch([files], names=["image"]))
    assert values(opened(tmp_path / "x.arrow").train) == list(range(COUNT))
    assert len([*(cache / "tables").glob("*.arrow")]) == 1


def test_a_null_struct_has_no_image_whatever_its_fields_hold(tmp_path):
    image = pa.StructArray.from_arrays([pa.array(greys(4))], ["bytes"], mask=pa.array([False, True, False, False]))
    with pa.ipc.new_file(tmp_path / "x.arrow", pa.schema([("image", image.type)])) as writer:
        writer.write_batch(pa.record_batch([image], names=["image"]))
    found = opened(tmp_path / "x.arrow")
    assert (values(found.train), found.left_out) == ([0, 2, 3], {"no image": 1})


def test_held_out_images_need_no_labels(tmp_path):
    write_table(tmp_path / "train.parquet", {"image": greys(COUNT), "label": LABELS})
    write_table(tmp_path / "test.parquet", {"image": greys(3)})
    train, held_out = load(tmp_path)
    assert (train.class_names, held_out.class_ids.tolist()) == (["cat", "dog", "eel"], [-1] * 3)
    assert "label: empty for 3 of 3 images of test: no class" in train.notes


def test_images_beside_a_table(tmp_path):
    for k in range(COUNT):
        save(tmp_path / "data" / "pics" / f"{k}.png", k)
    paths = [f"pics/{k}.png" for k in range(COUNT)]
    paths[2], paths[3] = str(tmp_path / "data" / "pics" / "2.png"), "https://example.org/3.png"
    os.mkfifo(tmp_path / "data" / "pics" / "pipe")
    paths[4] = "pics/pipe"
    for name, column in {"text": paths, "struct": [{"bytes": None, "path": path} for path in paths]}.items():
        write_table(tmp_path / "data" / f"{name}.parquet", {"image": column, "label": LABELS})
        found = opened(tmp_path / "data" / f"{name}.parquet").train
        assert [found.open(row).getpixel((0, 0)) for row in (0, 1, 2, 5)] == [0, 1, 2, 5]
        assert {os.path.relpath(path, tmp_path) for path in found.files[:4]} == {
            f"data/{name}.parquet",
            *(f"data/pics/{k}.png" for k in range(3)),
        }
        with pytest.raises(OSError, match=r"only the address https://example\.org/3\.png"):
            found.open(3)
        with pytest.raises(OSError, match="a pipe"):
            found.open(4)
        train, held_out = load(tmp_path / "data" / f"{name}.parquet")
        assert len(train) + len(held_out) == COUNT - 2


def test_empty_images_are_left_out_and_broken_ones_skipped(tmp_path):
    files: list = greys(COUNT)
    files[3], files[4], files[5] = None, b"", files[5][:-30]
    structs = [None if k == 3 else {"bytes": file, "path": None} for k, file in enumerate(files)]
    structs[6] = {"bytes": None, "path": None}
    for column, empty in ((files, 1), (structs, 2)):
        write_table(tmp_path / "x.parquet", {"image": column, "label": [None, *LABELS[1:]]})
        found = opened(tmp_path / "x.parquet")
        assert found.left_out == {"no image": empty}
        assert f"image: empty in {empty:,} rows, which are left out" in found.notes
        assert f"label: empty for 1 of {COUNT - empty} images: no class" in found.notes
        assert found.train.names[3] == "x.parquet/4"
        train, held_out = load(tmp_path / "x.parquet")
        assert len(train) + len(held_out) == COUNT - empty - 2


@pytest.mark.parametrize(
    ("label", "names", "ids"),
    [
        (["eel", "cat", "dog"], ["cat", "dog", "eel"], [2, 0, 1]),
        (["10", "9", "1"], ["1", "9", "10"], [2, 1, 0]),
        ([3, 20, 7], ["3", "7", "20"], [0, 2, 1]),
        ([-1, 5, 3], ["3", "5"], [-1, 1, 0]),
        ([-1, 1, None], ["1", "-1"], [1, 0, -1]),
        ([2.0, 10.0, None], ["2", "10"], [0, 1, -1]),
        ([float("nan"), 1.0, 0.0], ["0", "1"], [-1, 1, 0]),
        ([True, False, None], ["0", "1"], [1, 0, -1]),
        (["", "b", "a"], ["a", "b"], [-1, 1, 0]),
        (pa.array(["b", "a", "a"]).dictionary_encode(), ["a", "b"], [1, 0, 0]),
        (pa.array(["b", "a", None], pa.string_view()), ["a", "b"], [1, 0, -1]),
    ],
)
def test_labels_of_any_type(tmp_path, label, names, ids):
    write_table(tmp_path / "x.parquet", {"image": greys(3), "Label": label})
    train = opened(tmp_path / "x.parquet").train
    assert (train.class_names, train.class_ids.tolist()) == (names, ids)


def test_which_column_is_the_class(tmp_path):
    captions = [f"a photo of {k}" for k in range(COUNT)]
    halves = ["red", "blue"] * 6
    cases: dict[str, tuple[dict, dict, list[str], str]] = {
        "only": ({"species": LABELS}, {}, ["cat", "dog", "eel"], "species: the column of the classes"),
        "named": ({"colour": halves, "class": LABELS}, {}, ["cat", "dog", "eel"], "class: the column of the classes"),
        "asked": (
            {"colour": halves, "class": LABELS},
            {"label_column": "colour"},
            ["blue", "red"],
            r"colour: the column of the classes \(data.label_column\)",
        ),
        "several": (
            {"colour": halves, "kind": LABELS},
            {},
            [],
            "colour, kind: columns that may be classes; none is used",
        ),
        "captions": ({"text": captions}, {}, [], "text: 12 values for 12 images, so no classes"),
        "named captions": ({"label": captions}, {}, [], "label: 12 values for 12 images, so no classes"),
        "asked captions": ({"text": captions}, {"label_column": "text"}, sorted(captions, key=len), "text: the column"),
        "beside captions": ({"text": captions, "kind": LABELS}, {}, ["cat", "dog", "eel"], "kind: the column"),
        "sizes": ({"width": [8] * COUNT, "kind": LABELS}, {}, ["cat", "dog", "eel"], "kind: the column"),
        "lists": ({"label": [[0, 1]] * COUNT}, {}, [], "label: holds list<.*>, so no classes"),
        "fractions": ({"label": [0.5, 1.0] * 6}, {}, [], "label: holds fractions, so no classes"),
        "pandas": ({"kind": LABELS, "__index_level_0__": range(COUNT)}, {}, ["cat", "dog", "eel"], "kind: the column"),
    }
    for name, (columns, settings, class_names, note) in cases.items():
        write_table(tmp_path / f"{name}.parquet", {"image": greys(COUNT), **columns})
        found = opened(tmp_path / f"{name}.parquet", **settings)
        assert found.train.class_names == class_names, name
        assert any(re.match(note, line) for line in found.notes), found.notes
        assert not any("__index" in line for line in found.notes)


def test_which_column_has_the_images(tmp_path):
    two = write_table(tmp_path / "two.parquet", {"mask": greys(3, 100), "img": greys(3), "text": ["a", "b", "a"]})
    found = opened(two)
    assert values(found.train) == [0, 1, 2]
    assert "img: the column of the images; images are also in mask (data.image_column=)" in found.notes
    assert values(opened(two, image_column="mask").train) == [100, 101, 102]


def test_a_column_tells_the_parts_apart(tmp_path):
    parts = ["train", "train", "test", "valid"] * 3
    path = write_table(tmp_path / "x.parquet", {"image": greys(COUNT), "label": LABELS, "split": parts})
    found = opened(path)
    assert values(found.train) == [0, 1, 4, 5, 8, 9]
    assert found.held_out is not None
    assert values(found.held_out) == [3, 7, 11]
    assert found.held_out.class_ids.tolist() == [["cat", "dog", "eel"].index(LABELS[k]) for k in (3, 7, 11)]
    assert (found.split, found.left_out) == ("valid", {"of the split test": 3})
    assert "split: the column of the parts, test, train, valid" in found.notes
    write_table(path, {"image": greys(COUNT), "label": LABELS, "split": ["a", "b", "c", "d"] * 3})
    assert opened(path).held_out is None


def test_refused_tables(tmp_path):
    files = greys(COUNT)
    tables = {
        "no images": (
            {"id": range(COUNT), "text": LABELS},
            {},
            r"no column holds images; .* id \(int64\), text \(string\)$",
        ),
        "two": ({"a": files, "b": files}, {}, r"has images in the columns a, b; give image_column="),
        "not there": ({"image": files}, {"image_column": "x"}, r"image_column=x: no such column; .* image \(binary\)$"),
        "no image": (
            {"image": files, "id": LABELS},
            {"image_column": "id"},
            "image_column=id: it holds no images; the",
        ),
        "no label": (
            {"image": files, "id": LABELS},
            {"label_column": "x"},
            "label_column=x: no such column; .* are id$",
        ),
        "alone": ({"image": files}, {"label_column": "x"}, "label_column=x: no such column; .* none beside the images"),
        "lists": ({"image": files, "x": [[1]] * COUNT}, {"label_column": "x"}, "label_column=x: holds list<.*; give a"),
        "fractions": (
            {"image": files, "x": [0.5] * COUNT},
            {"label_column": "x"},
            "label_column=x: holds double;",
        ),
        "no rows": ({"image": pa.array([], pa.struct({"bytes": pa.binary()}))}, {}, "no image in .*: all 0 rows"),
        "empty": (
            {"image": pa.array([None] * 3, pa.struct({"bytes": pa.binary()}))},
            {},
            "all 3 rows are without one",
        ),
    }
    for name, (columns, settings, pattern) in tables.items():
        write_table(tmp_path / f"{name}.parquet", columns)
        with pytest.raises(InputError, match=pattern) as error:
            opened(tmp_path / f"{name}.parquet", **settings)
        assert str(error.value).startswith(f"source={tmp_path / name}.parquet: ")
    names = ["image", "label", "label"]
    twice = pa.Table.from_arrays([pa.array(files), pa.array(LABELS), pa.array(LABELS)], names=names)
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(InputError, match=r"twice\.parquet has two columns called label; rename one"):
        opened(tmp_path / "twice.parquet")


def test_threads_and_processes_read_a_table(tmp_path):
    path = write_table(tmp_path / "x.parquet", {"image": greys(200), "label": [k % 7 for k in range(200)]})
    train, _ = load(path, cache_gb=0)
    expected = [int(name.rpartition("/")[2]) for name in train.names]
    with ThreadPoolExecutor(4) as pool:
        assert [int(image[0, 0, 0]) for image in pool.map(train.read, range(len(train)))] == expected
    batches = [list(range(start, min(start + 16, len(train)))) for start in range(0, len(train), 16)]
    loader = DataLoader(train, sampler=batches, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [int(value) for pixels, _ in loader for value in pixels[:, 0, 0, 0]] == expected
    again = pickle.loads(pickle.dumps(opened(path).train))
    assert values(again) == list(range(200))


def test_copies_are_made_once_and_again_if_the_table_changes(tmp_path, cache, monkeypatch):
    path = write_table(tmp_path / "x.parquet", {"image": greys(COUNT)})
    opened(path)
    (copy,) = (cache / "tables").glob("*.arrow")
    made = copy.stat().st_mtime_ns
    opened(path)
    assert copy.stat().st_mtime_ns == made
    write_table(path, {"image": greys(COUNT + 1, 50)})
    assert values(opened(path).train) == list(range(50, 63))

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5))
    write_table(path, {"image": greys(COUNT + 2)})
    with pytest.raises(InputError, match=r"a copy of its images needs .* make room there, or set XDG_CACHE_HOME"):
        opened(path)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrow_module, "_as_files", full)
    with pytest.raises(InputError, match=r"cannot be copied to .*tables \(No space left on device\); make room there"):
        opened(path)
    assert not [*(cache / "tables").glob("*.tmp")]


def test_large_indices_are_kept_and_follow_changes(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(index_module, "KEPT_FROM", 5)
    path = write_table(tmp_path / "x.parquet", {"image": greys(COUNT), "label": LABELS})
    before = opened(path)
    assert len([*(cache / "index").glob("*/facts.json")]) == 1
    assert values(opened(path).train) == list(range(COUNT))
    assert opened(path).notes == before.notes
    for copy in (cache / "tables").glob("*.arrow"):
        copy.unlink()
    assert values(opened(path).train) == list(range(COUNT))
    write_table(path, {"image": greys(COUNT, 30), "label": LABELS})
    assert values(opened(path).train) == list(range(30, 30 + COUNT))
    assert opened(path, label_column="label").notes != opened(path).notes

    monkeypatch.chdir(tmp_path)
    relative = opened("x.parquet").train
    monkeypatch.chdir("/")
    assert relative.files == [str(path)]
    assert values(relative) == list(range(30, 30 + COUNT))


def test_another_machine_makes_its_own_copies(tmp_path, cache, monkeypatch):
    path = write_table(tmp_path / "x.parquet", {"image": greys(COUNT)})
    made = opened(path).train
    for copy in (cache / "tables").glob("*.arrow"):
        copy.unlink()
    # What a process elsewhere gets from the main process: the index and the facts, and no file of the cache.
    facts = {"parts": [{"tables": made.tables, "stores": made.stores, "class_names": []}], "image": "image"}
    facts |= {"split": "", "left_out": {}, "notes": []}
    monkeypatch.setattr("vqgen.data.sources.tables.kept_index", lambda *_: ([made.index], facts))
    assert values(opened(path).train) == list(range(COUNT))


def test_colours_survive(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), np.uint8)
    write_table(tmp_path / "x.parquet", {"image": pa.array([image.tolist() for image in pixels])})
    train = opened(tmp_path / "x.parquet").train
    np.testing.assert_array_equal(np.stack([np.asarray(train.open(row)) for row in range(4)]), pixels)
    file = BytesIO()
    Image.fromarray(pixels[0]).save(file, "PNG")
    write_table(tmp_path / "x.parquet", {"image": [file.getvalue()] * 2})
    np.testing.assert_array_equal(np.asarray(opened(tmp_path / "x.parquet").train.open(1)), pixels[0])
