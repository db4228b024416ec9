"""Images to train on and images held out, from any source, all of one size.

A source (see `vqgen.data.sources`) has the names, class ids and class names of its images, and opens any of them as a
PIL image. An `ImageSet` turns those into uint8 (C, H, W) arrays, and keeps them in memory if there is room.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageColor
from torch import Tensor
from tqdm import tqdm

from vqgen.codes import shown
from vqgen.data.deep import Kind, Levels, deep_of, find_levels
from vqgen.data.identity import fingerprint_of
from vqgen.data.look import look_at
from vqgen.data.pixels import DECODE_ERRORS, crop_of, opened, quiet_pillow, to_pixels, upright_size
from vqgen.data.skipped import PASSING, SkippedFile, one_line, reason
from vqgen.data.sources import Source, open_source
from vqgen.data.sources.arrays import ArraySource
from vqgen.data.sources.index import hashes_of
from vqgen.data.stream import ImageStream
from vqgen.distributed import computed_by_main, cores_per_process, object_from_main, rank
from vqgen.errors import InputError
from vqgen.settings import DataConfig

logger = logging.getLogger("vqgen")

PROBED_IMAGES = 1000
MAX_SIDE = 1 << 15
MAX_THREADS = 8  # threads that decode


def load_images(data: DataConfig | str | Path, **options: Any) -> tuple[ImageSet | ImageStream, ImageSet]:
    """The training and the held-out images: `train, held_out = load_images("photos", image_size=64)`.

    The held-out images are those of `val_source` if it is given, or the source's own test part if it has one. Otherwise
    an image is held out if its name has a low hash, so other images can come and go without moving it to the other set.
    With `max_images`, each set is a random part, which is always the same.
    With `stream=True` the training images are an `ImageStream`.

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
    if data.stream:
        return _load_stream(data)
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
        train_rows, held_out_rows = _split(train, data.val_fraction)
    else:
        raise InputError(f"source={data.source} is only one image, so none can be held out; give val_source=")
    of = [len(train_rows), len(held_out_rows)]
    train_rows = _at_most(data.max_images, train_rows, train)
    held_out_rows = _at_most(data.max_images, held_out_rows, held_out)
    if data.max_images is not None:
        notes.append(
            f"max_images={data.max_images}: {len(train_rows):,} of {of[0]:,} training images and "
            f"{len(held_out_rows):,} of {of[1]:,} held-out ones, chosen at random"
        )
    train_set = ImageSet(train, train_rows, data)
    train_set.split, train_set.left_out, train_set.notes = split, left_out, notes + train_set.notes
    return train_set, ImageSet(held_out, held_out_rows, data, like=train_set, prefix=prefix)


def _load_stream(data: DataConfig) -> tuple[ImageStream, ImageSet]:
    """The stream of the training images, and the held-out images."""
    try:
        look = look_at(data)
    except InputError as error:
        raise InputError(f"source={data.source}: {error}") from error
    rows = np.arange(look.held_out, len(look.names))
    sample = ImageSet(look, rows, dataclasses.replace(data, cache_gb=0))  # it decides the channels and the levels
    stream = ImageStream(look, data, sample)
    note = f"images: {len(sample):,} that stand for all of {stream.amount} images, which are read as a stream"
    stream.notes = [*look.notes, *sample.notes]
    sample.notes = [note, *stream.notes]
    if data.val_source is None:
        stream.split = sample.split = f"{look.held_out:,} of the {look.looked_at:,} images that were looked at"
        return stream, ImageSet(look, np.arange(look.held_out), data, like=stream)
    found = open_source("val_source", data.val_source, data)
    held_out = found.held_out or found.train
    try:
        _match_classes(look, held_out)
    except InputError as error:
        remedy = f"{look.looked_at:,} images were looked at; list all classes in a classes.json beside the first shard"
        raise InputError(f"val_source={data.val_source}: {error}; {remedy}") from error
    stream.split = sample.split = data.val_source
    rows = np.arange(len(held_out.names))
    return stream, ImageSet(held_out, rows, data, like=stream, prefix=f"{data.val_source}/")


def load_set(
    key: str, data: DataConfig, image_size: int | Sequence[int] | None = None
) -> tuple[ImageSet, ImageSet | None]:
    """All images of `data.source` and None; or its training and its held-out part if it has both.

    All processes must call it at the same point, like `load_images`.

    Args:
        key: the source's name in messages.
        data: the source's settings.
        image_size: the side of the squares, or height and width; None takes the images' own size, if all have the same.

    Raises:
        InputError: a source or a setting cannot be used, or no image loads.
    """
    _check_settings(data)
    found = open_source(key, data.source, data)
    source, held_out = found.train, found.held_out
    rows = _at_most(data.max_images, np.arange(len(source.names)), source)
    if image_size is None:
        sizes = computed_by_main(lambda: _sizes(source, rows))
        if len(sizes) != 1:
            found_sizes = " and ".join(f"{width}x{height}" for width, height in sorted(sizes)[:2]) or "broken"
            raise InputError(f"{key}={data.source}: holds {found_sizes} images, not one size; set image_size=")
        image_size = sizes.pop()[::-1]
    data = dataclasses.replace(data, image_size=image_size)
    images = ImageSet(source, rows, data)
    images.split, images.left_out, images.notes = found.split, Counter(found.left_out), [*found.notes, *images.notes]
    if held_out is None:
        return images, None
    _match_classes(source, held_out)
    held_out_rows = _at_most(data.max_images, np.arange(len(held_out.names)), held_out)
    return images, ImageSet(held_out, held_out_rows, data, like=images)


def some_rows(available: int, wanted: int | None) -> np.ndarray:
    """All rows of a set, or `wanted` random ones, which are always the same; sorted.

    Evenly spaced rows could all belong to one class if the classes come in turn.
    """
    if wanted is None or wanted >= available:
        return np.arange(available)
    return np.sort(np.random.default_rng(0).choice(available, wanted, replace=False))


class ImageSet:
    """Uint8 images of one size with their class ids, from memory or decoded on request.

    It can be the dataset of a `DataLoader` whose `collate_fn` returns its argument, because it returns whole batches.

    Args:
        source: the source of the images.
        rows: indices of the source's images that are in this set.
        data: the settings.
        like: the training set if this is the held-out one, which then has its channels and its white level. Otherwise,
            channels that data.channels leaves open are 1 if all images are grey, else 3; they and the white level are
            found from all images if all are decoded now, else from 1,000, by the main process for all.
        prefix: prefix of the names in the list of skipped images, if another set has the same names.

    Attributes:
        class_ids: (N,) int64, -1 for an image without a class.
        class_names: the classes in the order of their ids; empty if there are none.
        channels: C, 1 or 3.
        size: (H, W), in pixels.
        image_size: the same as in the settings: the side of a square, or [H, W].
        levels: the black and the white level of images of more than 8 bits, by kind; empty if there are none.
        data: the settings by which the images were read.
        split, left_out, notes: of the training set, what `Found` says about its source and that of the held-out set.

    Raises:
        InputError: an image does not load and data.on_error=raise, or none loads.
    """

    channels: int

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        data: DataConfig,
        *,
        like: ImageSet | ImageStream | None = None,
        prefix: str = "",
    ):
        self.class_ids = source.class_ids[rows]
        self.class_names = source.class_names
        self.image_size, self.size = data.image_size, data.size
        self.split, self.notes = "", list[str]()
        self.left_out = Counter[str]()
        self.levels: dict[Kind, Levels] = dict(like.levels) if like else {}
        self.data = data
        self._source, self._rows, self._prefix = source, rows, prefix
        self._kept = rows  # without the images that are known not to load
        self._broken: dict[int, str] = {}  # index among `rows`: reason
        self._extremes: dict[int, tuple[Kind, float, float]] = {}  # of images whose levels are not known yet
        self._skipped: SkippedFile | None = None
        self._pixels: np.ndarray | None = None  # (N, C, H, W)

        self._channels = like.channels if like else data.channels  # None as long as all images seen are grey
        arrays = _as_they_are(source, rows, data.size, self._channels)
        if arrays is not None:
            self._pixels, self.channels = arrays, arrays.shape[1]
        elif not self._decode_all():
            self.channels, self.levels = computed_by_main(self._look)
        self._channels = self.channels
        if not like:
            self.notes = [each.note(kind) for kind, each in self.levels.items()]

    def __len__(self) -> int:
        return len(self.class_ids)

    @property
    def names(self) -> list[str]:
        """Stable names: a path relative to the folder, the row of an array, or `shard.tar/key`.

        The list is made anew each time, because a million names take 100 MB in each process.
        """
        return [self._source.names[row] for row in self._kept]

    @property
    def amount(self) -> str:
        """How many images there are, for a sentence."""
        return str(len(self))

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded in memory, so that a `DataLoader` needs no worker processes."""
        return self._pixels is not None

    @property
    def crop(self) -> dict[str, Any]:
        """The settings that say how the images came to one size; the black and the white level only if they matter."""
        return crop_of(self.data, self.channels, self.levels)

    def resized(self, image_size: int | Sequence[int]) -> ImageSet:
        """The same images, of another size, decoded on request."""
        other = copy.copy(self)
        other.data = dataclasses.replace(self.data, image_size=image_size)
        other.image_size, other.size = other.data.image_size, other.data.size
        other._rows, other._pixels, other._broken = self._kept, None, {}
        return other

    @property
    def num_broken(self) -> int:
        """Number of images that were found not to load, so far."""
        return len(self._broken)

    def original(self, i: int) -> AbstractContextManager[Image.Image]:
        """Image i as its source holds it, not decoded yet, for a `with` statement, which may raise any exception."""
        return opened(self._source, self._kept[i])

    def uncut(self, i: int, side: int) -> np.ndarray:
        """Image i as uint8 (C, side, side), shrunk to fit and padded, so that nothing is cut off.

        Raises:
            Exception: it does not load; see `DECODE_ERRORS`.
        """
        with self.original(i) as image:
            data = dataclasses.replace(self.data, image_size=side, resize="pad")
            return to_pixels(self._of_8_bits(i, image), self.channels, data)

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
        source, rows = self._source, self._rows  # also of images that do not load

        def compute() -> str:
            names = [source.names[row] for row in rows]
            return fingerprint_of(names, source.class_names, source.class_ids[rows], source.files)

        return computed_by_main(compute)

    def _decode(self, i: int) -> np.ndarray | None:
        """Image i as uint8 (C, H, W), or None if it does not load, with the reason in `_broken`."""
        try:
            with opened(self._source, self._rows[i]) as image:
                return to_pixels(self._of_8_bits(i, image), self._channels, self.data)
        except DECODE_ERRORS as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            found_before = i in self._broken
            self._broken[i] = reason(error)
            if self.data.on_error == "raise":
                remedy = "repair or remove it, or skip such images with data.on_error=skip"
                raise InputError(f"an image does not load: {self._describe(i)}; {remedy}") from error
            if self._skipped is not None and not found_before:
                with contextlib.suppress(OSError):  # a full disk must not end the run because of this list
                    self._skipped.add({self._listed_name(i): self._broken[i]})
            return None

    def _describe(self, i: int) -> str:
        """A broken image's name and reason, for a message."""
        return f"{one_line(self._source.names[self._rows[i]])} ({self._broken[i]})"

    def _listed_name(self, i: int) -> str:
        """A broken image's name in the list of those skipped."""
        return one_line(self._prefix + self._source.names[self._rows[i]])

    def _of_8_bits(self, i: int, image: Image.Image) -> Image.Image:
        """Image i by the set's levels if it has more than 8 bits; by its own, which are kept, until those are known."""
        deep = deep_of(image)
        if deep is None:
            return image
        levels = self.levels.get(deep.kind)
        if levels is None and deep.white is None:
            self._extremes[i] = deep.kind, *deep.extremes()
            levels = find_levels(deep.kind, [self._extremes[i][1:]], self.data.white)
        return deep.to_8_bits(levels)

    def _found_levels(self) -> dict[Kind, Levels]:
        """The levels that are known, and those of the images whose extremes were kept."""
        found = dict(self.levels)
        for kind in sorted({kind for kind, *_ in self._extremes.values()}):
            extremes = [(low, high) for other, low, high in self._extremes.values() if other == kind]
            found[kind] = find_levels(kind, extremes, self.data.white)
        return found

    def _decode_all(self) -> bool:
        """Decodes every image into memory, and drops those that do not load; False if there is no room.

        Until an image has colour, the pixels have one channel. Images of more than 8 bits are decoded again, when the
        levels of all are known.
        """
        height, width = self.data.size
        room = self.data.cache_gb * 2**30 // (height * width * max(1, len(self)))  # in channels
        if (self._channels or 1) > room:
            return False
        pixels = np.empty((len(self), self._channels or 1, height, width), np.uint8)
        kept: list[int] = []
        again = set[int]()
        for i, image in self._decoded():
            if image is None:
                continue
            if len(image) > pixels.shape[1]:  # the first one with colour
                self._channels = len(image)
                if self._channels > room:
                    break
                grey, pixels = pixels, np.empty((len(self), self._channels, height, width), np.uint8)
                pixels[: len(kept)] = grey[: len(kept)]
            if len(image) == 1 and self.data.resize == "pad":
                again.add(i)  # in a set with colour, the padding has colour
            pixels[len(kept)] = image
            kept.append(i)
        if not object_from_main((self._channels or 1) <= room):
            return False
        self._drop_broken(kept)
        self.channels, self.levels = object_from_main((pixels.shape[1], self._found_levels()))
        self._channels = self.channels
        for k, i in enumerate(kept):
            needed = i in self._extremes or (i in again and self.channels == 3)
            if needed and (image := self._decode(i)) is not None:
                pixels[k] = image
        self._pixels = pixels[: len(kept)]
        return True

    def _decoded(self) -> Iterator[tuple[int, np.ndarray | None]]:
        """Decodes all images in several threads, and yields each with its index, in order."""
        count = len(self)
        blocks = [range(start, min(start + 16, count)) for start in range(0, count, 16)]

        def decode(block: range) -> list[np.ndarray | None]:
            with quiet_pillow:  # once for all of them, which takes less time
                return [self._decode(i) for i in block]

        threads = min(MAX_THREADS, cores_per_process())
        pool = ThreadPoolExecutor(threads)  # Pillow decodes without the GIL
        try:
            decoded = chain.from_iterable(pool.map(decode, blocks) if threads > 1 else map(decode, blocks))
            yield from enumerate(tqdm(decoded, "decoding", count, unit=" images", leave=False, disable=None))
        finally:
            pool.shutdown(cancel_futures=True)  # a program that is stopped does not wait for the other blocks

    def _drop_broken(self, kept: list[int]) -> None:
        """Keeps the names and classes of these images only.

        Raises:
            InputError: there are none.
        """
        if not self._broken:
            return
        count, first = len(self), self._describe(min(self._broken))
        if not kept:
            raise InputError(f"none of {count} images loads, first: {first}; repair them or give others")
        images = "image that does" if len(self._broken) == 1 else "images that do"
        logger.warning(f"skipped {len(self._broken)} {images} not load, first: {first}")
        self._kept, self.class_ids = self._rows[kept], self.class_ids[kept]

    def _look(self) -> tuple[int, dict[Kind, Levels]]:
        """The channels and the levels, from some of the images, or from the first that loads if none of those does.

        Raises:
            InputError: no image loads, so that the channels remain open.
        """
        sample = some_rows(len(self), PROBED_IMAGES)
        with ThreadPoolExecutor(min(MAX_THREADS, cores_per_process())) as pool:
            problems = list(pool.map(self._look_at, sample))
        others = (self._look_at(i) for i in range(len(self))) if all(problems) else iter(())
        loads = not all(problems) or any(not problem for problem in others)
        if not loads and self._channels is None:
            first = f"{one_line(self._source.names[self._rows[sample[0]]])} ({problems[0]})"
            raise InputError(f"none of {len(self)} images loads, first: {first}; repair them or give others")
        return self._channels or 1, self._found_levels()

    def _look_at(self, i: int) -> str:
        """Notes an image's extremes, and whether it has colour unless another one has; returns why it does not load."""
        try:
            with opened(self._source, self._rows[i]) as image:
                image = self._of_8_bits(i, image)
                if self._channels is None and len(to_pixels(image, None, self.data)) == 3:
                    self._channels = 3
        except DECODE_ERRORS as error:
            return reason(error)
        return ""

    def _read_at_or_after(self, i: int) -> tuple[np.ndarray, int]:
        """The first image from i on that loads, and its index; the search goes round once."""
        for j in ((i + step) % len(self) for step in range(len(self))):
            pixels = None if j in self._broken else self.read(j)  # some images take long to fail: once is enough
            if pixels is not None:
                return pixels, j
        raise InputError(f"none of {len(self)} images loads, first: {self._describe(i)}; repair them or give others")


def _check_settings(data: DataConfig) -> None:
    if data.white is not None and not 0 < data.white < float("inf"):
        raise InputError(f"white={data.white} must be above 0; use 4095, for example, for 12 bits")
    for key, choices in {"resize": ("crop", "pad"), "on_error": ("skip", "raise"), "channels": (1, 3, None)}.items():
        if getattr(data, key) not in choices:
            known = " or ".join("null" if choice is None else str(choice) for choice in choices)
            raise InputError(f"{key}={getattr(data, key)} is not known; use {known}")
    if min(data.size) < 1:
        raise InputError(f"image_size={shown(data.image_size)} is not a number of pixels; use 32, for example")
    if max(data.size) > MAX_SIDE:
        raise InputError(f"image_size={shown(data.image_size)}: must be at most {MAX_SIDE}")
    if not 0 <= data.val_fraction < 1:
        raise InputError(f"val_fraction={data.val_fraction} must be at least 0 and below 1; use 0.05, for example")
    try:
        ImageColor.getrgb(data.background)
    except ValueError as error:
        raise InputError(f"background={data.background} is not a colour; use a name or #rrggbb") from error


def _match_classes(train: Source, held_out: Source) -> None:
    """Gives each class of the held-out images, by its name, the id that it has in training.

    A name that differs only in upper and lower case is the same, unless training has both.
    """
    ids = {name: i for i, name in enumerate(train.class_names)}
    folded = Counter(name.casefold() for name in ids)
    ids = {name.casefold(): i for name, i in ids.items() if folded[name.casefold()] == 1} | ids
    found = [ids.get(name, ids.get(name.casefold())) for name in held_out.class_names]
    if not ids:
        held_out.class_ids = np.full_like(held_out.class_ids, -1)
    elif None in found:
        unknown = held_out.class_names[found.index(None)]
        raise InputError(f"no training image has the held-out class {unknown!r}; rename that class or remove it")
    else:  # -1, no class, indexes the -1 at the end
        held_out.class_ids = np.array([*found, -1])[held_out.class_ids]
    held_out.class_names = train.class_names


def _split(source: Source, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those held out by a low hash of their names; at least one of each.

    At least one image of each class is for training.
    """
    index = getattr(source, "index", None)  # has the hashes already
    hashes = hashes_of(source.names) if index is None else index.hashes
    held_out = hashes / 2.0**64 < val_fraction
    alone = np.bincount(source.class_ids + 1)[source.class_ids + 1] == 1  # the only image of its class, or without one
    lowest_first = np.lexsort((hashes, alone & (source.class_ids >= 0)))
    held_out[lowest_first[0]] = True
    held_out[np.argmax(hashes)] = False
    by_class = np.lexsort((hashes, source.class_ids))
    ids = source.class_ids[by_class]
    last = by_class[np.append(ids[1:] != ids[:-1], True)]  # of each class, the one that would be held out last
    lost = last[held_out[last] & (source.class_ids[last] >= 0)]
    held_out[lost[: held_out.sum() - 1]] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _at_most(count: int | None, rows: np.ndarray, source: Source) -> np.ndarray:
    """`count` random ones of the rows, sorted, with at least one of each class; a larger count adds to the same ones.

    Raises:
        InputError: there are more classes than that.
    """
    if count is None:
        return rows
    drawn = np.random.default_rng(0).permutation(rows)
    firsts = np.unique(source.class_ids[drawn], return_index=True)[1]  # of each class, the one drawn first
    if len(firsts) > count:
        raise InputError(f"max_images={count}: is below the number of classes; give {len(firsts)} or more")
    return np.sort(np.concatenate([drawn[firsts], np.delete(drawn, firsts)])[:count])


def _sizes(source: Source, rows: np.ndarray) -> set[tuple[int, int]]:
    """Width and height of those images in a sample that open."""
    sizes = set()
    for row in rows[some_rows(len(rows), PROBED_IMAGES)]:
        with contextlib.suppress(DECODE_ERRORS), opened(source, row) as image:
            sizes.add(upright_size(image))
    return sizes


def _as_they_are(source: Source, rows: np.ndarray, size: tuple[int, int], channels: int | None) -> np.ndarray | None:
    """The images (N, C, H, W) of an array that need no change; None for any other source."""
    if not isinstance(source, ArraySource) or source.images.dtype != np.uint8 or source.images.shape[1:3] != size:
        return None
    images = source.images if len(rows) == len(source.images) else source.images[rows]
    if images.shape[3] == 3 and channels != 3:
        blocks = (images[start : start + 1024] for start in range(0, len(images), 1024))
        if all((block == block[..., :1]).all() for block in blocks):
            images = images[..., :1]
    if images.shape[3] not in ([channels] if channels else (1, 3)):
        return None
    return np.ascontiguousarray(rearrange(images, "n h w c -> n c h w"))
