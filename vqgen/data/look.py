"""A look at some images of a stream before the first step: the classes, and which images are held out."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from vqgen.data.formats import EXTENSIONS
from vqgen.data.pixels import open_image
from vqgen.data.skipped import reason
from vqgen.data.sources.base import NoImages
from vqgen.data.sources.index import hashes_of, user_cache_folder
from vqgen.data.sources.labels import Labels
from vqgen.data.sources.shards import Damaged, Sample, Shard, Shards, open_shards
from vqgen.data.sources.sides import read_side_files
from vqgen.data.sources.tree import SIDES, class_ids_of
from vqgen.distributed import computed_by_main
from vqgen.errors import InputError
from vqgen.settings import DataConfig

VERSION = 1  # of what is kept of a look; raise it whenever images are read in another way
LOOKED_AT, LOOKED_INTO = 20_000, 64  # images that are looked at before the first step, and the shards they come from
HELD_OUT, SAMPLED = 1000, 2000  # images of those, at most, that are held out, and that stand for the training images
HEADS, HEAD_BYTES = 16, 1 << 16  # shards whose first bytes are part of the fingerprint


@dataclass
class Look:
    """What a look at a stream has found. It is a source of the images that it kept: those held out, then others.

    Attributes:
        shards: the stream's shards.
        fingerprint: hex digest of the shards' names, sizes and sampled bytes, and of the classes.
        folder: the folder, in the user's cache folder, of what is kept.
        names, class_ids, class_names: of the images that are kept, as in `Source`.
        side: the extension of the files that hold the labels, and the key in those files if it is .json.
        held_out: the number of images that are held out; the others stand for the training images.
        looked_at: the number of images that were looked at.
    """

    shards: Sequence[Shard]
    fingerprint: str
    folder: Path
    names: list[str]
    extensions: list[str]
    ends: np.ndarray  # in the file of all images
    class_ids: np.ndarray
    class_names: list[str]
    ids: Mapping[str, int]  # by label
    side: tuple[str, str | None]
    held_out: int
    looked_at: int
    notes: list[str]

    @property
    def files(self) -> list[Path]:
        return [self.folder / "images"]

    def num_bytes(self, row: int) -> int:
        return int(self.ends[row] - (self.ends[row - 1] if row else 0))

    def open(self, row: int) -> Image.Image:
        with (self.folder / "images").open("rb") as file:
            file.seek(int(self.ends[row]) - self.num_bytes(row))
            return open_image(file.read(self.num_bytes(row)), self.extensions[row])


def look_at(data: DataConfig) -> Look:
    """Looks at some images of each of up to 64 shards, and keeps some; the next time it finds them in the cache.

    All processes must call it at the same point; one process of each machine looks.

    Raises:
        InputError: the source is of another kind, or has no images.
    """

    def identify() -> tuple[Shards, str]:
        found = open_shards(data)
        chosen = [found.shards[i] for i in _spread(len(found.shards), HEADS)]
        heads = [hashlib.sha256(shard.head(HEAD_BYTES)).hexdigest() for shard in chosen]
        facts = [[(shard.name, shard.size) for shard in found.shards], heads, found.names_of_numbers]
        return found, hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    (shards, names_of_numbers, notes), fingerprint = computed_by_main(identify)
    held_out = None if data.val_source is not None else data.val_fraction
    key = hashlib.sha256(json.dumps([VERSION, fingerprint, held_out, data.label_key]).encode()).hexdigest()[:32]
    folder = user_cache_folder() / "streams" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / "kept.json").is_file():
                _keep_some(shards, data, folder)
        kept = json.loads((folder / "kept.json").read_text("utf-8"))
    except OSError as error:
        remedy = "make room, or name another cache folder in the environment's XDG_CACHE_HOME"
        raise InputError(f"{folder} cannot be written ({reason(error)}); {remedy}") from error
    class_names, ids = _classes(kept["labels"], names_of_numbers)
    return Look(
        shards,
        hashlib.sha256(json.dumps([fingerprint, class_names]).encode()).hexdigest(),
        folder,
        kept["names"],
        kept["extensions"],
        np.cumsum(kept["sizes"]),
        np.array([ids.get(label, -1) for label in kept["label_of"]], np.int64),
        class_names,
        ids,
        tuple(kept["side"]),
        kept["held_out"],
        kept["looked_at"],
        kept["notes"] if notes is None else notes,
    )


def _keep_some(shards: Sequence[Shard], data: DataConfig, folder: Path) -> None:
    """Looks at some images, and writes some of them to `images` in a folder, and what is known to `kept.json`.

    Those with the lowest hashes are held out, the same as where images are read at random.
    """
    chosen = [shards[i] for i in _spread(len(shards), LOOKED_INTO)]
    sides: dict[str, Mapping[str, bytes]] = {}  # of all images that were looked at
    damaged: Damaged | None = None
    with tqdm(desc="looking", unit=" images", leave=False, disable=None) as bar:

        def looked_at() -> Iterator[Sample]:
            nonlocal damaged
            for shard in chosen:
                try:
                    samples = shard.samples(lambda name: True)
                    for name, sample in itertools.islice(samples, math.ceil(LOOKED_AT / len(chosen))):
                        assert sample is not None
                        sides[name] = sample.sides
                        bar.update()
                        yield sample
                except Damaged as error:  # training skips it, or raises the error
                    damaged = error

        kept = heapq.nsmallest(HELD_OUT + SAMPLED, looked_at(), key=lambda sample: hash_of(sample.name))
    if not kept and damaged is not None:
        raise damaged
    if len(kept) < 2:
        message = "is only one image, so none can be held out" if kept else f"no image in {chosen[0].name}"
        raise NoImages(f"{message} (looked for {' '.join(EXTENSIONS)})")
    labels = _labels_of(sides, data.label_key)
    held_out = sum(hash_of(sample.name) < data.val_fraction for sample in kept)
    held_out = min(max(1, held_out), HELD_OUT, len(kept) - 1) if data.val_source is None else 0
    kept = kept[: held_out + SAMPLED]
    (folder / "images").write_bytes(b"".join(sample.content for sample in kept))
    rows = {name: row for row, name in enumerate(sides)}
    facts = {
        "names": [sample.name for sample in kept],
        "extensions": [sample.extension for sample in kept],
        "sizes": [len(sample.content) for sample in kept],
        "label_of": [labels.by_row.get(rows[sample.name]) for sample in kept],
        "labels": sorted(set(labels.by_row.values())),
        "side": labels.side,
        "notes": labels.notes,
        "held_out": held_out,
        "looked_at": len(sides),
    }
    (folder / "kept.tmp").write_text(json.dumps(facts), "utf-8")
    (folder / "kept.tmp").rename(folder / "kept.json")


def _labels_of(sides: Mapping[str, Mapping[str, bytes]], key: str | None) -> Labels:
    """The labels of images by their number, decided as where images are read at random."""
    names = list(sides)
    paths = {
        side: found
        for side in SIDES
        if (found := {name: f"{name}{side}" for name, contents in sides.items() if side in contents})
    }
    contents = {f"{name}{side}": content for name, found in sides.items() for side, content in found.items()}
    return read_side_files(names, names, paths, contents.__getitem__, key=key) if paths or key else Labels()


def hash_of(name: str) -> float:
    """The number from 0 to 1 that decides whether an image is held out."""
    return int(hashes_of([name])[0]) / 2.0**64


def _classes(labels: Sequence[str], names_of_numbers: Mapping[str, str]) -> tuple[list[str], dict[str, int]]:
    """The classes' names, and the class id of each label; of all the list's classes if there is a list."""
    if labels and set(labels) <= set(names_of_numbers.values()):
        class_names = list(names_of_numbers.values())
        return class_names, {name: i for i, name in enumerate(class_names)}
    known = names_of_numbers if labels and set(labels) <= names_of_numbers.keys() else labels
    class_ids, class_names = class_ids_of(list(known), names_of_numbers)
    return class_names, dict(zip(known, class_ids.tolist(), strict=True))


def _spread(available: int, wanted: int) -> list[int]:
    """Some of 0, 1, ..., evenly spaced."""
    return np.unique(np.linspace(0, available - 1, min(available, wanted), dtype=int)).tolist()
