"""Images in arrays: an .npz or .npy, a folder of IDX files like MNIST's, or the built-in digits."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from vqgen.data.deep import ValuesImage
from vqgen.data.skipped import one_line
from vqgen.data.sources.base import Found, reading
from vqgen.data.sources.index import Names
from vqgen.data.sources.listing import is_hidden
from vqgen.data.sources.splits import TRAIN, find_split, split_word
from vqgen.data.sources.tree import class_ids_of
from vqgen.errors import InputError
from vqgen.settings import DataConfig

# Names of arrays without the word for their part, the surest first.
IMAGES = ("images", "image", "imgs", "img", "x", "data", "pixels", "samples", "inputs", "input", "arr_0")
LABELS = ("labels", "label", "class_ids", "y", "targets", "target", "classes", "cls", "fine_labels", "arr_1")
CLASS_NAMES = ("class_names", "label_names", "names", "categories", "classes")
MAX_CHANNELS = 4
MIN_SIDE = 8  # of images that are rows; shorter rows are other things
IDX = re.compile(
    r"(?P<before>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(\.gz)?", re.IGNORECASE
)


def open_digits(source: str, path: Path, data: DataConfig) -> Found | None:
    """The 22,000 digits of MNIST that come with the package, for the source `digits`."""
    if source != "digits":
        return None
    with resources.as_file(resources.files("vqgen.data") / "embedded" / "digits.npz") as embedded:
        return _found(_read_npz(embedded), [embedded])


def open_npz(source: str, path: Path, data: DataConfig) -> Found | None:
    """The arrays of an .npz, whatever the usual names, or the one of an .npy; or those of a folder of such files.

    Images are (N, H, W), (N, H, W, C), (N, C, H, W), or squares as rows (N, H * H). Labels are (N,) or (N, 1),
    numbers or names, or one-hot (N, K).

    Raises:
        InputError: the file is damaged, or its arrays are not images.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file() or path.suffix.lower() not in (".npz", ".npy"):
        return None
    return _found(_read_npz(path) if path.suffix.lower() == ".npz" else {"images": _read_npy(path)}, [path])


def _open_folder(folder: Path) -> Found | None:
    """The arrays of the files in a folder, which are called as in one .npz; or .npy files that are one class each."""
    with reading(folder):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".npz", ".npy"))
    if not files:
        return None
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        before = f"{file.stem}_" if split_word(file.stem) is not None else ""
        read = _read_npz(file) if file.suffix.lower() == ".npz" else {"": _read_npy(file)}
        for name, array in read.items():
            key = f"{before}{name}".removesuffix("_") if name else file.stem
            if key in arrays:
                raise InputError(f"{file.name} and another file both have an array {one_line(key)}; give one of them")
            arrays[key] = array
    known = any(_bare(name) in IMAGES for name in arrays)
    if not known and len(files) > 1 and all(file.suffix.lower() == ".npy" for file in files):
        return _one_class_each(arrays, files)
    return _found(arrays if known or len(arrays) > 1 else {"images": next(iter(arrays.values()))}, files)


def _one_class_each(arrays: Mapping[str, np.ndarray], files: list[Path]) -> Found:
    """The images of .npy files whose names are the classes, such as those of Quick, Draw!.

    Raises:
        InputError: they are no images, or not of one size.
    """
    notes: list[str] = []
    images = [_as_images(name, array, notes) for name, array in arrays.items()]
    kinds = {(array.dtype, array.shape[1:]) for array in images}
    if len(kinds) > 1:
        raise InputError(f"{files[0].name} and the files beside it have images of several sizes; give one of the files")
    labels: list[str | None] = [name for name, array in zip(arrays, images, strict=True) for _ in range(len(array))]
    notes = [f"{files[0].name} ...: each of {len(files)} files is taken for a class", *dict.fromkeys(notes)]
    return Found(ArraySource(np.concatenate(images), labels, files), notes=notes)


def open_idx(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a folder whose files have the names of MNIST's, packed or not.

    Raises:
        InputError: a file is damaged.
    """
    files: dict[str, Path] = {}
    found = _idx_files(path) if path.is_dir() else []
    for file in found:
        if (match := IDX.fullmatch(file.name)) is not None:
            part = "train" if match["part"].lower() == "train" else "test"
            files[f"{match['before']}{part}_{match['what'].lower()}"] = file
    if not any(key.endswith("train_images") for key in files):
        return None
    return _found({key: _read_idx(file) for key, file in files.items()}, [*files.values()])


def _idx_files(folder: Path) -> list[Path]:
    """The files in a folder, or in folders that alone lie in it, as in MNIST/raw."""
    with reading(folder):
        entries = sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    return _idx_files(entries[0]) if len(entries) == 1 and entries[0].is_dir() else entries


class ArraySource:
    """The images of an array.

    Args:
        images: (N, H, W, C) of any numbers, C from 1 to 4.
        labels: each image's class; None for an image without a class.
        files: the files that the arrays come from.
        names_of_numbers: names of classes whose labels are numbers.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: list[str | None],
        files: list[Path],
        names_of_numbers: Mapping[str, str] | None = None,
    ):
        self.files = files
        self.images = images
        self.names = Names.of([str(row) for row in range(len(images))])
        self.class_ids, self.class_names = class_ids_of(labels, names_of_numbers)

    def num_bytes(self, row: int) -> int:
        return self.images[row].nbytes

    def open(self, row: int) -> Image.Image:
        values = self.images[row].squeeze(2) if self.images.shape[3] == 1 else self.images[row]
        return Image.fromarray(values) if values.dtype == np.uint8 else ValuesImage.of(values)


def _found(arrays: Mapping[str, np.ndarray], files: list[Path]) -> Found:
    """The parts of a file's arrays: by the words train, val, test in their names, such as x_train."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        word = split_word(name)
        parts.setdefault(word[0] if word is not None else "", {})[name] = array
    notes: list[str] = []
    left_out: dict[str, int] = {}
    lists = [_class_names(name, array) for name, array in arrays.items()]
    class_names = next((one for one in lists if one is not None), {})
    found = {word: _source(named, files, notes, class_names) for word, named in parts.items()}
    sources = {word: one for word, one in found.items() if one is not None}
    if not sources:
        known = ", ".join(f"{one_line(name)} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise InputError(
            f"no array of images among: {known or 'no arrays'}; write one called images, uint8 (N, H, W, 3)"
        )
    split = find_split(sources)
    if split is None:
        first = next((word for word in ("", *TRAIN) if word in sources), next(iter(sources)))
        split = first, None, [word for word in sources if word != first]
    train, held_out, others = split
    for other in others:
        what = f"{other or 'other'} images"
        left_out[what] = len(sources[other].images)
        notes.append(f"{what}: {left_out[what]:,} images of this part, not used")
    if held_out is None:
        return Found(sources[train], left_out=left_out, notes=notes)
    return Found(sources[train], sources[held_out], f"{held_out} images of the arrays", left_out, notes)


def _class_names(name: str, array: np.ndarray) -> Mapping[str, str] | None:
    """The names of classes 0, 1 ... if an array is called so; names that repeat are each image's class."""
    if _bare(name) not in CLASS_NAMES or array.ndim != 1 or array.dtype.kind not in "US":
        return None
    if len(np.unique(array)) < len(array):
        return None
    return {str(i): label for i, label in enumerate(_texts(array)) if label is not None}


def _source(
    named: Mapping[str, np.ndarray], files: list[Path], notes: list[str], class_names: Mapping[str, str]
) -> ArraySource | None:
    """The images of one part with their labels; None if no array holds images.

    Raises:
        InputError: the arrays have images' names, but are none.
    """
    images_name = _choose(named, IMAGES, lambda array: array.ndim in (3, 4) and array.dtype.kind in "buif")
    if images_name is None:
        return None
    images = _as_images(images_name, named[images_name], notes)
    labels_name = _choose(named, LABELS, lambda array: array.ndim in (1, 2) and array.dtype.kind in "biufUS")
    labels: list[str | None] = [None] * len(images)
    if labels_name is not None:
        labels = _as_labels(labels_name, named[labels_name], images, notes)
    for name in named:
        if name not in (images_name, labels_name) and _class_names(name, named[name]) is None:
            notes.append(f"{one_line(name)} {named[name].shape}: not used")
    return ArraySource(images, labels, files, class_names)


def _choose(named: Mapping[str, np.ndarray], known: tuple[str, ...], fits: Callable[[np.ndarray], bool]) -> str | None:
    """The name of the array that has a known name, or of the only one that fits."""
    bare = {name: _bare(name) for name in named}
    for known_name in known:
        for name in named:
            if bare[name] == known_name and _class_names(name, named[name]) is None:
                return name
    others = [name for name in named if fits(named[name]) and bare[name] not in (*IMAGES, *LABELS, *CLASS_NAMES)]
    return others[0] if len(others) == 1 else None


def _bare(name: str) -> str:
    """An array's name without the word for its part: `x_train` and `train_x` are x, `train` is images."""
    word = split_word(name)
    if word is None:
        return name.lower()
    rest = re.sub(rf"(^|[_\W]){word[0]}($|[_\W])|{word[0]}", "", name.lower()).strip("_-. ")
    return rest or "images"


def _as_images(name: str, array: np.ndarray, notes: list[str]) -> np.ndarray:
    """The images of an array as (N, H, W, C)."""
    side = math.isqrt(array.shape[1]) if array.ndim == 2 else 0
    if side >= MIN_SIDE and side**2 == array.shape[1]:
        notes.append(f"{one_line(name)} {array.shape}: taken as rows of {side} x {side} pixels")
        array = array.reshape(-1, side, side)
    shape = array.shape
    first = array.ndim == 4 and shape[1] <= MAX_CHANNELS < shape[3]
    fits = array.ndim == 3 or (array.ndim == 4 and (first or shape[3] <= MAX_CHANNELS))
    single = array.ndim == 3 and shape[2] <= MAX_CHANNELS
    if not fits or single or 0 in shape or array.dtype.kind not in "buif":
        raise InputError(f"the images are {array.dtype} {shape}; give uint8 (N, H, W) or (N, H, W, 1 to 4)")
    if first:
        notes.append(f"{one_line(name)} {shape}: taken as (N, C, H, W)")
        return np.moveaxis(array, 1, 3)
    if array.dtype == bool:
        array = array * np.uint8(255)
    return array.reshape(*shape[:3], -1)


def _as_labels(name: str, array: np.ndarray, images: np.ndarray, notes: list[str]) -> list[str | None]:
    """Each image's class as a name; None for -1."""
    count = len(images)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2 and array.shape[0] == count and _is_one_hot(array):
        notes.append(f"{one_line(name)} {array.shape}: taken as one-hot, one column for each class")
        array = array.argmax(1)
    whole = array.dtype.kind in "biuUS" or (array.dtype.kind == "f" and bool((array == np.rint(array)).all()))
    if array.shape != (count,) or not whole:
        raise InputError(f"the labels are {array.dtype} {array.shape}; give {count} integers, or names")
    if array.dtype.kind in "US":
        return _texts(array)
    if array.min() < -1:
        raise InputError(f"one of the labels is {int(array.min())}; give integers from 0, and -1 for no class")
    return [None if label < 0 else str(label) for label in array.astype(np.int64).tolist()]


def _texts(array: np.ndarray) -> list[str | None]:
    return [
        label.decode("utf-8", "backslashreplace") if isinstance(label, bytes) else label for label in array.tolist()
    ]


def _is_one_hot(array: np.ndarray) -> bool:
    return array.dtype.kind in "biuf" and bool(((array == 0) | (array == 1)).all() and (array.sum(1) == 1).all())


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # np.load alone would also accept an .npy, and calls any other file a pickle; ZipFile says what is wrong.
    with reading(path), zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def _read_npy(path: Path) -> np.ndarray:
    with reading(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _read_idx(path: Path) -> np.ndarray:
    with reading(path):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, num_axes = struct.unpack_from(">3sB", content)
        if kind != b"\0\0\x08":
            raise ValueError("not an IDX file of unsigned bytes")
        shape = struct.unpack_from(f">{num_axes}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
