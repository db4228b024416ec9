"""The index of a source: names, places and classes of its images as arrays, kept on disk if it is large.

One process makes the index. All processes and their workers map the same file, so a million names take no memory of
their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np

from vqgen.distributed import all_agree, computed_by_main

VERSION = 3  # of the files; raise it whenever images are read in another way
KEPT_FROM = 10_000  # images; a smaller index is made anew each time
DAMAGES = (OSError, EOFError, ValueError, KeyError, TypeError)
ENCODING = ("utf-8", "surrogateescape")  # file names may hold any bytes


def user_cache_folder() -> Path:
    """The folder `vqgen` in the user's cache folder; it need not exist.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqgen"


class Names(Sequence[str]):
    """Many names in one array of bytes, which can be mapped from a file.

    Args:
        text: uint8, all names one after another, in UTF-8.
        ends: (N,) int64, the end of each name in `text`.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        encoded = [name.encode(*ENCODING) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[str]: ...

    def __getitem__(self, row: int | slice) -> str | Sequence[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(row)
        start = int(self.ends[row - 1]) if row else 0
        return self.text[start : int(self.ends[row])].tobytes().decode(*ENCODING)

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode(*ENCODING)
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


class Index:
    """Where the images of a source are, and their classes.

    A pickled index that was mapped from a file is mapped again where it is loaded.

    Args:
        names: the images' names.
        places: (N, k) int64, where each image is; the kind of source knows the meaning.
        class_ids: (N,) int64, -1 for an image without a class.
        hashes: (N,) uint64, of the names; they decide which images are held out.
    """

    def __init__(self, names: Names, places: np.ndarray, class_ids: np.ndarray, hashes: np.ndarray):
        self.names, self.places, self.class_ids, self.hashes = names, places, class_ids, hashes
        self._file: Path | None = None

    @classmethod
    def of(cls, names: Sequence[str], places: np.ndarray, class_ids: np.ndarray) -> Index:
        return cls(Names.of(names), places, class_ids, hashes_of(names))

    def save(self, folder: Path) -> None:
        """Writes the arrays into a folder, which it makes."""
        folder.mkdir(parents=True)
        for name, array in self.arrays().items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Maps the arrays of a folder.

        Raises:
            OSError, ValueError: a file is missing or damaged.
        """
        text, ends, places, class_ids, hashes = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("text", "ends", "places", "class_ids", "hashes")
        )
        if not len(ends) == len(places) == len(class_ids) == len(hashes) or (len(ends) and ends[-1] != len(text)):
            raise ValueError("arrays of different lengths")
        index = cls(Names(text, ends), places, class_ids, hashes)
        index._file = folder
        return index

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, as `save` writes them."""
        names = {"text": self.names.text, "ends": self.names.ends}
        return names | {"places": self.places, "class_ids": self.class_ids, "hashes": self.hashes}

    def __reduce__(self) -> tuple[Any, ...]:
        if self._file is not None:
            return Index.load, (self._file,)
        return Index, (self.names, self.places, self.class_ids, self.hashes)


def hashes_of(names: Sequence[str]) -> np.ndarray:
    """(N,) uint64: the first eight bytes of each name's SHA-256."""
    digests = b"".join(hashlib.sha256(name.encode(*ENCODING)).digest()[:8] for name in names)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


Made: TypeAlias = "tuple[list[Index], dict[str, Any]]"


class Kept(NamedTuple):
    """Where the main process keeps indices, and what tells them from others in the same place."""

    folder: Path
    checksum: str


def kept_index(
    key: Sequence[str], is_current: Callable[[Any], bool], make: Callable[[], tuple[list[Index], dict[str, Any], Any]]
) -> Made:
    """The indices of a source with facts about it, made by the main process and kept on disk if they are large.

    All processes must call it at the same point.

    Args:
        key: what the index is of, such as the kind of source and its path.
        is_current: whether the source is still in a state, so that what was kept is valid.
        make: makes the indices; facts, as JSON has them; and the source's state, as JSON has it. The state is None if
            nothing would tell that the source changes; then nothing is kept.
    """

    def made() -> Kept | Made:
        folder = _folder(key)
        if folder is not None and _is_valid(folder, is_current):
            return Kept(folder, _content(folder)["checksum"])
        indices, facts, state = make()
        large = sum(len(index.names) for index in indices) >= KEPT_FROM
        if large and folder is not None and state is not None and _write(folder, indices, facts, state):
            return Kept(folder, _content(folder)["checksum"])
        return indices, facts

    result = computed_by_main(made)
    if not isinstance(result, Kept):
        return result
    loaded = None
    with contextlib.suppress(*DAMAGES):
        if _content(result.folder)["checksum"] == result.checksum:  # another machine may keep an older index there
            loaded = _load(result.folder)
    if not all_agree(loaded is not None):  # the machines share no cache folder, so the main process sends the arrays
        return computed_by_main(lambda: _in_memory(*loaded) if loaded is not None else make()[:2])
    assert loaded is not None
    return loaded


def _in_memory(indices: list[Index], facts: dict[str, Any]) -> Made:
    copies = []
    for index in indices:
        arrays = {name: np.array(array) for name, array in index.arrays().items()}
        names = Names(arrays["text"], arrays["ends"])
        copies.append(Index(names, arrays["places"], arrays["class_ids"], arrays["hashes"]))
    return copies, facts


def _folder(key: Sequence[str]) -> Path | None:
    digest = hashlib.sha256("\0".join([str(VERSION), *key]).encode(*ENCODING)).hexdigest()[:32]
    with contextlib.suppress(RuntimeError):
        return user_cache_folder() / "index" / digest
    return None


def _is_valid(folder: Path, is_current: Callable[[Any], bool]) -> bool:
    """Whether a folder holds an undamaged index of a source that has not changed since."""
    with contextlib.suppress(*DAMAGES):
        content = _content(folder)
        return is_current(content["state"]) and content["checksum"] == _checksum(_load(folder)[0])
    return False


def _checksum(indices: list[Index]) -> str:
    digest = hashlib.sha256()
    for index in indices:
        for array in index.arrays().values():
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _load(folder: Path) -> Made:
    content = _content(folder)
    return [Index.load(folder / str(number)) for number in range(content["count"])], content["facts"]


def _content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_bytes())


def _write(folder: Path, indices: list[Index], facts: dict[str, Any], state: Any) -> bool:
    """Keeps indices; returns whether that was possible. A reader sees either the old folder or the new one."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for number, index in enumerate(indices):
            index.save(beside / str(number))
        checksum = _checksum(indices)
        content = {"state": state, "checksum": checksum, "count": len(indices), "facts": facts}
        (beside / "facts.json").write_text(json.dumps(content))
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except OSError:  # a full disk, or a folder that cannot be written: the next run makes the index again
        shutil.rmtree(beside, ignore_errors=True)
        return False
    return True
