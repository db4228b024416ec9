"""The list of images that were skipped, which the processes of a run share."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two processes that meet the same image at the same time may both name it
    fcntl = None  # type: ignore[assignment]


def one_line(text: str) -> str:
    """A file's name as one line that any file and terminal takes.

    Line breaks, control characters, bytes that are no text, and backslashes are written as Python's escapes, so that
    the name can be had back.
    """
    unsafe = r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unsafe, lambda match: match[0].encode("unicode_escape").decode(), text)


def count_skipped(path: Path) -> int:
    """How many images a `skipped.txt` names; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_skipped(path: Path) -> dict[str, str]:
    """Names and reasons in a `skipped.txt`; none if it is not there."""
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines)}


class SkippedFile:
    """A file with a line `name<TAB>reason` for each image that was skipped.

    Any number of processes and threads add to it; each name is in it once. It is there only if a line is.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: set[str] = set()
        self._seen = 0  # bytes: up to here the lines in the file are known

    def add(self, reasons: Mapping[str, str]) -> None:
        """Writes the names, each of one line, that are not in the file yet, with their reasons.

        Raises:
            OSError: the file cannot be read or written.
        """
        if reasons.keys() <= self._known:
            return
        with self.path.open("a+b") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            file.seek(self._seen)
            self._known |= {line.partition(b"\t")[0].decode(errors="replace") for line in file}
            new = [f"{name}\t{reason}\n" for name, reason in reasons.items() if name not in self._known]
            file.write("".join(new).encode())
            file.flush()
            self._known |= reasons.keys()
            self._seen = file.tell()
