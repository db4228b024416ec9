"""Parquet files with a column of images, as the Hugging Face Hub has them; also Arrow files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vqgen.data.formats import EXTENSIONS
from vqgen.data.sources.base import Found
from vqgen.data.sources.splits import split_word
from vqgen.data.sources.archive import find_shards
from vqgen.distributed import computed_by_main
from vqgen.errors import need
from vqgen.settings import DataConfig

TABLES = (".parquet", ".pq", ".arrow")


def open_parquet(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a table's file, of all files that a pattern stands for, or of a folder of such files only.

    Files whose names, or whose folders' names, say train, validation, test and so on are these parts of the data.

    Raises:
        InputError: a file is missing or damaged, or has no images.
    """
    found = computed_by_main(lambda: _find(path))
    if not found:
        return None
    need("pyarrow", "datasets", f"{found[0].suffix} files")
    from vqgen.data.sources.tables import Split, Table, open_tables

    root = Path(os.path.commonpath([file.parent for file in found]))
    groups: dict[str, list[Table]] = {}
    for file in found:
        name = file.relative_to(root).as_posix()
        groups.setdefault(_split_name(name), []).append(Table(file, f"{name}/"))
    remedy = f"give the files to train on, such as data.source='{path / 'train-*.parquet'}', and data.val_source="
    splits = {name: Split(tables) for name, tables in groups.items()}
    return open_tables(splits, data, remedy=remedy, explicit=not path.is_dir())


def _find(path: Path) -> list[Path]:
    """The tables that a path or a pattern stands for; none if it is of another kind."""
    if path.is_dir():
        return sorted(_below(path))
    return find_shards(path) if path.suffix in TABLES else []


def _below(root: Path) -> list[Path]:
    """The tables in a folder; none if it holds images, because tables beside images only describe these."""
    tables = []
    for file in _files(root):
        if file.name.lower().endswith(EXTENSIONS):
            return []
        if file.suffix in TABLES:
            tables.append(Path(file))
    return tables


def _files(root: Path) -> Iterator[Path]:
    """All files in a folder that are not hidden; those of a folder before those of its subfolders."""
    with os.scandir(root) as entries:
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry))
            else:
                yield Path(entry)
    for folder in folders:
        yield from _files(folder)


def _split_name(name: str) -> str:
    """The part that a table belongs to, such as `train` for data/train-00000-of-00002.parquet; empty if none is named.

    Args:
        name: the file's path from the folder that holds all tables.
    """
    *folders, stem = name.rpartition(".")[0].split("/")
    for word in (re.sub(r"[-_.]?\d+([-_.]of[-_.]\d+)?$", "", stem), *reversed(folders)):
        if split_word(word) is not None:
            return word
    return ""
