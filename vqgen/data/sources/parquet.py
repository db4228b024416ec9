"""Parquet files with a column of images, as the Hugging Face Hub has them; also Arrow files."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vqgen.data.formats import EXTENSIONS
from vqgen.data.skipped import one_line
from vqgen.data.sources.archive import find_shards
from vqgen.data.sources.base import Found
from vqgen.data.sources.splits import split_word
from vqgen.distributed import computed_by_main
from vqgen.errors import need
from vqgen.settings import DataConfig

TABLES = (".parquet", ".pq", ".arrow")
MANY_IMAGES = 1000  # beside tables; so many are what the user means
ARCHIVES = (".tar", ".tgz", ".gz", ".zip", ".npz", ".npy")


def open_parquet(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a table's file, of all files that a pattern stands for, or of a folder of such files only.

    Files whose names, or whose folders' names, say train, validation, test and so on are these parts of the data.

    Raises:
        InputError: a file is missing or damaged, or has no images.
    """
    found, others = computed_by_main(lambda: _find(path))
    if not found:
        return None
    need("pyarrow", "datasets", f"{found[0].suffix} files")
    from vqgen.data.sources.tables import Split, Table, open_tables

    root = Path(os.path.commonpath([file.parent for file in found]))
    groups: dict[str, list[Table]] = {}
    for file in found:
        name = file.relative_to(root).as_posix()
        groups.setdefault(_split_name(name), []).append(Table(file, f"{name}/"))
    notes = []
    if not any(split_word(name) for name in groups):
        if len(groups) > 1:
            notes.append(f"{', '.join(one_line(name) or path.name for name in groups)}: read as one data set")
        groups = {"": [table for tables in groups.values() for table in tables]}
    remedy = f"give the files to train on, such as data.source='{path / 'train-*.parquet'}', and data.val_source="
    splits = {name: Split(tables) for name, tables in groups.items()}
    explicit = not path.is_dir()
    return open_tables(splits, data, remedy=remedy, left_out=others, notes=notes, explicit=explicit)


def _find(path: Path) -> tuple[list[Path], Counter[str]]:
    """The tables that a path or a pattern stands for, and the number of other files in a folder by extension.

    There are none if the source is of another kind.
    """
    if not path.is_dir():
        return find_shards(path) if path.suffix.lower() in TABLES else [], Counter()
    tables, others, num_images = [], Counter[str](), 0
    for file in _files(path):
        extension = file.suffix.lower()
        if extension in TABLES and not file.name.startswith("cache-"):  # what `datasets` keeps of its own work
            tables.append(file)
        else:
            others[extension or "no extension"] += 1
            num_images += extension in EXTENSIONS
        if extension in ARCHIVES or num_images == MANY_IMAGES:
            return [], Counter()
    if num_images and (find_spec("pyarrow") is None or not _hold_more(tables, num_images)):
        return [], Counter()  # these tables describe the images beside them
    return sorted(tables), others


def _hold_more(tables: list[Path], num_images: int) -> bool:
    """Whether tables hold more images than lie beside them, such as those that a data set's README shows."""
    from vqgen.data.sources.arrow import num_rows
    from vqgen.data.sources.tables import holds_images

    return any(map(holds_images, tables[:1])) and sum(map(num_rows, tables)) > num_images


def _files(root: Path) -> Iterator[Path]:
    """All files in a folder that are not hidden; those of a folder before those of its subfolders."""
    with os.scandir(root) as entries:
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_folder = False
            with contextlib.suppress(OSError):  # a link that leads to itself
                is_folder = entry.is_dir()
            if is_folder:
                folders.append(Path(entry))
            else:
                yield Path(entry)
    for folder in folders:
        if folder.resolve() not in root.resolve().parents:  # a link to a folder above would lead round in a circle
            yield from _files(folder)


def _split_name(name: str) -> str:
    """The part that a table belongs to, such as `train` for data/train-00000-of-00002.parquet.

    If no part is named, it is the outermost folder, or empty.

    Args:
        name: the file's path from the folder that holds all tables.
    """
    *folders, stem = name.rpartition(".")[0].split("/")
    for word in (re.sub(r"[-_.]?\d+([-_.]of[-_.]\d+)?$", "", stem), *reversed(folders)):
        if split_word(word) is not None:
            return word
    return folders[0] if folders else ""
