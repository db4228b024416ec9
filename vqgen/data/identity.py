"""The fingerprint of a set of images, which depends on their names, their classes and their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HASHED_BYTES = 2 << 30  # reading more would delay the start of a run
SAMPLES, SAMPLE_BYTES = 512, 1 << 16


def fingerprint_of(
    names: Sequence[str], class_names: list[str], class_ids: np.ndarray, files: Sequence[str | Path]
) -> str:
    """Hex digest of a set's names, classes and content; neither its path nor any time counts.

    The content is all bytes of the files. If these are more than 2 GiB, it is each file's size and a sample of the
    bytes: the places are drawn with a fixed seed, each byte with the same probability. Files that cannot be read are
    left out.
    """
    digest = hashlib.sha256(json.dumps([list(names), class_names, class_ids.tolist()]).encode())
    found = []
    for path in files:
        with contextlib.suppress(OSError):  # a dead link is a broken image
            info = os.stat(path)
            if stat.S_ISREG(info.st_mode):  # opening a pipe would wait
                found.append((path, info.st_size))
    sizes = np.array([size for _, size in found], np.int64)
    if sizes.sum() <= HASHED_BYTES:
        for path, size in found:
            digest.update(f"{size} 0\n".encode())
            _update(digest, path, 0, size)
        return digest.hexdigest()
    digest.update(sizes.tobytes())
    ends = sizes.cumsum()
    for place in np.sort(np.random.default_rng(0).integers(0, ends[-1], SAMPLES)).tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        path, size = found[number]
        offset = place - (int(ends[number]) - size)
        _update(digest, path, max(0, min(offset, size - SAMPLE_BYTES)), SAMPLE_BYTES)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, path: str | Path, offset: int, count: int) -> None:
    """Adds some bytes of a file to the digest; fewer if the file ends before."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        # Some of the system's files have size 0 and no end.
        while count > 0 and (chunk := file.read(min(count, 1 << 20))):
            digest.update(chunk)
            count -= len(chunk)
