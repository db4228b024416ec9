"""Lists the files in a folder and below it."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from typing import NamedTuple

from vqgen.data.skipped import one_line

logger = logging.getLogger("vqgen")

MAX_VISITS = 16  # listings of one folder; links can lead to it along more paths than anyone could list
SETTLED_NS = 2 * 10**9  # two changes within this time may leave the same time of modification
# What programs leave beside people's files; names with a dot in front are left out as well.
LEAVINGS = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"}


class Files(NamedTuple):
    """The files below a folder.

    Attributes:
        names: paths relative to the folder, sorted.
        folders: each folder's signature from just before it was listed; see `signature`.
        hidden: number of files and folders that are hidden.
        lasting: whether any change of the names would show in the signatures.
    """

    names: list[str]
    folders: dict[str, list[int]]
    hidden: int
    lasting: bool


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's name says that people do not mean it."""
    return name.startswith(".") or name in LEAVINGS


def list_files(root: str | os.PathLike[str]) -> Files:
    """All files below a folder; hidden ones are left out.

    Links are followed, but no folder is entered below itself. A folder that cannot be listed is left out with a
    warning.

    Raises:
        OSError: the root cannot be listed.
    """
    started = time.time_ns()
    names: list[str] = []
    folders: dict[str, list[int]] = {}
    hidden, lasting = 0, True
    visits: Counter[tuple[int, ...]] = Counter()
    to_list: list[tuple[str, frozenset[tuple[int, ...]]]] = [("", frozenset())]  # a folder, and the folders above it
    while to_list:
        parent, above = to_list.pop()
        path = os.path.join(root, parent)
        try:
            folders[parent] = signature(path)
            identity = tuple(folders[parent][:2])
            visits[identity] += 1
            if identity in above or visits[identity] > MAX_VISITS:
                if visits[identity] == MAX_VISITS + 1:
                    logger.warning(f"{one_line(path)} is linked to more than {MAX_VISITS} times; left out from here on")
                continue
            with os.scandir(path) as found:
                entries = list(found)
        except OSError as error:
            if not parent:
                raise
            logger.warning(f"skipping a folder that cannot be listed: {one_line(parent)} ({error.strerror})")
            lasting = False
            continue
        below = []
        for entry in entries:
            if is_hidden(entry.name):
                hidden += 1
                continue
            try:
                is_folder = entry.is_dir()
                dead = not is_folder and entry.is_symlink() and not entry.is_file()
            except OSError:  # links in a circle
                is_folder, dead = False, True
            if is_folder:
                below.append(f"{parent}{entry.name}/")
            else:
                names.append(parent + entry.name)
            lasting = lasting and not dead  # a folder may appear later at the link's target
        to_list += [(folder, above | {identity}) for folder in sorted(below, reverse=True)]
    names.sort()
    newest = max(mtime for *_, mtime in folders.values())
    return Files(names, folders, hidden, lasting and newest < started - SETTLED_NS)


def signature(path: str) -> list[int]:
    """A folder's identity, and the time when a name in it was last added or removed."""
    stat = os.stat(path)
    return [stat.st_dev, stat.st_ino, stat.st_mtime_ns]
