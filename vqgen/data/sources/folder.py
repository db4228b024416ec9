"""A folder of image files; its subfolders are the classes."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from vqgen.data.pixels import checked_size, open_image
from vqgen.data.skipped import one_line
from vqgen.data.sources.base import EXTENSIONS, Found, NoImages, reading
from vqgen.data.sources.listing import list_images
from vqgen.distributed import computed_by_main
from vqgen.errors import InputError
from vqgen.settings import DataConfig

logger = logging.getLogger("vqgen")

HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")


def open_folder(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a folder, split by its subfolders `train` and `val` (or `test`) if it has them.

    Raises:
        InputError: the folder has no images, or cannot be listed.
    """
    return computed_by_main(lambda: _parts(path)) if path.is_dir() else None


def _parts(root: Path) -> Found:
    with reading(root):
        names = list_images(root)
    if not names:
        message = f"no image in this folder (looked for {' '.join(EXTENSIONS)})"
        if any(root.glob("*.tar")):
            raise InputError(f"{message}; give {root / '*.tar'} for its shards")
        raise NoImages(message)
    folders = {name.split("/")[0] for name in names if "/" in name}
    if "train" not in folders or not folders <= {"train", *HELD_OUT_FOLDERS}:
        return Found(FolderSource(root, names))
    train = FolderSource(root, names, "train/")
    split = next((f"{folder}/" for folder in HELD_OUT_FOLDERS if folder in folders), "")
    return Found(train, FolderSource(root, names, split), split) if split else Found(train)


class FolderSource:
    """The image files of a folder.

    Args:
        root: the folder.
        names: paths of its images, relative to it.
        top: the subfolder to take images from, with a slash at its end; the folders directly in it are the classes.
    """

    def __init__(self, root: Path, names: list[str], top: str = ""):
        self.root = root
        self.names = [name for name in names if name.startswith(top)]
        paths = [name.removeprefix(top).split("/") for name in self.names]
        loose = [path[0] for path in paths if len(path) == 1]
        if 0 < len(loose) < len(paths):
            logger.warning(f"{root / top}: no classes, as images lie beside the folders, such as {one_line(loose[0])}")
        folders = [] if loose else sorted({path[0] for path in paths})
        ids = {name: i for i, name in enumerate(folders)}
        # Class names are written as UTF-8, which has no place for a file name's undecodable bytes: escape those.
        self.class_names = [name.encode("utf-8", "backslashreplace").decode() for name in folders]
        self.class_ids = np.array([ids.get(path[0], -1) for path in paths], np.int64)

    @property
    def files(self) -> list[str]:
        return [os.path.join(self.root, name) for name in self.names]

    def num_bytes(self, row: int) -> int:
        info = os.stat(self._path(row))
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for a writer
            raise OSError("a pipe, a socket or a device")
        return checked_size(info.st_size)

    def open(self, row: int) -> Image.Image:
        with open(self._path(row), "rb", buffering=0) as file:
            return open_image(file.read(), self.names[row])

    def _path(self, row: int) -> str:
        return os.path.join(self.root, self.names[row])  # much faster than with a Path
