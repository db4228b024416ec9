"""Files and folders that are either complete or absent, and their checksums."""

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"  # a file in the format of sha256sum, which can check it


class HashedFile(io.BufferedWriter):
    """A new file that knows the SHA-256 of what was written to it."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "wb"))
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return super().write(data)

    def sha256(self) -> str:
        """The checksum of all that was written so far."""
        return self._digest.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields a new folder to write to, and puts it in place of `folder` once everything in it is on the disk."""
    with begun(folder) as new:
        yield new
        put_in_place(folder)


@contextmanager
def begun(folder: Path) -> Iterator[Path]:
    """Yields a new folder to write to, which `put_in_place` puts in place of `folder`; removes it if that fails."""
    new = beside(folder)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # the partial folder may have filled the disk
        raise


def put_in_place(folder: Path) -> None:
    """Puts the folder that was `begun` in place of `folder`, once all of it is on the disk, or changes nothing."""
    new, before = beside(folder), old(folder)
    for path in [*new.rglob("*"), new]:
        _to_disk(path)
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)  # the old folder stays until the new one is in place
    try:
        new.rename(folder)
    except BaseException:
        if before.exists():
            before.rename(folder)
        raise
    _to_disk(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def old(folder: Path) -> Path:
    """Where `put_in_place` keeps the former folder for a moment."""
    return folder.with_name(folder.name + ".old")


def beside(folder: Path) -> Path:
    """Where a folder is written before it is put in place."""
    return folder.with_name(folder.name + ".tmp")


def _to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
