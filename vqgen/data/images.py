"""Images from a folder, arrays, tar shards or the built-in digits, as squares of one size.

A source has the names, class ids and class names of its images, and opens any of them as a PIL image. An `ImageSet`
makes those uint8 (C, H, W) arrays, and keeps them in memory if there is room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import resources
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from vqgen.config import DataConfig, require_size
from vqgen.errors import InputError

logger = logging.getLogger("vqgen")

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
IDX_NAMES = {  # array in an .npz: file of MNIST's
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
PROBED_IMAGES = 64
MAX_SIDE = 1 << 15
HASHED_BYTES = 2 << 30  # reading more than this would hold up the start of a run
REMEDY = "give a folder of images, an .npz, a .tar pattern, or digits"

READ_ERRORS = (OSError, EOFError, ValueError, struct.error, zlib.error)
DECODE_ERRORS = (*READ_ERRORS, SyntaxError, LookupError, RuntimeError, Image.DecompressionBombError)  # Pillow's
CONTAINER_ERRORS = (*READ_ERRORS, zipfile.BadZipFile, tarfile.TarError)


def load_images(data: DataConfig) -> tuple[ImageSet, ImageSet]:
    """The images to train on, and those held out.

    Held out are: `data.val_source` if given, else the source's own test part if it has one, else those whose name has a
    low hash, so that the side an image falls on does not depend on which others there are.

    Raises:
        InputError: a source or a setting cannot be used, or no image loads.
    """
    _check_settings(data)
    train, held_out = _open_source("data.source", data.source)
    if data.val_source is not None:
        part, test_part = _open_source("data.val_source", data.val_source)
        held_out = test_part or part
    if held_out is not None:
        _match_classes(train, held_out)
        train_rows, held_out_rows = np.arange(len(train.names)), np.arange(len(held_out.names))
    elif len(train.names) > 1:
        held_out = train
        train_rows, held_out_rows = _split(train.names, data.val_fraction)
    else:
        raise InputError(f"data.source={data.source} is one image, with none left to hold out; give data.val_source")
    channels = data.channels or _probe_channels(train, train_rows, data.background)
    return ImageSet(train, train_rows, data, channels), ImageSet(held_out, held_out_rows, data, channels)


def load_set(key: str, data: DataConfig, image_size: int | None = None) -> tuple[ImageSet, ImageSet | None]:
    """All images of `data.source`; or if it has parts, those to train on, and those held out.

    Args:
        key: what the messages call the source.
        data: its settings.
        image_size: the side of the squares; None takes the images' own, which must then all be one.

    Raises:
        InputError: a source or a setting cannot be used, or no image loads.
    """
    _check_settings(data)
    source, held_out = _open_source(key, data.source)
    rows = np.arange(len(source.names))
    if image_size is None:
        sizes = {source.open(row).size for row in _probed(rows) if _loads(source, row)}
        if len(sizes) != 1 or len(set(*sizes)) != 1:
            found = " and ".join(f"{width}x{height}" for width, height in sorted(sizes)[:2]) or "broken"
            raise InputError(
                f"{key}={data.source}: holds {found} images, not squares of one size; give data.image_size="
            )
        image_size = sizes.pop()[0]
    data = dataclasses.replace(data, image_size=image_size)
    channels = data.channels or _probe_channels(source, rows, data.background)
    images = ImageSet(source, rows, data, channels)
    if held_out is None:
        return images, None
    _match_classes(source, held_out)
    return images, ImageSet(held_out, np.arange(len(held_out.names)), data, channels)


def some_rows(available: int, wanted: int | None) -> np.ndarray:
    """All rows of a set, or as many as wanted: always the same ones, in order, drawn at random.

    Evenly spaced ones would see one class only where the classes come in turn.
    """
    if wanted is None or wanted >= available:
        return np.arange(available)
    return np.sort(np.random.default_rng(0).choice(available, wanted, replace=False))


class ImageSet:
    """Square uint8 images of one size with their class ids, from memory or decoded as they are asked for.

    It serves as the dataset of a `DataLoader` whose `collate_fn` returns its argument, as a batch comes stacked.

    Attributes:
        names: stable names: a path relative to the folder, the row of an array, or `shard.tar/key`.
        class_ids: (N,) int64, -1 for an image without a class.
        class_names: the classes in the order of their ids; empty if there are none.
        channels: C, 1 or 3.
        image_size: H and W, in pixels.

    Raises:
        InputError: an image does not load and data.on_error=raise, or none loads.
    """

    def __init__(self, source: _Source, rows: np.ndarray, data: DataConfig, channels: int):
        self.names = [source.names[row] for row in rows]
        self.class_ids = source.class_ids[rows]
        self.class_names = source.class_names
        self.channels = channels
        self.image_size = size = data.image_size
        self._source, self._rows, self._data = source, rows, data
        self._identity = (self.names, self.class_ids)  # before any image is dropped: fingerprint needs them all
        self._broken: dict[int, str] = {}  # index: name and reason
        self._pixels: np.ndarray | None = None  # (N, C, H, W)

        if isinstance(source, _Arrays) and source.images.shape[1:] == (size, size, channels):
            images = source.images if len(rows) == len(source.images) else source.images[rows]
            self._pixels = np.ascontiguousarray(rearrange(images, "n h w c -> n c h w"))
        elif len(rows) * channels * size**2 <= data.cache_gb * 2**30:
            self._decode_all()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def in_memory(self) -> bool:
        """Whether the images are decoded already, so that worker processes have nothing to do."""
        return self._pixels is not None

    @property
    def crop(self) -> dict[str, int | str]:
        """How the images became squares, by the names of the settings."""
        size, data = self.image_size, self._data
        return {"image_size": size, "channels": self.channels, "resize": data.resize, "background": data.background}

    def read(self, i: int) -> np.ndarray | None:
        """Image i as uint8 (C, H, W), or None if it does not load; a warning names the first that does not.

        Raises:
            InputError: it does not load and data.on_error=raise.
        """
        if self._pixels is not None:
            return self._pixels[i]
        first = not self._broken
        pixels = self._decode(i)
        if pixels is None and first:
            logger.warning(f"skipping images that do not load, first: {self._broken[i]}")
        return pixels

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) and class ids int64 (B,); the next that loads stands in for one that does not.

        Raises:
            InputError: an image does not load and data.on_error=raise, or none loads.
        """
        if self._pixels is not None:
            return torch.from_numpy(self._pixels[indices]), torch.from_numpy(self.class_ids[indices])
        pixels, found = zip(*[self._read_at_or_after(i) for i in indices], strict=True)
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(self.class_ids[list(found)])

    __getitem__ = __getitems__  # what a DataLoader calls if its sampler yields whole batches

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes with the names, the classes or the content, and with no setting in `data`.

        The content is that of all the source's files, also where this set is a part of them: their bytes or, if those
        are more than 2 GiB, the size and the time of modification of each.
        """
        names, class_ids = self._identity
        digest = hashlib.sha256(json.dumps([names, self.class_names, class_ids.tolist()]).encode())
        stats = [(path, path.stat()) for path in self._source.files if path.exists()]  # a dead link is a broken image
        by_bytes = sum(stat.st_size for _, stat in stats) <= HASHED_BYTES
        for path, stat in stats:
            digest.update(f"{stat.st_size} {0 if by_bytes else stat.st_mtime_ns}\n".encode())
            if by_bytes:
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
        return digest.hexdigest()

    def _decode(self, i: int) -> np.ndarray | None:
        """Image i as uint8 (C, H, W), or None if it does not load, with the reason in `_broken`."""
        try:
            image = _flatten(self._source.open(self._rows[i]), self._data.background)
        except DECODE_ERRORS as error:
            self._broken[i] = f"{self.names[i]} ({_reason(error)})"
            if self._data.on_error == "raise":
                remedy = "repair or remove it, or set data.on_error=skip"
                raise InputError(f"an image does not load: {self._broken[i]}; {remedy}") from error
            return None
        image = _resize(image.convert("L" if self.channels == 1 else "RGB"), self._data)
        pixels = rearrange(np.asarray(image), "h w -> 1 h w" if self.channels == 1 else "h w c -> c h w")
        return np.ascontiguousarray(pixels)

    def _decode_all(self) -> None:
        """Decodes every image into memory, and drops those that do not load."""
        count = len(self)
        pixels = np.empty((count, self.channels, self.image_size, self.image_size), np.uint8)
        blocks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
            decoded = chain.from_iterable(pool.map(lambda block: [self._decode(i) for i in block], blocks))
            for i, image in enumerate(tqdm(decoded, "decoding", count, unit=" images", leave=False, disable=None)):
                if image is not None:
                    pixels[i] = image

        if self._broken:
            first = self._broken[min(self._broken)]
            if len(self._broken) == count:
                raise InputError(f"none of {count} images loads, first: {first}; repair them or give others")
            images = "image that does" if len(self._broken) == 1 else "images that do"
            logger.warning(f"skipped {len(self._broken)} {images} not load, first: {first}")
            kept = np.delete(np.arange(count), list(self._broken))
            self.names = [self.names[i] for i in kept]
            self.class_ids, pixels = self.class_ids[kept], pixels[kept]
        self._pixels = pixels

    def _read_at_or_after(self, i: int) -> tuple[np.ndarray, int]:
        """The first image that loads from i on, going round, and its index."""
        for j in ((i + step) % len(self) for step in range(len(self))):
            pixels = self.read(j)
            if pixels is not None:
                return pixels, j
        raise InputError(f"none of {len(self)} images loads, first: {self._broken[i]}; repair them or give others")


def _check_settings(data: DataConfig) -> None:
    for key, choices in {"resize": ("crop", "pad"), "on_error": ("skip", "raise"), "channels": (1, 3, None)}.items():
        if getattr(data, key) not in choices:
            known = " or ".join("null" if choice is None else str(choice) for choice in choices)
            raise InputError(f"data.{key}={getattr(data, key)} is not known; use {known}")
    if data.image_size < 1:
        raise InputError(f"data.image_size={data.image_size} is no number of pixels; use 32, for example")
    require_size("data.image_size", data.image_size, MAX_SIDE)
    if not 0 <= data.val_fraction < 1:
        raise InputError(f"data.val_fraction={data.val_fraction} is not from 0 to below 1; use 0.05, for example")
    try:
        ImageColor.getrgb(data.background)
    except ValueError as error:
        raise InputError(f"data.background={data.background} is not a colour; use a name or #rrggbb") from error


def _match_classes(train: _Source, held_out: _Source) -> None:
    """Gives each class of the held-out images, by its name, the id that it has in training."""
    ids = {name: i for i, name in enumerate(train.class_names)}
    if not ids:
        held_out.class_ids = np.full_like(held_out.class_ids, -1)
    elif unknown := [name for name in held_out.class_names if name not in ids]:
        raise InputError(f"no training image has the held-out class {unknown[0]!r}; rename that class or remove it")
    else:  # -1, no class, indexes the -1 at the end
        held_out.class_ids = np.array([*(ids[name] for name in held_out.class_names), -1])[held_out.class_ids]
    held_out.class_names = train.class_names


def _split(names: list[str], val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those held out, at least one of each."""
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64 for name in names]
    held_out = np.array(hashes) < val_fraction
    held_out[np.argmin(hashes)] = True
    held_out[np.argmax(hashes)] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _probed(rows: np.ndarray) -> np.ndarray:
    """A few of the rows, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, PROBED_IMAGES, dtype=int))]


def _loads(source: _Source, row: int) -> bool:
    try:
        source.open(row)
    except DECODE_ERRORS:
        return False
    return True


def _probe_channels(source: _Source, rows: np.ndarray, background: str) -> int:
    """1 if a sample of the images is grey, also where it is stored as RGB; else 3."""
    probed = _probed(rows)
    broken = []
    for row in probed:
        try:
            pixels = np.asarray(_flatten(source.open(row), background).convert("RGB"))
        except DECODE_ERRORS as error:
            broken.append(f"{source.names[row]} ({_reason(error)})")
        else:
            if (pixels != pixels[..., :1]).any():
                return 3
    if len(broken) == len(probed):
        raise InputError(f"none of {len(probed)} images loads, first: {broken[0]}; repair them or give others")
    return 1


# Pixels


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Any image as it is meant to look: upright, opaque, 8 bits; of mode L or RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits, 32 bits or floats as uint8, of the same shape.

    No file says which float or which 32-bit integer is white. It is taken to be the least of the usual whites that no
    pixel exceeds, and only beyond those the brightest pixel, so that the images of a set are scaled alike.
    """
    pixels = np.nan_to_num(pixels, posinf=0, neginf=0)
    whites = (1, 255, 65535) if pixels.dtype.kind == "f" else (65535,)
    white = next((white for white in whites if pixels.max() <= white), pixels.max())
    return np.rint(np.clip(pixels / white, 0, 1) * 255).astype(np.uint8)


def _resize(image: Image.Image, data: DataConfig) -> Image.Image:
    """An L or RGB image as a square of `data.image_size` pixels."""
    size = (data.image_size, data.image_size)
    if data.resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    image.thumbnail(size, Image.Resampling.BICUBIC, reducing_gap=None)  # leaves a smaller image as it is
    canvas = Image.new(image.mode, size, ImageColor.getcolor(data.background, image.mode))
    canvas.paste(image, ((data.image_size - image.width) // 2, (data.image_size - image.height) // 2))
    return canvas


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message is the address of a buffer
        return "empty, or no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def _open_image(content: bytes) -> Image.Image:
    # Without `formats`, Pillow tries all it knows: half as slow again, and one of them runs Ghostscript.
    return Image.open(io.BytesIO(content), formats=FORMATS)


# Sources: each has names, class_ids, class_names, files and open(row)


class _Files:
    """The image files of a folder; their classes are the folders that they lie in below `top`."""

    def __init__(self, root: Path, names: list[str], top: str = ""):
        self.root = root
        self.names = [name for name in names if name.startswith(top)]
        paths = [name.removeprefix(top).split("/") for name in self.names]
        loose = [path[0] for path in paths if len(path) == 1]
        if 0 < len(loose) < len(paths):
            logger.warning(f"{root / top}: no classes, as images lie beside the folders, such as {loose[0]}")
        self.class_names = [] if loose else sorted({path[0] for path in paths})
        ids = {name: i for i, name in enumerate(self.class_names)}
        self.class_ids = np.array([ids.get(path[0], -1) for path in paths], np.int64)

    @property
    def files(self) -> list[Path]:
        return [self.root / name for name in self.names]

    def open(self, row: int) -> Image.Image:
        return _open_image((self.root / self.names[row]).read_bytes())


class _Tar:
    """The images of uncompressed tar files, found in one pass over the headers and then read in place."""

    def __init__(self, shards: list[Path]):
        self.files = shards
        samples = [(number, *sample) for number, shard in enumerate(shards) for sample in _index_shard(shard)]
        if not samples:
            raise InputError(f"no image in {shards[0].name} (looked for {' '.join(EXTENSIONS)}); {REMEDY}")
        self.names = [f"{shards[number].name}/{key}" for number, key, *_ in samples]
        self.places = np.array([(number, offset, size) for number, _, offset, size, _ in samples], np.int64)  # (N, 3)
        self.class_ids = np.array([class_id for *_, class_id in samples], np.int64)
        self.class_names = _number_names(self.class_ids)
        path = shards[0].parent / "classes.json"
        if self.class_names and path.is_file():
            with _reading(path):
                names = json.loads(path.read_text("utf-8"))
            if not isinstance(names, list) or len(names) < len(self.class_names):
                raise InputError(f"{path} is not a list of all {len(self.class_names)} class names; make it one")
            self.class_names = [str(name) for name in names]

    def open(self, row: int) -> Image.Image:
        number, offset, size = self.places[row]
        with self.files[number].open("rb") as file:  # anew each time: a shared file position would suit no threads
            file.seek(offset)
            return _open_image(file.read(size))


class _Arrays:
    """The images of an array, uint8 (N, H, W) or (N, H, W, C), with labels (N,) or without."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, files: list[Path]):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0 or images[0, 0, 0].size > 4:
            raise InputError(f"the images are {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, 1 to 4)")
        labels = np.full(len(images), -1) if labels is None else labels
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < -1:
            raise InputError(f"the labels are {labels.dtype} {labels.shape}; give {len(images)} integers, 0 or more")
        self.files = files
        self.images = images.reshape(*images.shape[:3], -1)  # (N, H, W, C)
        self.names = [str(row) for row in range(len(images))]
        self.class_ids = labels.astype(np.int64)
        self.class_names = _number_names(self.class_ids)

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row].squeeze(2) if self.images.shape[3] == 1 else self.images[row])


_Source = _Files | _Tar | _Arrays


def _open_source(key: str, source: str) -> tuple[_Source, _Source | None]:
    """The part of a source to train on, and its held-out part if it has one of its own."""
    try:
        path = Path(source).expanduser()
        if source == "digits":
            with resources.as_file(resources.files("vqgen.data") / "embedded" / "digits.npz") as embedded:
                return _array_parts(_read_npz(embedded), [embedded])
        if path.is_dir():
            idx_files = _find_idx_files(path)
            if "train_images" not in idx_files:
                return _folder_parts(path)
            return _array_parts({key: _read_idx(file) for key, file in idx_files.items()}, [*idx_files.values()])
        if path.is_file() and path.suffix == ".npz":
            return _array_parts(_read_npz(path), [path])
        if path.suffix == ".tar" or (not path.exists() and re.search(r"[{*?\[]", source)):
            return _Tar(_find_shards(path)), None
        raise InputError(f"{'a file of an unknown type' if path.exists() else 'no such file or folder'}; {REMEDY}")
    except (InputError, OSError, RuntimeError) as error:  # also of what may not be looked at, and of ~nobody
        raise InputError(f"{key}={source}: {error if isinstance(error, InputError) else _reason(error)}") from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes what a damaged file raises an InputError that names it."""
    try:
        yield
    except CONTAINER_ERRORS as error:
        raise InputError(f"{path} cannot be read ({_reason(error)}); repair it or fetch it again") from error


def _folder_parts(root: Path) -> tuple[_Source, _Source | None]:
    names = []
    parents = [""]
    with _reading(root):
        while parents:
            parent = parents.pop()
            for entry in os.scandir(root / parent):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    parents.append(f"{parent}{entry.name}/")
                elif entry.name.lower().endswith(EXTENSIONS):
                    names.append(parent + entry.name)
    names.sort()
    if not names:
        remedy = f"give {root / '*.tar'} for its shards" if any(root.glob("*.tar")) else REMEDY
        raise InputError(f"no image in this folder (looked for {' '.join(EXTENSIONS)}); {remedy}")
    folders = {name.split("/")[0] for name in names if "/" in name}
    if "train" not in folders or not folders <= {"train", *HELD_OUT_FOLDERS}:
        return _Files(root, names), None
    held_out = [_Files(root, names, f"{folder}/") for folder in HELD_OUT_FOLDERS if folder in folders]
    return _Files(root, names, "train/"), held_out[0] if held_out else None


def _array_parts(arrays: dict[str, np.ndarray], files: list[Path]) -> tuple[_Source, _Source | None]:
    parts = {
        prefix: _Arrays(images, arrays.get(f"{prefix}labels", arrays.get(f"{prefix}class_ids")), files)
        for prefix in ("", "train_", "test_")
        if (images := arrays.get(f"{prefix}images")) is not None
    }
    train = parts.get("", parts.get("train_"))
    if train is None:
        raise InputError("no array named `images` or `train_images`; write one with numpy.savez")
    return train, parts.get("test_")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # np.load would take an .npy as well, and calls anything else a pickle; ZipFile says what is wrong.
    with _reading(path), zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files if re.search("(images|labels|class_ids)$", key)}


def _find_idx_files(folder: Path) -> dict[str, Path]:
    paths = ((key, folder / f"{name}{suffix}") for suffix in (".gz", "") for key, name in IDX_NAMES.items())
    return {key: path for key, path in paths if path.is_file()}


def _read_idx(path: Path) -> np.ndarray:
    with _reading(path):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, num_axes = struct.unpack_from(">3sB", content)
        if kind != b"\0\0\x08":
            raise ValueError("not an IDX file of unsigned bytes")
        shape = struct.unpack_from(f">{num_axes}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def _find_shards(pattern: Path) -> list[Path]:
    """The files that a pattern with {00000..00009}, {a,b}, * and ? stands for, in its order."""
    shards: list[Path] = []
    for path in [pattern] if pattern.exists() else map(Path, _expand_braces(str(pattern))):
        found = [path] if path.exists() else sorted(Path(match) for match in glob.glob(str(path)))
        if not found:
            raise InputError(f"no shard {path}; fetch it, or leave it out of the pattern")
        shards += found
    return shards


def _expand_braces(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    choices: Iterable[str] = braces[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        numbers = range(int(bounds[1]), int(bounds[2]) + 1)
        choices = (str(number).zfill(len(bounds[1])) for number in numbers)
    start, end = braces.span()
    for choice in choices:
        yield from _expand_braces(pattern[:start] + choice + pattern[end:])


def _index_shard(shard: Path) -> list[tuple[str, int, int, int]]:
    """Key, offset, size and class id of each sample: the members whose path is the same up to the name's first dot."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with _reading(shard), tarfile.open(shard, "r:") as tar:
        for member in tar:
            folder, slash, name = member.name.removeprefix("./").rpartition("/")
            stem, _, extension = name.partition(".")
            if member.isfile() and stem:
                samples.setdefault(folder + slash + stem, {})[f".{extension.lower()}"] = member
    found = []
    with shard.open("rb") as file:
        for key, members in samples.items():
            image = next((member for extension, member in members.items() if extension in EXTENSIONS), None)
            if image is None:
                continue
            class_id = b"-1"
            if label := members.get(".cls"):
                file.seek(label.offset_data)
                class_id = file.read(label.size)
                if not re.fullmatch(rb"\s*(-1|\d+)\s*", class_id):
                    raise InputError(f"{shard.name}/{label.name} holds {class_id[:20]!r}; make it an integer")
            found.append((key, image.offset_data, image.size, int(class_id)))
    return found


def _number_names(class_ids: np.ndarray) -> list[str]:
    return [str(class_id) for class_id in range(int(class_ids.max()) + 1)]
