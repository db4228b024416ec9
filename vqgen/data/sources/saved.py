"""Data sets that Hugging Face's `datasets` has saved with `save_to_disk`, with or without splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vqgen.data.sources.base import Found, reading
from vqgen.errors import InputError, need
from vqgen.settings import DataConfig

if TYPE_CHECKING:
    from vqgen.data.sources.tables import Split

DICT, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"


def open_saved(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a folder written by `save_to_disk`, read without the package `datasets`.

    Raises:
        InputError: a file is missing or damaged, or has no images.
    """
    is_dict = (path / DICT).is_file()
    if not is_dict and not (path / STATE).is_file():
        return None
    need("pyarrow", "datasets", f"a data set of `save_to_disk` such as {path.name}")
    from vqgen.data.sources.tables import open_tables

    names = [str(name) for name in _json(path / DICT, "splits")] if is_dict else [""]
    if not names or any(Path(name).name != name for name in names if is_dict):
        raise InputError(f"{path / DICT} lists no splits, or splits elsewhere; save the data set again")
    folder = next((path / name for name in names if (path / name / INFO).is_file()), path / names[0])
    features = _json(folder / INFO, "features") or {}
    splits = {name: _split(path / name, f"{name}/" if name else "") for name in names}
    remedy = f"give one of the folders in it, such as data.source={path / names[0]}"
    return open_tables(splits, data, remedy=remedy, features=features)


def _split(folder: Path, prefix: str) -> Split:
    """The Arrow files of a data set without splits.

    If rows were selected or shuffled in the data set before it was saved, some versions keep a list of those rows.
    """
    from vqgen.data.sources.arrow import num_rows, read_column
    from vqgen.data.sources.tables import Split, Table

    tables, first_row = [], 0
    for name in _file_names(folder, "_data_files"):
        tables.append(Table(folder / name, prefix, first_row))
        first_row += num_rows(folder / name)
    if not tables:
        raise InputError(f"{folder / STATE} lists no files; save the data set again")
    lists = [*_file_names(folder, "_indices_files"), *_file_names(folder, "_indices_data_files")]
    rows = [read_column(folder / name, "indices").to_numpy().astype(np.int64) for name in lists]
    return Split(tables, np.concatenate(rows) if rows else None)


def _file_names(folder: Path, key: str) -> list[str]:
    """The names of files beside a state.json, as it lists them."""
    found = _json(folder / STATE, key) or []
    names = [str(entry.get("filename", "")) if isinstance(entry, dict) else "" for entry in found]
    if any(Path(name).name != name or not name for name in names):
        raise InputError(f"{folder / STATE} names files that are not beside it; save the data set again")
    return names


def _json(path: Path, key: str) -> Any:
    with reading(path):
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content.get(key)
