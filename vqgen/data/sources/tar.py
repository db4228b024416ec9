"""Uncompressed tar shards in WebDataset's layout: `KEY.jpg` with its class id in `KEY.cls`."""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vqgen.data.pixels import checked_size, open_image
from vqgen.data.skipped import one_line
from vqgen.data.sources.base import EXTENSIONS, MAX_CLASSES, Found, NoImages, numbers_as_names, reading
from vqgen.distributed import computed_by_main
from vqgen.errors import InputError
from vqgen.settings import DataConfig


def open_tar(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a .tar file, or of all files that a pattern stands for.

    Raises:
        InputError: a shard is missing, damaged or compressed, or none has an image.
    """
    if path.suffix != ".tar" and (path.exists() or not re.search(r"[{*?\[]", source)):
        return None
    return Found(computed_by_main(lambda: TarSource(find_shards(path))))


class TarSource:
    """The images of tar files, found in one pass over the headers and then read in place.

    Args:
        shards: the files; a `classes.json` beside the first lists the names of the classes.

    Raises:
        InputError: a file cannot be read, or none has an image.
    """

    def __init__(self, shards: list[Path]):
        self.files = shards
        samples = [(number, *sample) for number, shard in enumerate(shards) for sample in _index_shard(shard)]
        if not samples:
            raise NoImages(f"no image in {shards[0].name} (looked for {' '.join(EXTENSIONS)})")
        self.names = [f"{shards[number].name}/{key}" for number, key, *_ in samples]
        self.places = np.array([(number, offset, size) for number, _, offset, size, _ in samples], np.int64)  # (N, 3)
        self.class_ids = np.array([class_id for *_, class_id in samples], np.int64)
        self.class_names = numbers_as_names(self.class_ids)
        path = shards[0].parent / "classes.json"
        if self.class_names and path.is_file():
            with reading(path):
                names = json.loads(path.read_text("utf-8"))
            if not isinstance(names, list) or len(names) < len(self.class_names):
                raise InputError(f"{path} is not a list of all {len(self.class_names)} class names; make it one")
            self.class_names = [str(name) for name in names]

    def num_bytes(self, row: int) -> int:
        return checked_size(int(self.places[row, 2]))

    def open(self, row: int) -> Image.Image:
        number, offset, size = self.places[row]
        with self.files[number].open("rb") as file:  # one file object for all threads would have only one position
            file.seek(offset)
            return open_image(file.read(size))


def find_shards(pattern: Path) -> list[Path]:
    """The files that a pattern with {00000..00009}, {a,b}, * and ? stands for, in its order.

    Raises:
        InputError: there is no file for a part of the pattern.
    """
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
    """Key, offset, size and class id of each sample: the members with the same path up to the name's first dot."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with reading(shard), tarfile.open(shard, "r:") as tar:
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
