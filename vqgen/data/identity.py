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


def fingerprint_of(names: list[str], class_names: list[str], class_ids: np.ndarray, files: Sequence[str | Path]) -> str:
    """Hex digest of a set's names, classes and content.

    The content is all bytes of the files or, if these are more than 2 GiB, each file's size and time of modification.
    Files that cannot be read are left out.
    """
    digest = hashlib.sha256(json.dumps([names, class_names, class_ids.tolist()]).encode())
    found = []
    for path in files:
        with contextlib.suppress(OSError):  # a dead link is a broken image
            found.append((path, os.stat(path)))
    regular = [(path, info) for path, info in found if stat.S_ISREG(info.st_mode)]  # opening a pipe would wait
    by_bytes = sum(info.st_size for _, info in regular) <= HASHED_BYTES
    for path, info in regular:
        digest.update(f"{info.st_size} {0 if by_bytes else info.st_mtime_ns}\n".encode())
        if by_bytes:
            with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                left = info.st_size  # some of the system's files have size 0 and no end
                while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                    digest.update(chunk)
                    left -= len(chunk)
    return digest.hexdigest()
