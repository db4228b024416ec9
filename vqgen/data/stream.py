"""A stream of images: shards read one after another without an index, for data that do not fit on the disk.

The processes and their workers are *readers*, each with its own part of every epoch's shuffled shards. A reader
shuffles within blocks of its images: while it hands out one block in random order, it reads the next, one image for
each that leaves, so that its memory always holds as many encoded images as a block.

Where a reader is follows from the number of images that it has handed out, if the number of images in each shard is
known; the user's cache folder keeps those numbers as they become known. So a run that goes on reads, without decoding,
at most the rest of one block again, and then yields the same bits as if it had never stopped. If the numbers are lost,
it passes over the shards before its place once more to count them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vqgen.data.deep import deep_of, find_levels
from vqgen.data.look import Look
from vqgen.data.pixels import DECODE_ERRORS, crop_of, open_image, opened, to_pixels
from vqgen.data.skipped import PASSING, SkippedFile, one_line, reason
from vqgen.data.sources.shards import Damaged, Sample
from vqgen.data.sources.sides import side_label
from vqgen.distributed import computed_by_main, rank
from vqgen.errors import InputError
from vqgen.settings import DataConfig

if TYPE_CHECKING:
    from vqgen.data.images import ImageSet

logger = logging.getLogger("vqgen")

BROKEN_IN_A_ROW = 1000  # images; no set that can be used has as many
BEHIND = 64  # images by which a thread may ask later than another one for an earlier image
EMPTY_EPOCHS = 10


class ImageStream:
    """Uint8 images of one size with their class ids, in the order of a stream; a sibling of `ImageSet`.

    Args:
        look: what is known of the stream.
        data: the settings.
        sample: some of the training images, which stand for all where images are read at random.

    Attributes:
        class_names, channels, image_size, levels, split, left_out, notes: as of `ImageSet`; channels and levels are
            those of the sample.
        fingerprint: hex digest that changes with the shards or the classes.
        amount: how many images there are, for a sentence.
    """

    in_memory = False

    def __init__(self, look: Look, data: DataConfig, sample: ImageSet):
        self.look, self.data, self.sample = look, data, sample
        self.channels, self.levels = sample.channels, sample.levels
        self.class_names, self.fingerprint, self.image_size = look.class_names, look.fingerprint, data.image_size
        self.amount = f"{len(look.shards)} shards of"
        self.split, self.notes, self.left_out = "", list[str](), Counter[str]()
        self._held_out = frozenset(look.names[: look.held_out])
        self._skipped: SkippedFile | None = None
        self._said = set[str]()

    def report_skipped(self, path: Path) -> None:
        """Lists in a file the images that do not load, with the reason, as they are found."""
        self._skipped = SkippedFile(path)

    def batches(
        self, reader: int, readers: int, *, seed: int, batch_size: int, taken: int, buffer: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one of the readers, without end: images uint8 (B, C, H, W) and class ids int64 (B,).

        The next image that loads replaces one that does not.

        Args:
            reader: the reader's number.
            readers: the number of readers.
            seed: seed of the shuffling.
            batch_size: B.
            taken: number of this reader's batches that were taken before.
            buffer: number of encoded images in memory.

        Raises:
            InputError: an image does not load and data.on_error=raise, none loads, or a shard cannot be read.
        """
        samples = _Reader(self, reader, readers, seed, buffer).shuffled(taken * batch_size)
        ahead = deque[Sample]()

        def at_or_after(i: int) -> tuple[np.ndarray, int]:
            for j in range(i, i + BROKEN_IN_A_ROW):
                while len(ahead) <= j:
                    ahead.append(next(samples))
                if (pixels := self.decode(ahead[j])) is not None:
                    return pixels, self.class_id(ahead[j])
            raise InputError(f"none of {BROKEN_IN_A_ROW} images in a row loads; repair them or give others")

        while True:
            pixels, class_ids = zip(*[at_or_after(i) for i in range(batch_size)], strict=True)
            for _ in range(batch_size):
                ahead.popleft()
            yield torch.from_numpy(np.stack(pixels)), torch.tensor(class_ids)

    def training_samples(self, number: int, wanted: Callable[[], bool]) -> Iterator[Sample | None]:
        """The training images of a shard, in order; None for one that is not wanted."""
        shard = self.look.shards[number]
        try:
            for name, sample in shard.samples(lambda name: name not in self._held_out and wanted()):
                if name not in self._held_out:
                    yield sample
        except Damaged as error:
            if self.data.on_error == "raise":
                remedy = "repair it, or skip the rest of such shards with data.on_error=skip"
                raise InputError(f"{error.message}; {remedy}") from error
            self._skip(shard.name, error.message)

    def decode(self, sample: Sample) -> np.ndarray | None:
        """The pixels (C, H, W) of an image, or None if it does not load."""
        try:
            with opened(cast(Any, _One(sample)), 0) as image:
                if (deep := deep_of(image)) is not None:
                    levels = self.levels.get(deep.kind) or find_levels(deep.kind, [deep.extremes()], self.data.white)
                    image = deep.to_8_bits(levels)
                return to_pixels(image, self.channels, self.data)
        except DECODE_ERRORS as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            if self.data.on_error == "raise":
                remedy = "repair or remove it, or skip such images with data.on_error=skip"
                shown = f"{one_line(sample.name)} ({reason(error)})"
                raise InputError(f"an image does not load: {shown}; {remedy}") from error
            self._skip(one_line(sample.name), reason(error))
            return None

    def _skip(self, name: str, why: str) -> None:
        self._say_once("skipping", f"skipping images that do not load, first: {name} ({why})")
        if self._skipped is not None:
            with contextlib.suppress(OSError):  # a full disk must not end the run because of this list
                self._skipped.add({name: why})

    def class_id(self, sample: Sample) -> int:
        """An image's class id; -1 if it has no class, or none that was seen before the first step."""
        extension, key = self.look.side
        label = None
        with contextlib.suppress(ValueError, RecursionError):  # a damaged file is no label
            label = side_label(sample.sides[extension], key) if extension in sample.sides else None
        if label is not None and label not in self.look.ids:
            what = f"is none of the {len(self.class_names)} classes that were seen, so it is no class"
            remedy = "list all classes in a classes.json beside the first shard"
            self._say_once("class", f"the label {one_line(label)} of {one_line(sample.name)} {what}; {remedy}")
        return -1 if label is None else self.look.ids.get(label, -1)

    def _say_once(self, kind: str, line: str) -> None:
        """Warns, once in each process that reads; only the main process's readers are heard."""
        if kind not in self._said and rank() == 0:
            logger.warning(line)
        self._said.add(kind)


class OrderedStream:
    """The training images of a stream by their number, for a reader that takes them in rising order, as encoding does.

    All processes must make it at the same point. The number of images in each shard must be known: those that no epoch
    has found yet are counted.

    Args:
        stream: the stream.

    Attributes:
        class_ids: (N,) int64, known for images that were read.
        class_names, channels, image_size, fingerprint, report_skipped: of the stream.
        size: height and width of the images.
    """

    def __init__(self, stream: ImageStream):
        self.stream = stream
        self.class_names, self.channels, self.image_size = stream.class_names, stream.channels, stream.image_size
        self.size = stream.data.size
        self.fingerprint, self.report_skipped = stream.fingerprint, stream.report_skipped
        counts = computed_by_main(lambda: _count_all(stream))
        self.starts = np.cumsum([0, *counts])  # of each shard
        self.class_ids = np.full(self.starts[-1], -1)
        self._lock = threading.Lock()
        self._ahead: dict[int, Sample] = {}
        self._samples: Iterator[tuple[int, Sample]] | None = None

    def __len__(self) -> int:
        return len(self.class_ids)

    @property
    def crop(self) -> dict[str, Any]:
        """The settings that say how the images came to one size, and which images are held out."""
        stream = self.stream
        return crop_of(stream.data, stream.channels, stream.levels) | {"stream": stream.look.folder.name}

    def resized(self, image_size: int | Sequence[int]) -> OrderedStream:
        """The same images, of another size."""
        other = copy.copy(self.stream)
        other.data = dataclasses.replace(other.data, image_size=image_size)
        other.image_size = other.data.image_size
        return OrderedStream(other)

    def read(self, i: int) -> np.ndarray | None:
        """Image i as uint8 (C, H, W), or None if it does not load. Several threads may read, none behind by over 64.

        Raises:
            InputError: it does not load and data.on_error=raise, or a shard cannot be read.
        """
        with self._lock:
            self._samples = self._samples or self._from(max(0, i - BEHIND))
            while i not in self._ahead:
                found = next(self._samples, None)
                if found is not None:
                    self._ahead[found[0]] = found[1]
                if found is None or found[0] > i:  # a shard has become shorter since it was counted
                    return None
            sample = self._ahead.pop(i)
            self.class_ids[i] = self.stream.class_id(sample)
        return self.stream.decode(sample)

    def _from(self, first: int) -> Iterator[tuple[int, Sample]]:
        """Number and sample of each image from one on."""
        shard = int(np.searchsorted(self.starts, first, "right")) - 1
        for number in range(shard, len(self.starts) - 1):
            row = int(self.starts[number])
            for sample in self.stream.training_samples(number, lambda: row >= first):  # noqa: B023  # of this shard
                if sample is not None:
                    yield row, sample
                row += 1


def _count_all(stream: ImageStream) -> list[int]:
    """The number of training images in each shard."""
    counts, shards = _read_counts(stream.look.folder), range(len(stream.look.shards))
    unknown = [shard for shard in shards if shard not in counts]
    for shard in tqdm(unknown, "counting", unit=" shards", leave=False, disable=None if unknown else True):
        count = sum(1 for _ in stream.training_samples(shard, lambda: False))
        _learn(stream.look.folder, counts, shard, count)
    return [counts[shard] for shard in shards]


class _One(NamedTuple):
    """A sample as the only image of a source."""

    sample: Sample

    def num_bytes(self, row: int) -> int:
        return len(self.sample.content)

    def open(self, row: int) -> Image.Image:
        return open_image(self.sample.content, self.sample.extension)


class _Mark(NamedTuple):
    """The end of a block: its epoch, and its number in the epoch."""

    epoch: int
    block: int


@dataclass
class _Reader:
    """One of the readers of a stream, with its own part of every epoch.

    It has every `readers`-th shard of an epoch or, if there are fewer shards than readers, every `readers`-th image.
    """

    stream: ImageStream
    number: int
    readers: int
    seed: int
    buffer: int
    counts: dict[int, int] = field(default_factory=dict)  # of training images, by shard

    def shuffled(self, taken: int) -> Iterator[Sample]:
        """This reader's images in shuffled order, without end, after the first `taken`."""
        self.counts = _read_counts(self.stream.look.folder)
        while True:
            epoch, rest = self._place(taken)
            skip = rest % self.buffer
            pieces = self._pieces(epoch, rest - skip)
            block, mark = self._fill([], pieces)
            if mark.epoch == epoch and skip < len(block):
                break
            # The epoch is shorter, which was not known; now it is.
        while True:
            order = np.random.default_rng([self.seed, self.number, self.readers, *mark]).permutation(len(block))
            left = [block[i] for i in reversed(order[skip:])]
            block, skip, end = [], 0, None
            while left:
                yield left.pop()
                if end is None:
                    piece = next(pieces)
                    if isinstance(piece, _Mark):
                        end = piece
                    else:
                        block.append(piece)
            block, mark = (block, end) if end is not None else self._fill(block, pieces)

    def _fill(self, block: list[Sample], pieces: Iterator[Sample | _Mark]) -> tuple[list[Sample], _Mark]:
        for piece in pieces:
            if isinstance(piece, _Mark):
                return block, piece
            block.append(piece)
        raise AssertionError

    def _pieces(self, epoch: int, first: int) -> Iterator[Sample | _Mark]:
        """The images from one of an epoch on, through all later epochs, with a mark after each block."""
        empty = 0
        while empty < EMPTY_EPOCHS:
            block, size = first // self.buffer, 0
            empty += 1
            for sample in self._epoch(epoch, first):
                yield sample
                empty, size = 0, size + 1
                if size == self.buffer:
                    yield _Mark(epoch, block)
                    block, size = block + 1, 0
            if size:
                yield _Mark(epoch, block)
            epoch, first = epoch + 1, 0
        raise self._no_images()

    def _epoch(self, epoch: int, first: int) -> Iterator[Sample]:
        """This reader's images of an epoch, from one on."""
        shards, offset, stride = self._share(epoch)
        position = offset + first * stride  # of the next image that is this reader's, from the shard's beginning
        for shard in shards:
            count = self.counts.get(shard)
            if count is None or position < count:
                count = 0

                def is_mine() -> bool:
                    return count >= position and (count - position) % stride == 0  # noqa: B023  # of this shard

                for sample in self.stream.training_samples(shard, is_mine):
                    count += 1
                    if sample is not None:
                        yield sample
                _learn(self.stream.look.folder, self.counts, shard, count)
                position += max(0, math.ceil((count - position) / stride)) * stride
            position -= count

    def _share(self, epoch: int) -> tuple[list[int], int, int]:
        """This reader's shards of an epoch; the first of its images in them, and the step to the next."""
        shards = len(self.stream.look.shards)
        order = np.random.default_rng([self.seed, epoch]).permutation(shards).tolist()
        if shards < self.readers:
            return order, self.number, self.readers
        return order[self.number :: self.readers], 0, 1

    def _place(self, taken: int) -> tuple[int, int]:
        """The epoch in which an image is and its number there, as far as the sizes of the epochs are known."""
        empty = 0
        for epoch in itertools.count():
            shards, offset, stride = self._share(epoch)
            if not all(shard in self.counts for shard in shards):
                return epoch, taken
            size = len(range(offset, sum(self.counts[shard] for shard in shards), stride))
            if taken < size:
                return epoch, taken
            taken -= size
            empty = 0 if size else empty + 1
            if empty == EMPTY_EPOCHS:
                raise self._no_images()
        raise AssertionError

    def _no_images(self) -> InputError:
        return InputError(f"no images for one of {self.readers} readers; lower data.workers, or give more shards")


def _learn(folder: Path, counts: dict[int, int], shard: int, count: int) -> None:
    """Adds a shard's number of training images to those that are known."""
    if counts.get(shard) != count:
        counts[shard] = count
        with contextlib.suppress(OSError), _counts_file(folder).open("a") as file:
            file.write(f"{shard} {count}\n")


def _counts_file(folder: Path) -> Path:
    return folder / "counts"


def _read_counts(folder: Path) -> dict[int, int]:
    """The number of training images in each shard whose number is known; a shard's last line counts."""
    with contextlib.suppress(OSError, ValueError):
        lines = _counts_file(folder).read_text().splitlines(keepends=True)
        numbers = [line.split() for line in lines if line.endswith("\n")]
        return {int(shard): int(count) for shard, count in numbers}
    return {}
