"""A folder of image files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqgen.data.sources.archive import FEW_BESIDE_ARCHIVES, archives_in
from vqgen.data.sources.base import Found, file_size, reading
from vqgen.data.sources.labels import some_names
from vqgen.data.sources.listing import Files, list_files, signature
from vqgen.data.sources.tree import Listing, open_tree
from vqgen.distributed import computed_by_main
from vqgen.settings import DataConfig

MAX_WATCHED = 1000  # label files; checking that more have not changed would take as long as reading them


def open_folder(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a folder; see `open_tree`. None if it holds archives, with only a few pictures beside them.

    Raises:
        InputError: the folder has no images, or cannot be listed.
    """
    if not path.is_dir():
        return None
    found = open_tree(FolderTree(path), data)
    few = len(found.train.names) + len(found.held_out.names if found.held_out else ()) <= FEW_BESIDE_ARCHIVES
    return None if few and computed_by_main(lambda: archives_in(path)) else found


def _empty_folders(found: Files) -> list[str]:
    """One line that names the folders without a file below them."""
    full: set[str] = set()
    for folder in {name.rpartition("/")[0] for name in found.names}:
        while folder and f"{folder}/" not in full:
            full.add(f"{folder}/")
            folder = folder.rpartition("/")[0]
    empty = sorted(found.folders.keys() - full - {""})
    return [f"{some_names(empty)}: no file in {'it' if len(empty) == 1 else 'them'}"] if empty else []


class FolderTree:
    """The files of a folder; see `Tree`.

    Args:
        root: the folder.
    """

    dotted = False

    def __init__(self, root: Path):
        self.root = root
        self._folders: dict[str, list[int]] = {}

    @property
    def key(self) -> Sequence[str]:
        return ["folder", os.path.realpath(self.root)]

    def listing(self) -> Listing:
        with reading(self.root):
            found = list_files(self.root)
        self._folders = found.folders
        left_out = {"hidden": found.hidden} if found.hidden else {}
        places = np.zeros((len(found.names), 0), np.int64)
        return Listing(found.names, places, left_out, found.lasting, _empty_folders(found))

    def state(self, read: Sequence[str]) -> Any:
        if len(read) > MAX_WATCHED:
            return None
        return {"folders": self._folders, "files": {name: self._file_state(name) for name in read}}

    def is_current(self, state: Any) -> bool:
        with contextlib.suppress(OSError):
            folders = all(signature(os.path.join(self.root, name)) == known for name, known in state["folders"].items())
            return folders and all(self._file_state(name) == known for name, known in state["files"].items())
        return False

    def _file_state(self, name: str) -> list[int]:
        info = os.stat(os.path.join(self.root, name))
        return [info.st_size, info.st_mtime_ns]

    def beside(self, name: str) -> bytes | None:
        path = self.root / name
        with reading(path):
            return path.read_bytes() if path.is_file() else None

    def inner(self, path: str) -> str:
        return path

    def name_of(self, path: str, key: str, place: np.ndarray) -> str:
        return path

    def files(self, names: Sequence[str]) -> Sequence[str]:
        return [os.path.join(self.root, name) for name in names]

    def num_bytes(self, name: str, place: np.ndarray) -> int:
        return file_size(os.path.join(self.root, name))

    def read(self, name: str, place: np.ndarray) -> bytes:
        with open(os.path.join(self.root, name), "rb", buffering=0) as file:
            return file.read()
