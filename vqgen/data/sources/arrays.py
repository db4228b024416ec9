"""Images in arrays: an .npz, a folder of IDX files like MNIST's, or the built-in digits."""

from __future__ import annotations

import gzip
import re
import struct
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from vqgen.data.sources.base import MAX_CLASSES, Found, numbers_as_names, reading
from vqgen.errors import InputError
from vqgen.settings import DataConfig

IDX_NAMES = {  # the array's name in an .npz: its file's name in MNIST
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def open_digits(source: str, path: Path, data: DataConfig) -> Found | None:
    """The 22,000 digits of MNIST that come with the package, for the source `digits`."""
    if source != "digits":
        return None
    with resources.as_file(resources.files("vqgen.data") / "embedded" / "digits.npz") as embedded:
        return _parts(_read_npz(embedded), [embedded])


def open_npz(source: str, path: Path, data: DataConfig) -> Found | None:
    """The arrays of an .npz: `images` with `labels` or `class_ids`, or `train_images`, `test_images` and so on.

    Raises:
        InputError: the file is damaged, or its arrays are not images.
    """
    return _parts(_read_npz(path), [path]) if path.is_file() and path.suffix == ".npz" else None


def open_idx(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a folder whose files have the names of MNIST's, compressed or not.

    Raises:
        InputError: a file is damaged.
    """
    paths = ((key, path / f"{name}{suffix}") for suffix in (".gz", "") for key, name in IDX_NAMES.items())
    files = {key: file for key, file in paths if file.is_file()}
    if "train_images" not in files:
        return None
    return _parts({key: _read_idx(file) for key, file in files.items()}, [*files.values()])


class ArraySource:
    """The images of an array.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C), C from 1 to 4.
        labels: (N,) class ids from 0, -1 for an image without a class; None if no image has one.
        files: the files that the arrays come from.

    Raises:
        InputError: an array has another shape or type.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, files: list[Path]):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0 or images[0, 0, 0].size > 4:
            raise InputError(f"the images are {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, 1 to 4)")
        labels = np.full(len(images), -1) if labels is None else labels
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < -1:
            raise InputError(f"the labels are {labels.dtype} {labels.shape}; give {len(images)} integers, 0 or more")
        if labels.max() >= MAX_CLASSES:
            raise InputError(f"one of the labels is {labels.max()}; number the classes from 0, up to {MAX_CLASSES - 1}")
        self.files = files
        self.images = images.reshape(*images.shape[:3], -1)  # (N, H, W, C)
        self.names = [str(row) for row in range(len(images))]
        self.class_ids = labels.astype(np.int64)
        self.class_names = numbers_as_names(self.class_ids)

    def num_bytes(self, row: int) -> int:
        return self.images[row].nbytes

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row].squeeze(2) if self.images.shape[3] == 1 else self.images[row])


def _parts(arrays: dict[str, np.ndarray], files: list[Path]) -> Found:
    parts = {
        prefix: ArraySource(images, arrays.get(f"{prefix}labels", arrays.get(f"{prefix}class_ids")), files)
        for prefix in ("", "train_", "test_")
        if (images := arrays.get(f"{prefix}images")) is not None
    }
    train = parts.get("", parts.get("train_"))
    if train is None:
        raise InputError("no array named `images` or `train_images`; write one with numpy.savez")
    held_out = parts.get("test_")
    return Found(train, held_out, "test_images" if held_out else "")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # np.load alone would also accept an .npy, and calls any other file a pickle; ZipFile says what is wrong.
    with reading(path), zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files if re.search("(images|labels|class_ids)$", key)}


def _read_idx(path: Path) -> np.ndarray:
    with reading(path):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, num_axes = struct.unpack_from(">3sB", content)
        if kind != b"\0\0\x08":
            raise ValueError("not an IDX file of unsigned bytes")
        shape = struct.unpack_from(f">{num_axes}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
