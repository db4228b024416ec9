"""Tables of images, in Parquet or Arrow files: which column has the images, which the classes, and which the parts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from vqgen.data.formats import EXTENSIONS
from vqgen.data.pixels import DECODE_ERRORS, checked_size, open_image
from vqgen.data.skipped import one_line
from vqgen.data.sources.arrow import as_file, copy_images, located, num_rows, read_column, schema_of
from vqgen.data.sources.base import Found, file_size
from vqgen.data.sources.index import Index, kept_index
from vqgen.data.sources.labels import CLASS_COLUMNS, SPLIT_COLUMNS, are_classes, as_label, shown_columns
from vqgen.data.sources.splits import TRAIN, find_split, split_word
from vqgen.data.sources.tree import class_ids_of
from vqgen.errors import InputError
from vqgen.settings import DataConfig

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "pixels", "pixel_values", "jpg", "jpeg", "png", "webp")
PROBED_ROWS = 16


@dataclass(frozen=True)
class Table:
    """A file with rows.

    Attributes:
        path: a Parquet file, or an Arrow file of either kind.
        prefix: what the names of its images begin with; the number of the row follows.
        first_row: the number of its first row.
    """

    path: Path
    prefix: str
    first_row: int = 0


@dataclass(frozen=True)
class Split:
    """A part of a data set: its tables, and the rows to take of them; None takes all."""

    tables: Sequence[Table]
    rows: np.ndarray | None = None


class TableSource:
    """The images of a table's column.

    Args:
        tables: the files of the table.
        stores: for each of them, the Arrow file with its images, which is the file itself or a copy of the images.
        index: the images; a place is the table's number, the offset and the size, which is negative for a path.
        class_names: the classes in the order of their ids.
    """

    def __init__(self, tables: Sequence[str], stores: Sequence[str], index: Index, class_names: list[str]):
        self.tables, self.stores, self.index = tables, stores, index
        self.names: Sequence[str] = index.names
        self.class_ids = index.class_ids
        self.class_names = class_names

    @property
    def files(self) -> list[str]:
        linked = np.flatnonzero(self.index.places[:, 2] < 0)
        return [*self.tables, *(self._linked(int(row)) for row in linked)]

    def num_bytes(self, row: int) -> int:
        size = int(self.index.places[row, 2])
        return checked_size(size) if size >= 0 else file_size(self._file(row))

    def open(self, row: int) -> Image.Image:
        num_bytes = self.num_bytes(row)
        if self.index.places[row, 2] >= 0:
            return open_image(self._stored(row))
        path = self._file(row)
        with open(path, "rb") as file:
            return open_image(file.read(num_bytes), path)

    def _file(self, row: int) -> str:
        """The path of an image that lies outside the table.

        Raises:
            OSError: the table has an address of the web instead.
        """
        path = self._linked(row)
        if "://" in path:
            raise OSError(f"not in the table, which has only the address {one_line(path)[:100]}")
        return path

    def _linked(self, row: int) -> str:
        return _path_beside(self.tables[self.index.places[row, 0]], os.fsdecode(self._stored(row)))

    def _stored(self, row: int) -> bytes:
        number, offset, size = self.index.places[row]
        with open(self.stores[number], "rb") as file:  # one file object for all threads would have only one position
            file.seek(offset)
            return file.read(abs(size))


def open_tables(
    splits: Mapping[str, Split],
    data: DataConfig,
    *,
    remedy: str,
    features: Mapping[str, Any] | None = None,
    left_out: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    explicit: bool = False,
) -> Found:
    """The images of tables.

    All processes must call it at the same point.

    Args:
        splits: the parts by name; an empty name if there is only one.
        data: the settings.
        remedy: what the user can do if it is not clear which part is for training.
        features: the columns' meaning as Hugging Face's `datasets` writes it; None takes it from the files.
        left_out: number of other files that are not used, by extension.
        notes: what else to say.
        explicit: whether the user has named these files and no others, so that it is no surprise that they are used.

    Raises:
        InputError: no column holds images, a setting names no column, or a file cannot be read.
    """
    meaning = json.dumps([features, data.image_column, data.label_column, list(splits)])
    rows = [hashlib.sha256(split.rows.tobytes()).hexdigest() for split in splits.values() if split.rows is not None]
    key = ["tables", *_paths(splits), *rows, meaning]
    indices, facts = kept_index(
        key,
        lambda state: state == _state([file for file, *_ in state]),
        lambda: _index(splits, data, features, remedy, explicit),
    )
    sources = []
    for index, part in zip(indices, facts["parts"], strict=True):
        for table, store in zip(part["tables"], part["stores"], strict=True):
            if store != table and not os.path.exists(store):  # this is another machine than the main process's
                copy_images(Path(table), facts["image"], Path(store))
        sources.append(TableSource(part["tables"], part["stores"], index, part["class_names"]))
    train, held_out = (*sources, None)[:2]
    assert train is not None
    return Found(train, held_out, facts["split"], {**(left_out or {}), **facts["left_out"]}, [*notes, *facts["notes"]])


def _paths(splits: Mapping[str, Split]) -> list[str]:
    return [os.path.abspath(table.path) for split in splits.values() for table in split.tables]


def _state(files: Sequence[str]) -> list[list[Any]] | None:
    """Size and time of modification of files; None if one is missing."""
    with contextlib.suppress(OSError):
        return [[file, info.st_size, info.st_mtime_ns] for file in files for info in [os.stat(file)]]
    return None


def _index(
    splits: Mapping[str, Split], data: DataConfig, features: Mapping[str, Any] | None, remedy: str, explicit: bool
) -> tuple[list[Index], dict[str, Any], Any]:
    splits, notes = _split_by_column(splits, features, data.label_column)
    train, held_out, others = _choose(list(splits), remedy)
    first = splits[train].tables[0].path
    schema = schema_of(first)
    features = _features(schema) if features is None else features
    image, said = _image_column(first, schema, features, data.image_column)
    notes += said
    left_out: Counter[str] = Counter()
    for name in others:
        rows = splits[name].rows
        count = sum(num_rows(table.path) for table in splits[name].tables) if rows is None else len(rows)
        left_out[f"of the split {name}" if name else "of no split"] += count
        notes.append(f"{one_line(name) or 'files of no split'}: {count:,} images, not used")
    if len(splits) == 1 and not explicit and (word := split_word(train)) is not None and word[0] not in TRAIN:
        notes.append(f"{one_line(train)}: the only split, so all its images are used, and some of them held out")

    label, said = _label_column(splits[train], image, schema, features, data.label_column)
    notes += said
    indices, parts = [], []
    for name in [train] if held_out is None else [train, held_out]:
        known = label if label in schema_of(splits[name].tables[0].path).names else None
        index, part, num_empty = _index_split(splits[name], image, known, features)
        indices.append(index)
        parts.append(part)
        where = f" of {one_line(name)}" if name else ""
        if num_empty:
            left_out["no image"] += num_empty
            notes.append(f"{one_line(image)}: empty in {num_empty:,} rows{where}, which are left out")
        if label is not None and (count := int((index.class_ids < 0).sum())):
            notes.append(f"{one_line(label)}: empty for {count:,} of {len(index.class_ids):,} images{where}: no class")
    facts = {"parts": parts, "image": image, "split": held_out or "", "left_out": dict(left_out), "notes": notes}
    return indices, facts, _state([*_paths(splits), *(store for part in parts for store in part["stores"])])


def _choose(names: list[str], remedy: str) -> tuple[str, str | None, list[str]]:
    """The split to train on, the one to hold out if there is one, and the others."""
    if len(names) == 1:
        return names[0], None, []
    if (found := find_split(names)) is not None:
        return found
    trains = [name for name in names if (word := split_word(name)) is not None and word[0] in TRAIN]
    if len(trains) != 1:
        shown = ", ".join(one_line(name) or "files of no split" for name in names)
        raise InputError(f"the splits are {shown}: it is not clear which one is for training; {remedy}")
    return trains[0], None, [name for name in names if name != trains[0]]


def _index_split(
    split: Split, image: str, label: str | None, features: Mapping[str, Any]
) -> tuple[Index, dict[str, Any], int]:
    """The images of a split, the facts of its source, and the number of rows without an image."""
    places, names, stores = [], [], []
    for number, table in enumerate(tqdm(split.tables, "indexing", unit=" files", leave=False, disable=None)):
        store, spans = located(table.path, image)
        stores.append(os.path.abspath(store))
        places.append(np.insert(spans, 0, number, axis=1))
        names += [f"{table.prefix}{row}" for row in range(table.first_row, table.first_row + len(spans))]
    taken = np.concatenate(places)  # (N, 3): table, offset, size
    rows = np.arange(len(taken)) if split.rows is None else split.rows
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(taken):
        raise InputError(f"{split.tables[0].path.parent} lists rows that it does not have; save the data set again")
    filled = rows[taken[rows, 1] >= 0]
    if not len(filled):
        raise InputError(f"no image in {_shown(split.tables)}: all {len(rows):,} rows are without one")
    labels: Sequence[str | None] = [None] * len(taken)
    if label is not None:
        labels = _labels(split.tables, label)
    class_ids, class_names = class_ids_of([labels[row] for row in filled], _names_of_numbers(features, label))
    index = Index.of([names[row] for row in filled], taken[filled], class_ids)
    part = {"tables": _paths({"": split}), "stores": stores, "class_names": class_names}
    return index, part, len(rows) - len(filled)


def _shown(tables: Sequence[Table]) -> str:
    return one_line(tables[0].path.name) + (f" and {len(tables) - 1} more files" if len(tables) > 1 else "")


def stream_columns(
    schema: pa.Schema, features: Mapping[str, Any], data: DataConfig
) -> tuple[str, str | None, dict[str, str], list[str]]:
    """The columns of rows that come one after another: images, classes or None, names of numbers, and what to say.

    Without a look at the rows, only a column that is declared to be classes, or is called so, is taken as the class.

    Raises:
        InputError: no column is declared to hold images, or there is no such column as a setting names.
    """
    images = [name for name in schema.names if _is(features.get(name), "Image")]
    images = images or [field.name for field in schema if _is_file(_plain(field.type)) or _is_bytes(field.type)]
    image, notes = _chosen_image("the data set", schema, images, data.image_column)
    labels = [field.name for field in schema if field.name != image and _is_label(field.type)]
    if data.label_column is not None and data.label_column not in labels:
        shown = shown_columns(labels) or "none"
        raise InputError(f"label_column={data.label_column}: no column of names or numbers; such columns are {shown}")
    declared = [name for name in labels if _is(features.get(name), "ClassLabel")]
    named = [name for word in CLASS_COLUMNS for name in declared or labels if name.lower() == word]
    label = data.label_column or next(iter(named or (declared if len(declared) == 1 else [])), None)
    if label is not None:
        notes.append(f"{one_line(label)}: the column of the classes")
    elif labels:
        notes.append(f"{', '.join(map(one_line, labels))}: not used for classes; data.label_column= takes one of them")
    return image, label, _names_of_numbers(features, label) or {}, notes


# Columns


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The columns' meaning as `datasets` writes it into a file; empty if another program has written the file."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return dict(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
    return {}


def _is(feature: Any, kind: str) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == kind


def _names_of_numbers(features: Mapping[str, Any], label: str | None) -> dict[str, str] | None:
    """The names of a column's classes by their numbers; None if the column is not declared to be classes."""
    feature = features.get(label or "")
    names = feature.get("names") if isinstance(feature, dict) and _is(feature, "ClassLabel") else None
    return {str(number): str(name) for number, name in enumerate(names)} if isinstance(names, list) else None


def holds_images(path: Path) -> bool:
    """Whether a table has a column of images, and not only of their paths.

    Raises:
        InputError: the file is damaged.
    """
    schema = schema_of(path)
    named = [field.name for field in schema if not _is_text(field.type)]
    return any(_holds_images(path, schema, _features(schema), name) for name in named)


def _image_column(
    path: Path, schema: pa.Schema, features: Mapping[str, Any], wanted: str | None
) -> tuple[str, list[str]]:
    """The column with the images, and what to say about it.

    Raises:
        InputError: there is no such column, or no images in it, or it is not clear which column it is.
    """
    names = schema.names if wanted is None else [wanted] if wanted in schema.names else []
    found = [name for name in names if _holds_images(path, schema, features, name)]
    return _chosen_image(path.name, schema, found, wanted)


def _chosen_image(where: str, schema: pa.Schema, found: list[str], wanted: str | None) -> tuple[str, list[str]]:
    """The one of the columns found to hold images that is taken, and what to say about it."""
    columns = shown_columns([f"{field.name} ({field.type})"[:100] for field in schema]) or "none"
    if wanted is not None and wanted not in schema.names:
        raise InputError(f"image_column={wanted}: no such column; the columns of {where} are {columns}")
    found = [name for name in found if wanted in (None, name)]
    if not found:
        which = f"image_column={wanted}: it holds no images" if wanted else "no column holds images"
        raise InputError(f"{which}; the columns of {where} are {columns}")
    named = [name for known in IMAGE_COLUMNS for name in found if name.lower() == known]
    if len(found) > 1 and not named:
        raise InputError(
            f"{where} has images in the columns {', '.join(map(one_line, found))}; give image_column= with one of them"
        )
    image = (named or found)[0]
    others = [one_line(name) for name in found if name != image]
    more = f"; images are also in {', '.join(others)} (data.image_column=)" if others else ""
    return image, [f"{one_line(image)}: the column of the images{more}"]


def _holds_images(path: Path, schema: pa.Schema, features: Mapping[str, Any], name: str) -> bool:
    kind = _plain(schema.field(name).type)
    if _is(features.get(name), "Image") or pa.types.is_struct(kind):
        return _is_file(kind) or pa.types.is_binary(kind) or pa.types.is_string(kind)
    if not (_is_bytes(kind) or _is_text(kind) or pa.types.is_nested(kind) or isinstance(kind, pa.DictionaryType)):
        return False
    values = [value for value in read_column(path, name, PROBED_ROWS) if value.is_valid]
    if _is_text(kind):
        texts = [value.as_py() for value in values]
        return any(
            text.lower().endswith(EXTENSIONS) and os.path.isfile(_path_beside(str(path), text)) for text in texts
        )
    for value in values:
        with contextlib.suppress(DECODE_ERRORS):
            content = as_file(value)
            if content is not None and open_image(content):
                return True
    return False


def _label_column(
    split: Split, image: str, schema: pa.Schema, features: Mapping[str, Any], wanted: str | None
) -> tuple[str | None, list[str]]:
    """The column with the classes, None if there is none, and what to say about it.

    Raises:
        InputError: there is no such column as the user wants, or it cannot be classes.
    """
    others = [name for name in schema.names if name != image and not name.startswith("__")]  # pandas adds an index
    if wanted is not None:
        if wanted not in others:
            shown = shown_columns(others) or "none beside the images"
            raise InputError(f"label_column={wanted}: no such column; the columns are {shown}")
        kind = schema.field(wanted).type
        if not _is_label(kind) or (pa.types.is_floating(kind) and _has_fractions(_labels(split.tables, wanted))):
            raise InputError(f"label_column={wanted}: holds {kind}; give a column of names or whole numbers")
        return wanted, [f"{one_line(wanted)}: the column of the classes (data.label_column)"]
    known = [name for name in others if _is(features.get(name), "ClassLabel")]
    candidates = known or [
        name for name in others if name.lower() not in SPLIT_COLUMNS and _is_label(schema.field(name).type)
    ]
    named = [name for word in CLASS_COLUMNS for name in candidates if name.lower() == word]
    notes = [
        f"{one_line(field.name)}: holds {field.type}, so no classes"
        for field in schema
        if field.name.lower() in CLASS_COLUMNS[:4] and field.name in others and not _is_label(field.type)
    ]
    usable = []
    for name in named[:1] or candidates:
        values = [value for value in _labels(split.tables, name) if value is not None]
        if pa.types.is_floating(schema.field(name).type) and _has_fractions(values):
            notes.append(f"{one_line(name)}: holds fractions, so no classes")
            continue
        repeated = name in known or are_classes(values)
        if values and repeated and (len(set(values)) > 1 or name in known or name in named):
            usable.append(name)
        elif values and not repeated:
            count = f"{len(set(values)):,} values for {len(values):,} images"
            notes.append(f"{one_line(name)}: {count}, so no classes (data.label_column={one_line(name)} takes them)")
    if len(usable) == 1:
        return usable[0], [f"{one_line(usable[0])}: the column of the classes", *notes]
    if usable:
        shown = ", ".join(map(one_line, usable))
        notes.append(f"{shown}: columns that may be classes; none is used, data.label_column= takes one of them")
    return None, notes


def _split_by_column(
    splits: Mapping[str, Split], features: Mapping[str, Any] | None, label: str | None
) -> tuple[Mapping[str, Split], list[str]]:
    """The parts that a column called split or the like tells apart in a single split, and what to say about it.

    Without such a column the splits are as before.
    """
    (split, *others), first = splits.values(), next(iter(splits.values())).tables[0].path
    schema = schema_of(first)
    columns = [name for word in SPLIT_COLUMNS for name in schema.names if name.lower() == word and name != label]
    column = next((name for name in columns if _is_label(schema.field(name).type)), None)
    if others or column is None or split.rows is not None:
        return splits, []
    names = _names_of_numbers(_features(schema) if features is None else features, column) or {}
    values = [names.get(value, value) if value is not None else None for value in _labels(split.tables, column)]
    found = {value for value in values if value is not None}
    if None in values or len(found) < 2 or find_split(sorted(found)) is None:
        return splits, []
    array = np.array(values)
    parts = {name: Split(split.tables, np.flatnonzero(array == name)) for name in dict.fromkeys(values) if name}
    return parts, [f"{one_line(column)}: the column of the parts, {', '.join(map(one_line, sorted(found)))}"]


def _labels(tables: Sequence[Table], column: str) -> list[str | None]:
    """The label of each row.

    Raises:
        InputError: a table has no such column, or fractions in it.
    """
    labels: list[str | None] = []
    for table in tables:
        for chunk in read_column(table.path, column).chunks:
            encoded = chunk if isinstance(chunk, pa.DictionaryArray) else chunk.dictionary_encode()
            known = [as_label(value) for value in encoded.dictionary.to_pylist()]
            labels += [None if row is None else known[row] for row in encoded.indices.to_pylist()]
    if "-1" in (distinct := set(labels)) and distinct - {None} != {"-1", "1"}:  # -1 means no class
        labels = [None if label == "-1" else label for label in labels]
    return labels


def _has_fractions(labels: Sequence[str | None]) -> bool:
    return any(label is not None and not re.fullmatch(r"[+-]?\d+", label) for label in labels)


def _is_label(kind: pa.DataType) -> bool:
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    fixed = pa.types.is_fixed_size_binary(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or fixed


def _is_file(kind: pa.DataType) -> bool:
    """Whether values are a struct of `bytes` and `path`, or one of them, which is how `datasets` stores images."""
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind.fields}
    content, path = fields.pop("bytes", pa.null()), fields.pop("path", pa.null())
    return _is_bytes(content) or (pa.types.is_null(content) and _is_text(path) and not fields)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _path_beside(table: str, path: str) -> str:
    return path if "://" in path else os.path.join(os.path.dirname(table), path)
