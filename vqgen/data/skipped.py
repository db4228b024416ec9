"""The list of skipped images, those that do not load; all processes of a run share it."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import UnidentifiedImageError

try:
    import fcntl
except ImportError:  # Windows: two processes that skip an image at the same time may both list it
    fcntl = None  # type: ignore[assignment]

# These are errors of the machine at the moment; they do not mean that the file is broken.
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}


def one_line(text: str) -> str:
    """Turns a file's name into one line that can be written to any file and terminal.

    Line breaks, control characters, undecodable bytes and backslashes become Python's escapes, from which the name can
    be restored.
    """
    unsafe = r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unsafe, lambda match: match[0].encode("unicode_escape").decode(), text)


def reason(error: BaseException) -> str:
    """Why a file does not load, in a few words on one line."""
    if isinstance(error, UnidentifiedImageError):  # the error's own message is only the address of a buffer
        return "empty, or no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0][:200])


def count_skipped(path: Path) -> int:
    """The number of images in a `skipped.txt`; 0 if there is no such file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_skipped(path: Path) -> dict[str, str]:
    """Names and reasons in a `skipped.txt`; empty if there is no such file."""
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines)}


class SkippedFile:
    """A file with a line `name<TAB>reason` for each skipped image.

    Any number of processes and threads may add to it; each name occurs once. The file exists only if it has a line.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: set[str] = set()
        self._seen = 0  # bytes of the file whose lines are in _known

    def add(self, reasons: Mapping[str, str]) -> None:
        """Adds the names that are not in the file yet, with their reasons; each name and reason is one line.

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
