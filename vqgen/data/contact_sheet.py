"""A picture of a training set: images as the model will see them, by class, and what cropping cuts off."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from vqgen.data.describe import SHOWN_CLASSES, Description, original_sizes, shown_size
from vqgen.data.images import ImageSet
from vqgen.data.pixels import DECODE_ERRORS
from vqgen.data.skipped import one_line

WIDTH = 1200  # pixels that a row of images may take
SMALL, LARGE = 64, 256  # images below and above these sides are shown larger or smaller
MAX_COLUMNS, ROWS_WITHOUT_CLASSES = 12, 5
GAP, TEXT, LINE = 6, 16, 22
SHEET = "#e6e6e6"  # so that white borders of the images can be seen
LABEL = 200  # width of the column of class names
CROPS, CROP_SIDE = 6, 160  # crops that lose most; the side of the square that an original is shown in
LEAST_LOSS = 0.02  # share of an image's area
NO_GLYPH = "\U0010ffff"  # a character that no font has


def contact_sheet(images: ImageSet, found: Description) -> tuple[Image.Image, list[str]]:
    """The picture, and lines that say what it shows otherwise than one would expect.

    Args:
        images: the training set.
        found: its description.
    """
    cell = Cell(*found.size)
    label = LABEL if found.classes else GAP
    columns = max(1, min(MAX_COLUMNS, (WIDTH + GAP) // (cell.width + GAP)))
    strips = [_text(f"As the model sees them: {shown_size(found.image_size)}{cell.said}")]
    numbered = []
    for class_id, rows in _rows(images, columns):
        picture = Image.new("RGB", (label + columns * (cell.width + GAP), max(cell.height + GAP, 2 * LINE)), SHEET)
        if found.classes:
            name = one_line(images.class_names[class_id])
            if not _has_letters(name):
                numbered.append(f"{class_id} = {name}")
                name = f"class {class_id}"
            draw = ImageDraw.Draw(picture)
            draw.text((GAP, 0), _shortened(name), "black", _font())
            draw.text((GAP, LINE), f"{found.classes[images.class_names[class_id]]:,} images", "dimgray", _font())
        for column, pixels in enumerate(rows):
            picture.paste(cell.show(pixels), (label + column * (cell.width + GAP), 0))
        strips.append(picture)
    if len(found.classes) > SHOWN_CLASSES:
        strips.append(_text(f"... and {len(found.classes) - SHOWN_CLASSES:,} more classes"))
    strips += _crops(images, found)
    notes = [f"the picture's font has not all letters of: {', '.join(numbered)}"] if numbered else []
    return _stacked(strips), notes


class Cell:
    """How images of a height and width are shown: small ones enlarged by a whole number, large ones shrunk."""

    def __init__(self, height: int, width: int, largest: int = LARGE):
        long = max(height, width)
        enlarged = max(1, SMALL // long)
        self.width, self.height, self.said = width * enlarged, height * enlarged, ""
        if enlarged > 1:
            self.said = f", shown {enlarged} times as large"
        if long > largest:
            self.width, self.height = max(1, width * largest // long), max(1, height * largest // long)
            self.said = f", shown as {self.width}x{self.height}"

    def show(self, pixels: np.ndarray) -> Image.Image:
        """An image uint8 (C, H, W) at the size that is shown."""
        shrunk = pixels.shape[2] > self.width
        how = Image.Resampling.LANCZOS if shrunk else Image.Resampling.NEAREST
        return _picture(pixels).resize((self.width, self.height), how)


def _rows(images: ImageSet, columns: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Class ids, each with some images of the class; rows of any images, with -1, if there are no classes."""
    if images.class_names:
        for class_id in range(min(SHOWN_CLASSES, len(images.class_names))):
            yield class_id, _loaded(images, np.flatnonzero(images.class_ids == class_id), columns)
        return
    some = _loaded(images, np.arange(len(images)), columns * ROWS_WITHOUT_CLASSES)
    for start in range(0, len(some), columns):
        yield -1, some[start : start + columns]


def _loaded(images: ImageSet, rows: np.ndarray, count: int) -> list[np.ndarray]:
    """Up to `count` of the images that load, from all parts of the rows."""
    spread = rows[np.unique(np.linspace(0, len(rows) - 1, count, dtype=int))] if len(rows) else rows
    return [pixels for i in spread if (pixels := images.read(i)) is not None]


def _crops(images: ImageSet, found: Description) -> list[Image.Image]:
    """The originals that lose most in the crop, the kept part framed, each beside what the model sees of it."""
    if images.data.resize != "crop":
        return []
    height, width = found.size
    cell = Cell(height, width, CROP_SIDE)
    sizes = original_sizes(images)
    ratios = sizes[:, 1] / sizes[:, 2] * (height / width)  # above 1: the left and right ends are cut off
    losses = 1 - np.minimum(ratios, 1 / ratios)
    order = [n for n in np.argsort(-losses, kind="stable")[:CROPS] if losses[n] >= LEAST_LOSS]
    pairs = []
    for n in order:
        with contextlib.suppress(DECODE_ERRORS):
            pairs.append(_crop(images, *sizes[n].tolist(), loss=losses[n], cell=cell, ratio=width / height))
    if not pairs:
        return []
    per_row = max(1, WIDTH // (pairs[0].width + GAP))
    rows = [_side_by_side(pairs[start : start + per_row]) for start in range(0, len(pairs), per_row)]
    return [_text("The largest losses to the crop: the original, its kept part framed, and what the model sees"), *rows]


def _crop(images: ImageSet, i: int, width: int, height: int, *, loss: float, cell: Cell, ratio: float) -> Image.Image:
    """One original of width x height and the model's image of it; `ratio` is the kept part's width by its height."""
    scale = min(1.0, CROP_SIDE / max(width, height))
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (CROP_SIDE - shown[0]) // 2, (CROP_SIDE - shown[1]) // 2  # `uncut` puts it in the middle
    original = _picture(images.uncut(i, CROP_SIDE)).crop((left, top, left + shown[0], top + shown[1]))
    kept = min(shown[0], shown[1] * ratio), min(shown[1], shown[0] / ratio)
    box = [round((shown[k] - kept[k]) / 2) for k in (0, 1)]
    box += [min(shown[k] - 1, box[k] + round(kept[k]) - 1) for k in (0, 1)]
    dimmed = Image.blend(original, Image.new("RGB", original.size, SHEET), 0.6)
    inner = (box[0], box[1], box[2] + 1, box[3] + 1)
    dimmed.paste(original.crop(inner), inner[:2])
    ImageDraw.Draw(dimmed).rectangle(tuple(box), outline="red", width=2)

    pixels = images.read(i)
    assert pixels is not None, "it has just been decoded"
    y = max(shown[1], cell.height)
    picture = Image.new("RGB", (CROP_SIDE + cell.width + 3 * GAP, y + LINE + GAP), SHEET)
    picture.paste(dimmed, (0, 0))
    picture.paste(cell.show(pixels), (shown[0] + GAP, 0))
    ImageDraw.Draw(picture).text((0, y + 2), f"{width}x{height}, {100 * loss:.0f} % lost", "dimgray", _font())
    return picture


def _picture(pixels: np.ndarray) -> Image.Image:
    """An image uint8 (C, H, W) in RGB."""
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").squeeze()).convert("RGB")


def _text(text: str) -> Image.Image:
    picture = Image.new("RGB", (round(_font().getlength(text)) + 2 * GAP, LINE + GAP), SHEET)
    ImageDraw.Draw(picture).text((GAP, 2), text, "black", _font())
    return picture


def _stacked(strips: Iterable[Image.Image]) -> Image.Image:
    strips = list(strips)
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), SHEET)
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(p.width + GAP for p in pictures), max(p.height for p in pictures)), SHEET)
    x = GAP
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + GAP
    return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)


def _has_letters(text: str) -> bool:
    """Whether the font, which knows European alphabets, has every character."""
    font = _font()
    missing = bytes(font.getmask(NO_GLYPH))
    return all(bytes(font.getmask(character)) != missing for character in text)


def _shortened(text: str) -> str:
    """The text, cut so that it fits into the column of class names."""
    font, whole = _font(), text
    while font.getlength(text if text == whole else f"{text}...") > LABEL - 2 * GAP:
        text = text[:-1]
    return text if text == whole else f"{text}..."
