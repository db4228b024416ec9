"""Lists the image files in a folder; keeps the list of a large folder, because a slow disk takes minutes to list it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import Counter
from pathlib import Path

from vqgen.data.skipped import one_line
from vqgen.data.sources.base import EXTENSIONS

logger = logging.getLogger("vqgen")

MAX_VISITS = 16  # listings of one folder; links can lead to it along more paths than anyone could list
KEPT_FROM = 10_000  # images; a shorter list is not worth keeping
SETTLED_NS = 2 * 10**9  # two changes within this time may leave the same time of modification


def user_cache_folder() -> Path:
    """The folder `vqgen` in the user's cache folder; it need not exist.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqgen"


def list_images(root: Path) -> list[str]:
    """The paths of all image files below a folder, relative to it, sorted; hidden ones are left out.

    Links are followed, but no folder is entered below itself. A folder that cannot be listed is left out with a
    warning. The list of a large folder is kept in the user's cache folder, and used as long as no folder in it changes.

    Raises:
        OSError: the root cannot be listed.
    """
    kept = _read_listing(root)
    if kept is not None:
        return kept
    started = time.time_ns()
    names: list[str] = []
    signatures: dict[str, list[int]] = {}  # each folder's signature from just before it was listed
    lasting = True  # whether any change would show in the signatures
    visits: Counter[tuple[int, ...]] = Counter()
    to_list: list[tuple[str, frozenset[tuple[int, ...]]]] = [("", frozenset())]  # a folder, and the folders above it
    while to_list:
        parent, above = to_list.pop()
        path = os.path.join(root, parent)
        try:
            signatures[parent] = _signature(path)
            identity = tuple(signatures[parent][:2])
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
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
                dead = not is_folder and entry.is_symlink() and not entry.is_file()
            except OSError:  # links in a circle
                is_folder, dead = False, True
            if is_folder:
                folders.append(f"{parent}{entry.name}/")
            elif entry.name.lower().endswith(EXTENSIONS):
                names.append(parent + entry.name)
            lasting = lasting and not dead  # a folder may appear later at the link's target
        to_list += [(folder, above | {identity}) for folder in sorted(folders, reverse=True)]
    names.sort()
    newest = max(mtime for *_, mtime in signatures.values())
    if lasting and len(names) >= KEPT_FROM and newest < started - SETTLED_NS:
        _write_listing(root, names, signatures)
    return names


def _signature(path: str) -> list[int]:
    """A folder's identity, and the time when a name in it was last added or removed."""
    stat = os.stat(path)
    return [stat.st_dev, stat.st_ino, stat.st_mtime_ns]


def _listing_file(root: Path) -> Path:
    key = "\0".join([os.path.realpath(root), *EXTENSIONS])
    return user_cache_folder() / "listings" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json"


def _read_listing(root: Path) -> list[str] | None:
    """The kept list of a folder; None if there is none, a folder has changed since, or the file is damaged."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        checksum, _, content = _listing_file(root).read_bytes().partition(b"\n")
        if checksum.decode() == hashlib.sha256(content).hexdigest():
            kept = json.loads(content)
            if all(_signature(os.path.join(root, name)) == known for name, known in kept["folders"].items()):
                return kept["names"]
    return None


def _write_listing(root: Path, names: list[str], signatures: dict[str, list[int]]) -> None:
    content = json.dumps({"folders": signatures, "names": names}).encode()
    with contextlib.suppress(OSError, RuntimeError):  # the next run then lists the folder again
        path = _listing_file(root)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        beside.rename(path)
