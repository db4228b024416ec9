"""What a source was found to hold, in numbers and in lines: the first that a program says about the user's images."""

import contextlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from vqgen.codes import sides
from vqgen.data.images import MAX_THREADS, ImageSet, some_rows
from vqgen.data.pixels import DECODE_ERRORS, upright_size
from vqgen.data.skipped import one_line
from vqgen.data.stream import ImageStream
from vqgen.distributed import cores_per_process
from vqgen.settings import DataConfig

LOOKED_AT = 1000  # images whose headers are read for their sizes
SHOWN_CLASSES, SHOWN_CLASSES_SHORT = 12, 6
SHOWN_NOTES_SHORT, SHOWN_FEW = 5, 3
LONG_NAME = 40
FEW = 10  # images of a class that are too few to learn it
UPSCALED = 0.01  # share of images smaller than image_size that is worth a hint
ALIKE, MOSTLY = 1.1, 0.75  # aspect ratios are alike up to this factor; the share of images that is most of them
MUCH_LOST = 0.15  # share of an image


@dataclass(frozen=True)
class Description:
    """A training set and its held-out set, described.

    Attributes:
        train: number of training images.
        held_out: number of held-out images; None if none were asked for.
        classes: number of training images by class, in the order of the class ids.
        channels: 1 or 3.
        image_size: the setting, H = W or [H, W].
        sizes: min, median and max of the originals' width and height, from up to `LOOKED_AT` of them; {} if none opens.
        left_out: number of files that are not used, by extension or reason.
        notes: what was assumed, or found and not used; one line each.
        hints: what the user would want to change before training; one line each.
        split: where the held-out images come from, in words.
        channels_from: how the channels were decided, in words.
        made_by: how the originals came to their size, in words.
        stream: how long the stream is of which these are only some images, in words; empty if these are all.
    """

    train: int
    held_out: int | None
    classes: dict[str, int]
    channels: int
    image_size: int | Sequence[int]
    sizes: dict[str, dict[str, int]]
    left_out: dict[str, int]
    notes: list[str]
    hints: list[str]
    split: str
    channels_from: str
    made_by: str
    stream: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that the model sees."""
        return sides(self.image_size)

    def as_json(self) -> str:
        """The content of preview.json: the numbers, and the notes with the hints."""
        words = ("hints", "split", "channels_from", "made_by", *([] if self.stream else ["stream"]))
        kept = {key: value for key, value in asdict(self).items() if key not in words}
        return json.dumps(kept | {"notes": [*self.notes, *self.hints]}, indent=1, ensure_ascii=False) + "\n"

    def lines(self) -> list[str]:
        """All of it, one line for each thing."""
        return [
            f"images: {self._images()}",
            self._classes(SHOWN_CLASSES),
            f"channels: {self.channels} ({self.channels_from})",
            f"size: {self._size()}",
            *self._left_out(),
            *(f"note: {note}" for note in self.notes),
            *self.hint_lines,
        ]

    def short_lines(self, what: str = "images") -> list[str]:
        """The same in fewer lines, for the programs that go on to do something else; `what` is the first word."""
        colour = "grey" if self.channels == 1 else "RGB"
        more = len(self.notes) - SHOWN_NOTES_SHORT
        return [
            f"{what}: {self._images()}, {colour}, {self._size()}",
            self._classes(SHOWN_CLASSES_SHORT),
            *self._left_out(),
            *(f"note: {note}" for note in self.notes[:SHOWN_NOTES_SHORT]),
            *([f"note: {more} more notes; stage1/preview.py shows all"] if more > 0 else []),
            *self.hint_lines,
        ]

    @property
    def hint_lines(self) -> list[str]:
        """What the user would want to change, one line each."""
        return [f"hint: {hint}" for hint in self.hints]

    def _images(self) -> str:
        if self.held_out is None:
            return f"{self.train:,}"
        return f"{self.train:,} to train on, {self.held_out:,} held out ({self.split})"

    def _classes(self, most: int) -> str:
        return f"classes: {listed_classes(self.classes, most)}"

    def _size(self) -> str:
        size = shown_size(self.image_size)
        if not self.sizes:
            return size
        width, height = self.sizes["width"], self.sizes["height"]
        if width["min"] == width["max"] and height["min"] == height["max"]:
            original = f"{width['min']}x{height['min']}"
            return f"{size}, as they are" if original == size else f"{size}, {self.made_by} from {original}"
        widths, heights = (f"{side['min']} to {side['max']}" for side in (width, height))
        median = f"{width['median']}x{height['median']}"
        return f"{size}, {self.made_by} from {widths} wide and {heights} high, median {median}"

    def _left_out(self) -> list[str]:
        counts = ", ".join(f"{count:,} {one_line(what)}" for what, count in sorted(self.left_out.items()))
        return [f"left out: {counts}"] if counts else []


def describe(train: ImageSet | ImageStream, held_out: ImageSet | None, batch_size: int | None = None) -> Description:
    """Describes the sets of `load_images` or `load_set`, and adds the hints that are due.

    It reads the headers of some images, so only the main process should call it.

    Args:
        train: the training set, or all images; some of a stream's stand for all.
        held_out: the held-out set, if there is one.
        batch_size: the images of a training step; None if nothing is trained, so that no hint about training is due.
    """
    stream = ""
    if isinstance(train, ImageStream):
        stream, train, batch_size = (
            train.amount,
            train.sample,
            None,
        )  # numbers of a sample call for no hint about training
    data = train.data
    split = train.split or f"{100 * data.val_fraction:g} % by a hash of the names"
    if data.val_source is not None:
        split = f"data.val_source={data.val_source}"
    sizes = original_sizes(train)[:, 1:]
    left_out = dict(train.left_out)
    if broken := train.num_broken + (held_out.num_broken if held_out else 0):
        left_out["broken"] = broken
    counts = np.bincount(train.class_ids[train.class_ids >= 0], minlength=len(train.class_names)).tolist()
    classes = dict(zip(train.class_names, counts, strict=True))
    unlabelled = int((train.class_ids < 0).sum()) if classes else 0
    notes = list(train.notes) + ([f"{unlabelled:,} images have no class"] if unlabelled else [])
    colour = "the images have colour" if train.channels == 3 else "no image that was looked at has colour"
    return Description(
        train=len(train),
        held_out=None if held_out is None else len(held_out),
        classes=classes,
        channels=train.channels,
        image_size=data.image_size,
        sizes=_spread(sizes),
        left_out=left_out,
        notes=notes,
        hints=_hints(len(train), classes, sizes, data, batch_size),
        split=split,
        channels_from="as data.channels says" if data.channels else colour,
        made_by="cropped" if data.resize == "crop" else f"padded with {data.background}",
        stream=stream,
    )


def original_sizes(images: ImageSet) -> np.ndarray:
    """Index, width and height (n, 3) of up to `LOOKED_AT` images as their source holds them, those that open."""

    def size(i: int) -> tuple[int, int, int] | None:
        with contextlib.suppress(DECODE_ERRORS), images.original(i) as image:
            return i, *upright_size(image)
        return None

    rows = some_rows(len(images), LOOKED_AT)
    with ThreadPoolExecutor(min(MAX_THREADS, cores_per_process())) as pool:
        return np.array([found for found in pool.map(size, rows) if found], np.int64).reshape(-1, 3)


def listed_classes(classes: Mapping[str, int], most: int) -> str:
    """The number of classes and the first of them with their counts, in words."""
    if not classes:
        return "none"
    more = f", ... and {len(classes) - most:,} more" if len(classes) > most else ""
    return f"{len(classes):,}: {_counted(classes, most)}{more}"


def _counted(classes: Mapping[str, int], most: int) -> str:
    some = itertools.islice(classes.items(), most)
    return ", ".join(f"{short_name(name)} ({count:,})" for name, count in some)


def short_name(name: str) -> str:
    """A class's name for a line of text."""
    name = one_line(name)
    return name if len(name) <= LONG_NAME else f"{name[: LONG_NAME - 3]}..."


def shown_size(size: int | Sequence[int]) -> str:
    """An image size in words, width first as is usual: 64x64."""
    height, width = sides(size)
    return f"{width}x{height}"


def _spread(sizes: np.ndarray) -> dict[str, dict[str, int]]:
    """Min, median and max of widths and heights (n, 2)."""
    if not len(sizes):
        return {}
    return {
        name: {"min": int(column.min()), "median": int(np.median(column)), "max": int(column.max())}
        for name, column in zip(("width", "height"), sizes.T, strict=True)
    }


def _hints(
    count: int, classes: Mapping[str, int], sizes: np.ndarray, data: DataConfig, batch_size: int | None
) -> list[str]:
    """What a user would want to change before training; sizes are widths and heights (n, 2)."""
    hints = []
    height, width = data.size
    if len(sizes):
        side = min(height, width)
        small = (sizes < (width, height)).any(axis=1)
        if data.resize == "crop" and small.mean() >= UPSCALED:
            images = "all images" if small.all() else f"{small.sum():,} of {len(sizes):,} images"
            smallest = int(np.quantile(sizes.min(axis=1), UPSCALED)) // 8 * 8  # of which hardly any image is smaller
            fits = f"data.image_size={smallest} or " if 8 <= smallest < side else ""
            side = smallest if fits else side
            hints.append(
                f"{images} are smaller than {width}x{height} and are enlarged; {fits}data.resize=pad would not"
            )
        if data.resize == "crop":
            hints += _shape_hint(sizes, width / height, side)
    if batch_size is None:
        return hints
    if count < batch_size:
        hints.append(
            f"{count:,} images are fewer than a batch of {batch_size:,}, so a step sees some of them twice; "
            f"train.batch_size={1 << max(0, count.bit_length() - 2)}, for example"
        )
    few = {name: number for name, number in classes.items() if number < FEW}
    if few:
        names = "class" if len(few) == 1 else "classes"
        more = f" and {len(few) - SHOWN_FEW:,} more" if len(few) > SHOWN_FEW else ""
        hints.append(
            f"under {FEW} images in {names} {_counted(few, SHOWN_FEW)}{more}; so few are learned by heart or not at all"
        )
    if len(classes) == 1:
        hints.append(f"all images have one class, {short_name(next(iter(classes)))}, so it tells a model nothing")
    return hints


def _shape_hint(sizes: np.ndarray, ratio: float, side: int) -> list[str]:
    """A hint if most images have one shape that is not that of the model's images.

    Args:
        sizes: widths and heights (n, 2).
        ratio: width by height of the model's images.
        side: the short side of a better image size.
    """
    logs = np.log(sizes[:, 0] / sizes[:, 1])  # 0 for a square
    middle = float(np.median(logs))
    alike = np.abs(logs - middle) < math.log(ALIKE)
    lost = 1 - math.exp(-abs(middle - math.log(ratio)))
    if alike.mean() < MOSTLY or lost < MUCH_LOST:
        return []
    width, height = np.median(sizes[alike], axis=0).astype(int)
    step = math.gcd(side, 8)
    longer = round(side * math.exp(abs(middle)) / step) * step
    longer = max(side, min(longer, max(width, height) // step * step))  # enlarges nothing
    fits = str(side) if longer == side else f"[{longer},{side}]" if middle < 0 else f"[{side},{longer}]"
    shape = "square" if longer == side else "tall" if middle < 0 else "wide"
    return [
        f"most images are {shape}, like {width}x{height}, and lose {100 * lost:.0f} % in the crop; "
        f"data.image_size={fits} or data.resize=pad would keep it"
    ]
