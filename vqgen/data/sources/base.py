"""The interface of a source of images, and functions for several kinds of source."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from vqgen.data.pixels import checked_size
from vqgen.data.skipped import reason
from vqgen.errors import InputError

CONTAINER_ERRORS = (OSError, EOFError, ValueError, struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError)


class Source(Protocol):
    """Images that can be opened one by one, from several threads and processes at a time.

    Attributes:
        names: stable names: a path relative to the folder, the row of an array, or `shard.tar/key`.
        class_ids: (N,) int64, -1 for an image without a class.
        class_names: the classes in the order of their ids; empty if there are none.
        files: the files that hold the images, for the fingerprint.
    """

    class_ids: np.ndarray
    class_names: list[str]

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def files(self) -> Sequence[str | Path]: ...

    def num_bytes(self, row: int) -> int:
        """Size of a stored image.

        Raises:
            OSError: the image is not there, or is too large.
        """

    def open(self, row: int) -> Image.Image:
        """An image, not decoded yet.

        Raises:
            Exception: the image does not load; Pillow may raise any kind.
        """


@dataclass(frozen=True)
class Found:
    """What a source was found to hold, with all that a user must be told about how it was read.

    Attributes:
        train: the part to train on, or all images.
        held_out: the source's own held-out part; None if it has none.
        split: where the held-out part comes from, such as `val/`; empty if there is none.
        left_out: number of files that are not used, by extension (`.heic`) or reason (`beside the classes`).
        notes: what was assumed, or found and not used; one line each, which begins with the thing's name.
    """

    train: Source
    held_out: Source | None = None
    split: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


class NoImages(InputError):
    """The source has no images; `open_source` adds the kinds of source to the message."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an error that a damaged file causes into an InputError that names the file."""
    try:
        yield
    except InputError:  # is a ValueError, and says what is wrong
        raise
    except CONTAINER_ERRORS as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); repair it or fetch it again") from error


def file_size(path: str) -> int:
    """The size of an image's file.

    Raises:
        OSError: it is not there, is too large, or is no plain file.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for a writer
        raise OSError("a pipe, a socket or a device")
    return checked_size(info.st_size)
