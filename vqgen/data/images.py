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
import stat
import struct
import tarfile
import threading
import warnings
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

from vqgen.data.folders import EXTENSIONS, list_images
from vqgen.data.skipped import SkippedFile, one_line
from vqgen.distributed import rank
from vqgen.errors import InputError, require_size
from vqgen.settings import DataConfig
from vqgen.training.stop import PASSING

logger = logging.getLogger("vqgen")
# What Pillow finds odd in a file is no news for who did not make it; what it cannot read, it raises.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

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
MAX_CLASSES = 1_000_000  # as all ids up to the largest get a name
MAX_FILE_BYTES = 1 << 30
LARGE_BYTES, LARGE_PIXELS = 1 << 26, 1 << 24  # images above either are in memory one at a time
STRIP_PIXELS = 1 << 20
REMEDY = "give a folder of images, an .npz, a .tar pattern, or digits"

CONTAINER_ERRORS = (OSError, EOFError, ValueError, struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError)
DECODE_ERRORS = Exception  # there is none that no damage to an image could make Pillow raise

_one_large = threading.RLock()  # held while a large image is in memory


def load_images(data: DataConfig) -> tuple[ImageSet, ImageSet]:
    """The images to train on, and those held out.

    Held out are: `data.val_source` if given, else the source's own test part if it has one, else those whose name has a
    low hash, so that the side an image falls on does not depend on which others there are.

    Raises:
        InputError: a source or a setting cannot be used, or no image loads.
    """
    _check_settings(data)
    train, held_out = _open_source("data.source", data.source)
    prefix = ""
    if data.val_source is not None:
        prefix = f"{data.val_source}/"
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
    return ImageSet(train, train_rows, data, channels), ImageSet(held_out, held_out_rows, data, channels, prefix)


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
        sizes = {size for row in _probed(rows) if (size := _size(source, row)) is not None}
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

    Args:
        source: has the images.
        rows: which of them.
        data: its settings.
        channels: C, 1 or 3.
        prefix: what their names begin with in a list of skipped images, where another set has the same names.

    Attributes:
        names: stable names: a path relative to the folder, the row of an array, or `shard.tar/key`.
        class_ids: (N,) int64, -1 for an image without a class.
        class_names: the classes in the order of their ids; empty if there are none.
        channels: C, 1 or 3.
        image_size: H and W, in pixels.

    Raises:
        InputError: an image does not load and data.on_error=raise, or none loads.
    """

    def __init__(self, source: _Source, rows: np.ndarray, data: DataConfig, channels: int, prefix: str = ""):
        self.names = [source.names[row] for row in rows]
        self.class_ids = source.class_ids[rows]
        self.class_names = source.class_names
        self.channels = channels
        self.image_size = size = data.image_size
        self._source, self._rows, self._data, self._prefix = source, rows, data, prefix
        self._identity = (self.names, self.class_ids)  # before any image is dropped: fingerprint needs them all
        self._broken: dict[int, str] = {}  # index, of them all: reason
        self._skipped: SkippedFile | None = None
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

    def report_skipped(self, path: Path) -> None:
        """Names the images that do not load in a file, with the reason: those found so far now, others when they are.

        All processes call it, and before a `DataLoader` starts its workers. Each image is named once, by whichever
        process finds it first.

        Raises:
            InputError: the file cannot be written, on the main process; later that is no reason to end.
        """
        self._skipped = SkippedFile(path)
        try:
            self._skipped.add({self._listed_name(i): self._broken[i] for i in sorted(self._broken)})
        except OSError as error:
            if rank() == 0:
                raise InputError(f"{path} cannot be written ({_reason(error)}); make room, or name another") from error

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
            logger.warning(f"skipping images that do not load, first: {self._describe(i)}")
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
        files = []
        for path in self._source.files:
            with contextlib.suppress(OSError):  # a dead link is a broken image
                files.append((path, os.stat(path)))
        files = [(path, info) for path, info in files if stat.S_ISREG(info.st_mode)]  # opening a pipe would wait
        by_bytes = sum(info.st_size for _, info in files) <= HASHED_BYTES
        for path, info in files:
            digest.update(f"{info.st_size} {0 if by_bytes else info.st_mtime_ns}\n".encode())
            if by_bytes:
                with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                    left = info.st_size  # what calls itself empty may be an endless file of the system's
                    while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                        digest.update(chunk)
                        left -= len(chunk)
        return digest.hexdigest()

    def _decode(self, i: int) -> np.ndarray | None:
        """Image i as uint8 (C, H, W), or None if it does not load, with the reason in `_broken`."""
        mode = "L" if self.channels == 1 else "RGB"
        try:
            with _opened(self._source, self._rows[i]) as image:
                pixels = np.asarray(_resize(_as(mode, _flatten(image, self._data.background)), self._data))
        except DECODE_ERRORS as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            found_before = i in self._broken
            self._broken[i] = _reason(error)
            if self._data.on_error == "raise":
                remedy = "repair or remove it, or set data.on_error=skip"
                raise InputError(f"an image does not load: {self._describe(i)}; {remedy}") from error
            if self._skipped is not None and not found_before:
                with contextlib.suppress(OSError):  # a full disk ends a run where it matters
                    self._skipped.add({self._listed_name(i): self._broken[i]})
            return None
        return np.ascontiguousarray(rearrange(pixels, "h w -> 1 h w" if self.channels == 1 else "h w c -> c h w"))

    def _describe(self, i: int) -> str:
        """A broken image's name and reason, for a message."""
        return f"{one_line(self._identity[0][i])} ({self._broken[i]})"

    def _listed_name(self, i: int) -> str:
        """A broken image's name in the list of those skipped."""
        return one_line(self._prefix + self._identity[0][i])

    def _decode_all(self) -> None:
        """Decodes every image into memory, and drops those that do not load."""
        count = len(self)
        pixels = np.empty((count, self.channels, self.image_size, self.image_size), np.uint8)
        blocks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow decodes without the GIL
        try:
            decoded = chain.from_iterable(pool.map(lambda block: [self._decode(i) for i in block], blocks))
            kept: list[int] = []
            for i, image in enumerate(tqdm(decoded, "decoding", count, unit=" images", leave=False, disable=None)):
                if image is not None:
                    pixels[len(kept)] = image
                    kept.append(i)
        finally:
            pool.shutdown(cancel_futures=True)  # who stops the program does not wait for all the others

        if self._broken:
            first = self._describe(min(self._broken))
            if len(self._broken) == count:
                raise InputError(f"none of {count} images loads, first: {first}; repair them or give others")
            images = "image that does" if len(self._broken) == 1 else "images that do"
            logger.warning(f"skipped {len(self._broken)} {images} not load, first: {first}")
            self.names = [self.names[i] for i in kept]
            self.class_ids = self.class_ids[kept]
        self._pixels = pixels[: len(kept)]

    def _read_at_or_after(self, i: int) -> tuple[np.ndarray, int]:
        """The first image that loads from i on, going round, and its index."""
        for j in ((i + step) % len(self) for step in range(len(self))):
            pixels = None if j in self._broken else self.read(j)  # what takes long to fail does so once
            if pixels is not None:
                return pixels, j
        raise InputError(f"none of {len(self)} images loads, first: {self._describe(i)}; repair them or give others")


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


@contextlib.contextmanager
def _opened(source: _Source, row: int) -> Iterator[Image.Image]:
    """An image of a source, which is not decoded yet. Of the large ones only one at a time is open."""
    with contextlib.ExitStack() as stack:
        if source.num_bytes(row) > LARGE_BYTES:
            stack.enter_context(_one_large)
        image = source.open(row)
        if image.width * image.height > LARGE_PIXELS:
            stack.enter_context(_one_large)
        yield image


def _size(source: _Source, row: int) -> tuple[int, int] | None:
    """Width and height of an image; None if it does not open."""
    try:
        with _opened(source, row) as image:
            return image.size
    except DECODE_ERRORS:
        return None


def _probe_channels(source: _Source, rows: np.ndarray, background: str) -> int:
    """1 if a sample of the images is grey, also where it is stored as RGB; else 3."""
    probed = _probed(rows)
    num_loaded, first = 0, ""
    for number, row in enumerate(chain(probed, rows)):
        if number >= len(probed) and num_loaded:  # if none of the sample loads, one more decides
            break
        try:
            with _opened(source, row) as image:
                coloured = _is_coloured(_flatten(image, background))
        except DECODE_ERRORS as error:
            first = first or f"{one_line(source.names[row])} ({_reason(error)})"
        else:
            if coloured:
                return 3
            num_loaded += 1
    if not num_loaded:
        raise InputError(f"none of {len(rows)} images loads, first: {first}; repair them or give others")
    return 1


# Pixels


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Any image as it is meant to look: upright, opaque, 8 bits; of mode L or RGB."""
    image.load()
    with contextlib.suppress(DECODE_ERRORS):  # damage to its EXIF is none to its pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = _opaque(image, background)
    return _as("L" if image.mode in ("1", "L") else "RGB", image)


def _as(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image cut into strips, each with its top's place: what is computed from one never takes much memory."""
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(top + height, image.height)))


def _is_coloured(image: Image.Image) -> bool:
    """Whether an L or RGB image has a pixel that is not grey."""
    pixels = (np.asarray(strip) for _, strip in _strips(image))
    return image.mode != "L" and any((part[..., :1] != part).any() for part in pixels)


def _opaque(image: Image.Image, background: str) -> Image.Image:
    """An image of mode RGB, on a colour."""
    opaque = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        canvas = Image.new("RGBA", strip.size, ImageColor.getrgb(background)[:3])
        opaque.paste(Image.alpha_composite(canvas, strip.convert("RGBA")).convert("RGB"), (0, top))
    return opaque


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, 32 bits or floats as an image of mode L.

    No file says which float or which 32-bit integer is white. It is taken to be the least of the usual whites that no
    pixel exceeds, and only beyond those the brightest pixel, so that the images of a set are scaled alike.
    """
    brightest = max(_finite(strip).max() for _, strip in _strips(image))
    whites = (1, 255, 65535) if image.mode[0] == "F" else (65535,)
    white = next((white for white in whites if brightest <= white), brightest)
    grey = Image.new("L", image.size)
    for top, strip in _strips(image):
        pixels = np.rint(np.clip(_finite(strip) / white, 0, 1) * 255).astype(np.uint8)
        grey.paste(Image.fromarray(pixels), (0, top))
    return grey


def _finite(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image), posinf=0, neginf=0)


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
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0][:200])


def _checked_size(num_bytes: int) -> int:
    if num_bytes > MAX_FILE_BYTES:
        raise OSError(f"{num_bytes / 2**30:,.1f} GiB, which is too large for an image")
    return num_bytes


def _open_image(content: bytes) -> Image.Image:
    # Without `formats`, Pillow tries all it knows: half as slow again, and one of them runs Ghostscript.
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    # Some decoders take whole rows only, and Pillow copies all it has of one with each block that it adds: a row of
    # 10 million pixels would take minutes.
    image.decodermaxblock = max(image.decodermaxblock, 8 * image.width)
    return image


# Sources: each has names, class_ids, class_names, files, num_bytes(row) and open(row)


class _Files:
    """The image files of a folder; their classes are the folders that they lie in below `top`."""

    def __init__(self, root: Path, names: list[str], top: str = ""):
        self.root = root
        self.names = [name for name in names if name.startswith(top)]
        paths = [name.removeprefix(top).split("/") for name in self.names]
        loose = [path[0] for path in paths if len(path) == 1]
        if 0 < len(loose) < len(paths):
            logger.warning(f"{root / top}: no classes, as images lie beside the folders, such as {one_line(loose[0])}")
        folders = [] if loose else sorted({path[0] for path in paths})
        ids = {name: i for i, name in enumerate(folders)}
        # They go into files and onto screens that take no bytes that are no text.
        self.class_names = [name.encode("utf-8", "backslashreplace").decode() for name in folders]
        self.class_ids = np.array([ids.get(path[0], -1) for path in paths], np.int64)

    @property
    def files(self) -> list[str]:
        return [os.path.join(self.root, name) for name in self.names]

    def num_bytes(self, row: int) -> int:
        info = os.stat(self.root / self.names[row])
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for a writer
            raise OSError("a pipe, a socket or a device")
        return _checked_size(info.st_size)

    def open(self, row: int) -> Image.Image:
        num_bytes = self.num_bytes(row)
        with open(self.root / self.names[row], "rb") as file:
            return _open_image(file.read(num_bytes))


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

    def num_bytes(self, row: int) -> int:
        return _checked_size(int(self.places[row, 2]))

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
        if labels.max() >= MAX_CLASSES:
            raise InputError(f"one of the labels is {labels.max()}; number the classes from 0, up to {MAX_CLASSES - 1}")
        self.files = files
        self.images = images.reshape(*images.shape[:3], -1)  # (N, H, W, C)
        self.names = [str(row) for row in range(len(images))]
        self.class_ids = labels.astype(np.int64)
        self.class_names = _number_names(self.class_ids)

    def num_bytes(self, row: int) -> int:
        return self.images[row].nbytes

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
    with _reading(root):
        names = list_images(root)
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
                class_id = file.read(min(label.size, 100))
                if not re.fullmatch(rb"\s*(-1|\d+)\s*", class_id) or int(class_id) >= MAX_CLASSES:
                    remedy = f"make it an integer below {MAX_CLASSES}"
                    raise InputError(f"{shard.name}/{one_line(label.name)} holds {class_id[:20]!r}; {remedy}")
            found.append((key, image.offset_data, image.size, int(class_id)))
    return found


def _number_names(class_ids: np.ndarray) -> list[str]:
    return [str(class_id) for class_id in range(int(class_ids.max()) + 1)]
