"""Images to train on and images held out, from any source, as squares of one size.

A source (see `vqgen.data.sources`) has the names, class ids and class names of its images, and opens any of them as a
PIL image. An `ImageSet` turns those into uint8 (C, H, W) arrays, and keeps them in memory if there is room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import ImageColor
from torch import Tensor
from tqdm import tqdm

from vqgen.data.identity import fingerprint_of
from vqgen.data.pixels import DECODE_ERRORS, is_coloured, opened, to_square
from vqgen.data.skipped import PASSING, SkippedFile, one_line, reason
from vqgen.data.sources import Source, open_source
from vqgen.data.sources.arrays import ArraySource
from vqgen.distributed import computed_by_main, cores_per_process, rank
from vqgen.errors import InputError, require_size
from vqgen.settings import DataConfig

logger = logging.getLogger("vqgen")

PROBED_IMAGES = 64
MAX_SIDE = 1 << 15
MAX_THREADS = 8  # threads that decode


def load_images(data: DataConfig | str | Path, **options: Any) -> tuple[ImageSet, ImageSet]:
    """The training and the held-out images: `train, held_out = load_images("photos", image_size=64)`.

    The held-out images are those of `val_source` if it is given, or the source's own test part if it has one. Otherwise
    an image is held out if its name has a low hash, so other images can come and go without moving it to the other set.

    All processes must call it at the same point, because the main process lists the files for all.

    Args:
        data: the settings, or only the source, such as a folder.
        options: fields of `DataConfig` that replace those of `data`, or the defaults.

    Raises:
        InputError: a source or a setting cannot be used, or no image loads.
        TypeError: `DataConfig` has no such field.
    """
    if isinstance(data, str | Path):
        data = DataConfig(source=str(data))
    data = dataclasses.replace(data, **options)
    _check_settings(data)
    found = open_source("source", data.source, data)
    train, held_out, split = found.train, found.held_out, found.split
    left_out, notes = Counter(found.left_out), [*found.notes]
    prefix = ""
    if data.val_source is not None:
        prefix = f"{data.val_source}/"
        found = open_source("val_source", data.val_source, data)
        held_out, split = found.held_out or found.train, data.val_source
        left_out.update(found.left_out)
        notes += found.notes
    if held_out is not None:
        _match_classes(train, held_out)
        train_rows, held_out_rows = np.arange(len(train.names)), np.arange(len(held_out.names))
    elif len(train.names) > 1:
        held_out = train
        train_rows, held_out_rows = _split(train.names, data.val_fraction)
    else:
        raise InputError(f"source={data.source} is only one image, so none can be held out; give val_source=")
    channels = data.channels or _probe_channels(train, train_rows, data.background)
    train_set = ImageSet(train, train_rows, data, channels)
    train_set.split, train_set.left_out, train_set.notes = split, left_out, notes
    return train_set, ImageSet(held_out, held_out_rows, data, channels, prefix)


def load_set(key: str, data: DataConfig, image_size: int | None = None) -> tuple[ImageSet, ImageSet | None]:
    """All images of `data.source` and None; or its training and its held-out part if it has both.

    All processes must call it at the same point, like `load_images`.

    Args:
        key: the source's name in messages.
        data: the source's settings.
        image_size: the side of the squares; None takes the images' own size, if they are squares of one size.

    Raises:
        InputError: a source or a setting cannot be used, or no image loads.
    """
    _check_settings(data)
    found = open_source(key, data.source, data)
    source, held_out = found.train, found.held_out
    rows = np.arange(len(source.names))
    if image_size is None:
        sizes = computed_by_main(lambda: _sizes(source, rows))
        if len(sizes) != 1 or len(set(*sizes)) != 1:
            shown = " and ".join(f"{width}x{height}" for width, height in sorted(sizes)[:2]) or "broken"
            raise InputError(f"{key}={data.source}: holds {shown} images, not squares of one size; set image_size=")
        image_size = sizes.pop()[0]
    data = dataclasses.replace(data, image_size=image_size)
    channels = data.channels or _probe_channels(source, rows, data.background)
    images = ImageSet(source, rows, data, channels)
    if held_out is None:
        return images, None
    _match_classes(source, held_out)
    return images, ImageSet(held_out, np.arange(len(held_out.names)), data, channels)


def some_rows(available: int, wanted: int | None) -> np.ndarray:
    """All rows of a set, or `wanted` random ones, which are always the same; sorted.

    Evenly spaced rows could all belong to one class if the classes come in turn.
    """
    if wanted is None or wanted >= available:
        return np.arange(available)
    return np.sort(np.random.default_rng(0).choice(available, wanted, replace=False))


class ImageSet:
    """Square uint8 images of one size with their class ids, from memory or decoded on request.

    It can be the dataset of a `DataLoader` whose `collate_fn` returns its argument, because it returns whole batches.

    Args:
        source: the source of the images.
        rows: indices of the source's images that are in this set.
        data: the settings.
        channels: C, 1 or 3.
        prefix: prefix of the names in the list of skipped images, if another set has the same names.

    Attributes:
        names: stable names: a path relative to the folder, the row of an array, or `shard.tar/key`.
        class_ids: (N,) int64, -1 for an image without a class.
        class_names: the classes in the order of their ids; empty if there are none.
        channels: C, 1 or 3.
        image_size: H and W, in pixels.
        split, left_out, notes: of the training set, what `Found` says about its source and that of the held-out set.

    Raises:
        InputError: an image does not load and data.on_error=raise, or none loads.
    """

    def __init__(self, source: Source, rows: np.ndarray, data: DataConfig, channels: int, prefix: str = ""):
        self.names = [source.names[row] for row in rows]
        self.class_ids = source.class_ids[rows]
        self.class_names = source.class_names
        self.channels = channels
        self.image_size = size = data.image_size
        self.split, self.notes = "", list[str]()
        self.left_out = Counter[str]()
        self._source, self._rows, self._data, self._prefix = source, rows, data, prefix
        self._identity = (self.names, self.class_names, self.class_ids)  # for the fingerprint: of broken images too
        self._broken: dict[int, str] = {}  # index among all images: reason
        self._skipped: SkippedFile | None = None
        self._pixels: np.ndarray | None = None  # (N, C, H, W)

        if isinstance(source, ArraySource) and source.images.shape[1:] == (size, size, channels):
            images = source.images if len(rows) == len(source.images) else source.images[rows]
            self._pixels = np.ascontiguousarray(rearrange(images, "n h w c -> n c h w"))
        elif len(rows) * channels * size**2 <= data.cache_gb * 2**30:
            self._decode_all()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded in memory, so that a `DataLoader` needs no worker processes."""
        return self._pixels is not None

    @property
    def crop(self) -> dict[str, int | str]:
        """The settings that say how the images became squares."""
        size, data = self.image_size, self._data
        return {"image_size": size, "channels": self.channels, "resize": data.resize, "background": data.background}

    def report_skipped(self, path: Path) -> None:
        """Writes the images that do not load to a file, with the reason; images found broken later are added.

        All processes must call it, before a `DataLoader` starts its workers. Each image is listed once, by the process
        that finds it first.

        Raises:
            InputError: the main process cannot write the file now. If writing fails later, the run goes on.
        """
        self._skipped = SkippedFile(path)
        try:
            self._skipped.add({self._listed_name(i): self._broken[i] for i in sorted(self._broken)})
        except OSError as error:
            if rank() == 0:
                raise InputError(f"{path} cannot be written ({reason(error)}); make room, or name another") from error

    def read(self, i: int) -> np.ndarray | None:
        """Image i as uint8 (C, H, W), or None if it does not load; a warning names the first broken image.

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
        """Images uint8 (B, C, H, W) and class ids int64 (B,). The next image that loads replaces one that does not.

        Raises:
            InputError: an image does not load and data.on_error=raise, or none loads.
        """
        if self._pixels is not None:
            return torch.from_numpy(self._pixels[indices]), torch.from_numpy(self.class_ids[indices])
        pixels, found = zip(*[self._read_at_or_after(i) for i in indices], strict=True)
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(self.class_ids[list(found)])

    __getitem__ = __getitems__  # a DataLoader calls it if its sampler yields whole batches

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes with the names, the classes or the content, and with no setting in `data`.

        The content is that of all the source's files, even if this set is only a part of them. The main process reads
        them for all, so all processes must ask for the fingerprint for the first time at the same point.
        """
        return computed_by_main(lambda: fingerprint_of(*self._identity, self._source.files))

    def _decode(self, i: int) -> np.ndarray | None:
        """Image i as uint8 (C, H, W), or None if it does not load, with the reason in `_broken`."""
        try:
            with opened(self._source, self._rows[i]) as image:
                return to_square(image, self.channels, self._data)
        except DECODE_ERRORS as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            found_before = i in self._broken
            self._broken[i] = reason(error)
            if self._data.on_error == "raise":
                remedy = "repair or remove it, or skip such images with data.on_error=skip"
                raise InputError(f"an image does not load: {self._describe(i)}; {remedy}") from error
            if self._skipped is not None and not found_before:
                with contextlib.suppress(OSError):  # a full disk must not end the run because of this list
                    self._skipped.add({self._listed_name(i): self._broken[i]})
            return None

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
        pool = ThreadPoolExecutor(min(MAX_THREADS, cores_per_process()))  # Pillow decodes without the GIL
        try:
            decoded = chain.from_iterable(pool.map(lambda block: [self._decode(i) for i in block], blocks))
            kept: list[int] = []
            for i, image in enumerate(tqdm(decoded, "decoding", count, unit=" images", leave=False, disable=None)):
                if image is not None:
                    pixels[len(kept)] = image
                    kept.append(i)
        finally:
            pool.shutdown(cancel_futures=True)  # a program that is stopped does not wait for the other blocks

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
        """The first image from i on that loads, and its index; the search goes round once."""
        for j in ((i + step) % len(self) for step in range(len(self))):
            pixels = None if j in self._broken else self.read(j)  # some images take long to fail: once is enough
            if pixels is not None:
                return pixels, j
        raise InputError(f"none of {len(self)} images loads, first: {self._describe(i)}; repair them or give others")


def _check_settings(data: DataConfig) -> None:
    for key, choices in {"resize": ("crop", "pad"), "on_error": ("skip", "raise"), "channels": (1, 3, None)}.items():
        if getattr(data, key) not in choices:
            known = " or ".join("null" if choice is None else str(choice) for choice in choices)
            raise InputError(f"{key}={getattr(data, key)} is not known; use {known}")
    if data.image_size < 1:
        raise InputError(f"image_size={data.image_size} is not a number of pixels; use 32, for example")
    require_size("image_size", data.image_size, MAX_SIDE)
    if not 0 <= data.val_fraction < 1:
        raise InputError(f"val_fraction={data.val_fraction} must be at least 0 and below 1; use 0.05, for example")
    try:
        ImageColor.getrgb(data.background)
    except ValueError as error:
        raise InputError(f"background={data.background} is not a colour; use a name or #rrggbb") from error


def _match_classes(train: Source, held_out: Source) -> None:
    """Gives each class of the held-out images, by its name, the id that it has in training."""
    ids = {name: i for i, name in enumerate(train.class_names)}
    if not ids:
        held_out.class_ids = np.full_like(held_out.class_ids, -1)
    elif unknown := [name for name in held_out.class_names if name not in ids]:
        raise InputError(f"no training image has the held-out class {unknown[0]!r}; rename that class or remove it")
    else:  # -1, no class, indexes the -1 at the end
        held_out.class_ids = np.array([*(ids[name] for name in held_out.class_names), -1])[held_out.class_ids]
    held_out.class_names = train.class_names


def _split(names: Sequence[str], val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those held out, at least one of each."""
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64 for name in names]
    held_out = np.array(hashes) < val_fraction
    held_out[np.argmin(hashes)] = True
    held_out[np.argmax(hashes)] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _probed(rows: np.ndarray) -> np.ndarray:
    """A few of the rows, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, PROBED_IMAGES, dtype=int))]


def _sizes(source: Source, rows: np.ndarray) -> set[tuple[int, int]]:
    """Width and height of those images in a sample that open."""
    sizes = set()
    for row in _probed(rows):
        with contextlib.suppress(DECODE_ERRORS), opened(source, row) as image:
            sizes.add(image.size)
    return sizes


def _probe_channels(source: Source, rows: np.ndarray, background: str) -> int:
    """1 if a sample of the images is grey, even if it is stored as RGB; otherwise 3.

    The main process decides for all.

    Raises:
        InputError: no image loads.
    """

    def probe() -> int:
        probed = _probed(rows)
        num_loaded, first = 0, ""
        for number, row in enumerate(chain(probed, rows)):
            if number >= len(probed) and num_loaded:  # if the sample is broken, the next image decides
                break
            try:
                with opened(source, row) as image:
                    coloured = is_coloured(image, background)
            except DECODE_ERRORS as error:
                first = first or f"{one_line(source.names[row])} ({reason(error)})"
            else:
                if coloured:
                    return 3
                num_loaded += 1
        if not num_loaded:
            raise InputError(f"none of {len(rows)} images loads, first: {first}; repair them or give others")
        return 1

    return computed_by_main(probe)
