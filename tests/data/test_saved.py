"""Data sets that Hugging Face's `datasets` has saved to disk."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from data.files import load
from PIL import Image

from vqgen.data.sources import open_source
from vqgen.errors import InputError
from vqgen.settings import DataConfig

NAMES = ["cat", "dog", "unicorn", "eel"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


def data_set(greys, labels=None) -> datasets.Dataset:
    images = [Image.new("L", (8, 8), grey) for grey in greys]
    labels = [[0, 1, 3][k % 3] for k in range(len(images))] if labels is None else labels
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=FEATURES)


def opened(source, **settings):
    return open_source("source", source, DataConfig(source=str(source), **settings))


def values(source) -> list[int]:
    return [source.open(row).getpixel((0, 0)) for row in range(len(source.names))]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def test_with_splits(tmp_path):
    parts = {"train": range(12), "validation": range(50, 53), "test": range(70, 75)}
    datasets.DatasetDict({name: data_set(greys) for name, greys in parts.items()}).save_to_disk(tmp_path / "pets")
    found = opened(tmp_path / "pets")
    assert found.held_out is not None
    assert (values(found.train), values(found.held_out)) == (list(range(12)), [50, 51, 52])
    assert list(found.train.names) == [f"train/{k}" for k in range(12)]
    assert (found.split, found.left_out) == ("validation", {"of the split test": 5})
    assert found.notes == [
        "image: the column of the images",
        "test: 5 images, not used",
        "label: the column of the classes",
    ]
    assert found.train.class_names == ["cat", "dog", "eel"]  # no unicorn was seen
    assert found.train.class_ids.tolist() == [0, 1, 2] * 4
    train, held_out = load(tmp_path / "pets")
    assert (len(train), len(held_out), train.channels) == (12, 3, 1)
    assert len(load(tmp_path / "pets" / "test")[0]) == 4


def test_without_splits(tmp_path):
    data_set(range(20)).save_to_disk(tmp_path / "pets", num_shards=3)
    found = opened(tmp_path / "pets")
    assert (values(found.train), found.held_out) == (list(range(20)), None)
    assert list(found.train.names) == [str(k) for k in range(20)]
    assert len(found.train.files) == 3


def test_a_single_split_for_testing_is_used_and_said(tmp_path):
    datasets.DatasetDict({"test": data_set(range(6))}).save_to_disk(tmp_path / "pets")
    found = opened(tmp_path / "pets")
    assert (len(found.train.names), found.held_out) == (6, None)
    assert "test: the only split, so all its images are used, and some of them held out" in found.notes


def test_images_without_a_class(tmp_path):
    data_set(range(4), [1, None, -1, 3]).save_to_disk(tmp_path / "pets")
    found = opened(tmp_path / "pets")
    assert (found.train.class_names, found.train.class_ids.tolist()) == (["dog", "eel"], [0, -1, -1, 1])
    assert "label: empty for 2 of 4 images: no class" in found.notes


def test_several_classes(tmp_path):
    labels = {name: datasets.ClassLabel(names=["a", "b"]) for name in ("fine_label", "coarse_label")}
    columns = {"img": [Image.new("RGB", (8, 8))] * 4, "fine_label": [0, 1, 0, 1], "coarse_label": [0, 0, 1, 1]}
    features = datasets.Features({"img": datasets.Image(), **labels})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "pets")
    found = opened(tmp_path / "pets")
    assert found.train.class_names == []
    assert found.notes[-1].startswith(
        "fine_label, coarse_label: columns that may be classes; none is used, data.label_c"
    )
    assert opened(tmp_path / "pets", label_column="coarse_label").train.class_ids.tolist() == [0, 0, 1, 1]


def test_arrays_of_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)
    for name, shape, array in (("hwc", (8, 6, 3), pixels), ("chw", (3, 8, 6), np.moveaxis(pixels, 3, 1))):
        features = datasets.Features({"pixels": datasets.Array3D(shape, "uint8")})
        datasets.Dataset.from_dict({"pixels": list(array)}, features=features).save_to_disk(tmp_path / name)
        train = opened(tmp_path / name).train
        np.testing.assert_array_equal(np.stack([np.asarray(train.open(row)) for row in range(5)]), pixels)


def test_rows_that_older_versions_list(tmp_path):
    """Selected and shuffled rows, which datasets 1.x saved as a list beside the whole table."""
    data_set(range(20)).save_to_disk(tmp_path / "pets", num_shards=2)
    rows = pa.table({"indices": pa.array([19, 3, 3, 10], pa.uint64())})
    with pa.ipc.new_stream(tmp_path / "pets" / "indices.arrow", rows.schema) as writer:
        writer.write_table(rows)
    state = json.loads((tmp_path / "pets" / "state.json").read_text())
    for key in ("_indices_files", "_indices_data_files"):
        (tmp_path / "pets" / "state.json").write_text(json.dumps({**state, key: [{"filename": "indices.arrow"}]}))
        assert values(opened(tmp_path / "pets").train) == [19, 3, 3, 10]
    rows = pa.table({"indices": pa.array([20], pa.uint64())})
    with pa.ipc.new_stream(tmp_path / "pets" / "indices.arrow", rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(InputError, match="lists rows that it does not have; save the data set again"):
        opened(tmp_path / "pets")


def test_files_of_the_cache(tmp_path):
    """A user may give the folder in which `datasets` keeps what it has loaded."""
    (tmp_path / "pets").mkdir()
    file = io.BytesIO()
    Image.new("L", (8, 8), 9).save(file, "PNG")
    for name, count in (("pets-train-00000-of-00002", 4), ("pets-train-00001-of-00002", 3), ("pets-test", 2)):
        table = pa.table({"image": [{"bytes": file.getvalue(), "path": None}] * count})
        with pa.ipc.new_stream(tmp_path / "pets" / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "pets" / "cache-0123.arrow").write_bytes(b"of a map()")
    (tmp_path / "pets" / "dataset_info.json").touch()
    found = opened(tmp_path / "pets")
    assert found.held_out is not None
    assert (len(found.train.names), len(found.held_out.names), found.split) == (7, 2, "pets-test")


def test_damaged_data_sets_are_refused(tmp_path):
    whole = datasets.DatasetDict({"train": data_set(range(9)), "test": data_set(range(3))})
    wrong = {
        "dataset_dict.json": (b"{", r"dataset_dict\.json cannot be read"),
        "train/state.json": (b"[]", r"state\.json cannot be read \(not a JSON object\)"),
        "test/state.json": (b"{}", r"state\.json lists no files; save the data set again"),
        "train/dataset_info.json": (b"\xff", r"dataset_info\.json cannot be read"),
        "train/data-00000-of-00001.arrow": (
            b"nothing",
            r"00001\.arrow cannot be read \(neither a Parquet nor an Arrow",
        ),
    }
    for number, (name, (content, pattern)) in enumerate(wrong.items()):
        whole.save_to_disk(tmp_path / str(number))
        (tmp_path / str(number) / name).write_bytes(content)
        with pytest.raises(InputError, match=pattern):
            opened(tmp_path / str(number))
    whole.save_to_disk(tmp_path / "gone")
    (tmp_path / "gone" / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        opened(tmp_path / "gone")
    (tmp_path / "gone" / "train" / "state.json").write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
    with pytest.raises(InputError, match="names files that are not beside it"):
        opened(tmp_path / "gone")
