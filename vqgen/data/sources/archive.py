"""Images in tar shards and zip files, which are read in place."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import logging
import lzma
import os
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vqgen.data.formats import EXTENSIONS
from vqgen.data.pixels import checked_size
from vqgen.data.skipped import one_line, reason
from vqgen.data.sources.base import Found, reading
from vqgen.data.sources.index import user_cache_folder
from vqgen.data.sources.labels import TABLES, is_label_file, some_names
from vqgen.data.sources.listing import is_hidden, list_files
from vqgen.data.sources.splits import HELD_OUT, TRAIN, split_word
from vqgen.data.sources.tree import CLASS_LISTS, Listing, open_tree
from vqgen.distributed import computed_by_main
from vqgen.errors import InputError
from vqgen.settings import DataConfig

logger = logging.getLogger("vqgen")

TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tbz")
ARCHIVES = (*TARS, ".zip")
PACKED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
    b"BZh": bz2.open,
}  # first bytes of a packed tar
# Packing makes images hardly smaller, except for a few flat ones. Whatever unpacks to more than this is a bomb.
MAX_RATIO = 200
MAX_SMALL_BYTES = 1 << 26
FEW_BESIDE_ARCHIVES = 9  # images in a folder that show what its archives hold; more are what the user means
SYNSET = re.compile(r"n\d{8}")  # ImageNet's classes
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip's member; the lengths of its name and its extra field come last
PLAIN, ZIP_STORED, ZIP_DEFLATED = range(3)  # how the bytes of a member are stored
SEPARATOR = "//"  # between an archive's number and a member's path, if there are several archives


def open_archives(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a tar or zip file, of all files that a pattern stands for, or of a folder that holds archives.

    Raises:
        InputError: an archive is missing, damaged or unsafe, or none has an image.
    """
    beside: list[str] = []
    if path.is_dir():
        archives = computed_by_main(lambda: archives_in(path))
        if not archives:
            return None
        beside = computed_by_main(
            lambda: [name for name in list_files(path).names if name.lower().endswith(EXTENSIONS)]
        )
    elif source.lower().endswith(ARCHIVES) or (not path.exists() and re.search(r"[{*?\[]", source)) or _packs(path):
        archives = computed_by_main(lambda: find_shards(path))
        if image := next((one for one in archives if one.suffix.lower() in EXTENSIONS), None):
            raise InputError(f"the pattern stands for images, such as {image.name}; give their folder")
    else:
        return None
    computed_by_main(lambda: [_unpacked(archive) for archive in archives])
    found = open_tree(ArchiveTree(archives), data)
    if not beside:
        return found
    note = f"{some_names(beside)}: {len(beside):,} image{'' if len(beside) == 1 else 's'} beside the archives, not used"
    left_out = {**found.left_out, "beside the archives": len(beside)}
    return replace(found, left_out=left_out, notes=[note, *found.notes])


def archives_in(folder: Path) -> list[Path]:
    """The archives in a folder and below it.

    Raises:
        InputError: the folder cannot be listed.
    """
    with reading(folder):
        return [folder / name for name in list_files(folder).names if name.lower().endswith(ARCHIVES)]


def _packs(path: Path) -> bool:
    """Whether a file is an archive by its content, whatever its name: .whl, .cbz, .crate ..."""
    with reading(path):
        return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


class ArchiveTree:
    """The members of archives; see `Tree`.

    A member's place is (archive, offset, bytes in the archive, bytes unpacked, how it is stored).

    Args:
        archives: tar files, packed or not, and zip files.

    Raises:
        InputError: a file cannot be read or unpacked.
    """

    def __init__(self, archives: Sequence[Path]):
        self.archives = list(archives)
        self._on_disk = [_unpacked(archive) for archive in archives]  # where packed tars were unpacked to
        self._zips = [_is_zip(archive) for archive in archives]
        self.dotted = not any(self._zips)
        words = {archive: found[0] for archive in archives if (found := split_word(_stem(archive))) is not None}
        splits = any(word in TRAIN for word in words.values()) and any(word in HELD_OUT for word in words.values())
        # The archives called train and val become folders of these names, which are then read like any folders.
        self._tops = [f"{words.get(archive, _stem(archive))}/" if splits else "" for archive in archives]

    @property
    def key(self) -> Sequence[str]:
        return ["archives", *(os.path.realpath(archive) for archive in self.archives)]

    def listing(self) -> Listing:
        left_out: Counter[str] = Counter()
        members: list[dict[str, tuple[int, ...]]] = []  # of each archive
        for number, (archive, on_disk) in enumerate(zip(self.archives, self._on_disk, strict=True)):
            with reading(archive):
                found = _list_zip(on_disk) if self._zips[number] else _list_tar(on_disk, left_out)
            safe = ((_safe(archive, name, self._zips[number]), place) for name, place in found.items())
            shown = {path: place for path, place in safe if not any(map(is_hidden, path.split("/")))}
            left_out["hidden"] += len(found) - len(shown)
            members.append(shown)
        notes: list[str] = []
        if self._are_classes(members):
            self._tops = [f"{_stem(archive)}/" for archive in self.archives]
            notes.append(f"{self.archives[0].name} ...: each archive is taken for a class, as all have names")
        if tables := [path.name for path in self._beside() if path.name not in CLASS_LISTS]:
            notes.append(f"{some_names(tables)}: beside the archives, not used; label files are read inside them only")
        paths, places = [], []
        for number, found in enumerate(members):
            before = f"{number}{SEPARATOR}" if len(self.archives) > 1 else ""
            paths += [f"{before}{self._tops[number]}{path}" for path in found]
            places += [(number, *place) for place in found.values()]
        return Listing(paths, np.array(places, np.int64).reshape(-1, 5), +left_out, notes=notes)

    def _are_classes(self, members: Sequence[Iterable[str]]) -> bool:
        """Whether each archive holds the images of one class: their names differ, and no folders are inside."""
        stems = [_stem(archive) for archive in self.archives]
        kinds = {re.sub(r"\d+", "", stem) for stem in stems}
        named = len(kinds) == len(stems) or all(SYNSET.fullmatch(stem) for stem in stems)
        flat = all(
            "/" not in path.removeprefix(f"{stem}/")
            for stem, found in zip(stems, members, strict=True)
            for path in found
        )
        return len(stems) > 1 and named and flat and not any(self._tops)

    def state(self, read: Sequence[str]) -> Any:
        state = []
        for path in (*self.archives, *self._beside()):
            info = os.stat(path)
            state.append([str(path), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns])
        return state

    def is_current(self, state: Any) -> bool:
        try:
            return self.state(()) == state
        except OSError:
            return False

    def _beside(self) -> Sequence[Path]:
        """The lists of classes and the label files beside the archives."""
        found = (path for path in self.archives[0].parent.iterdir() if path.suffix.lower() in TABLES)
        return sorted(path for path in found if path.name in CLASS_LISTS or is_label_file(path.name))

    def beside(self, name: str) -> bytes | None:
        path = self.archives[0].parent / name
        with reading(path):
            return path.read_bytes() if path.is_file() else None

    def inner(self, path: str) -> str:
        return path.partition(SEPARATOR)[2] or path

    def name_of(self, path: str, key: str, place: np.ndarray) -> str:
        number = int(place[0])
        whole = self._zips[number] or path.lower().endswith(".tga")  # only its name tells a TGA
        inner = self.inner(path if whole else key).removeprefix(self._tops[number])
        one_zip = self._zips[number] and len(self.archives) == 1
        return inner if one_zip else f"{self.archives[number].name}/{inner}"

    def files(self, names: Sequence[str]) -> Sequence[str]:
        return [str(path) for path in self._on_disk]

    def num_bytes(self, name: str, place: np.ndarray) -> int:
        return checked_size(int(place[3]))

    def read(self, name: str, place: np.ndarray) -> bytes:
        number, offset, packed, size, stored = map(int, place)
        checked_size(size)
        with self._on_disk[number].open("rb") as file:  # one file object for all threads would have only one position
            file.seek(offset)
            if stored == PLAIN:
                return file.read(size)
            *_, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            content = file.read(packed)
        return content if stored == ZIP_STORED else zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size)


def _is_zip(archive: Path) -> bool:
    name = archive.name.lower()
    return name.endswith(".zip") or (not name.endswith(TARS) and zipfile.is_zipfile(archive))


def find_shards(pattern: Path) -> list[Path]:
    """The files that a pattern with {00000..00009}, {a,b}, * and ? stands for, in its order.

    Raises:
        InputError: there is no file for a part of the pattern.
    """
    shards: list[Path] = []
    for path in [pattern] if pattern.exists() else map(Path, expand_braces(str(pattern))):
        found = [path] if path.exists() else sorted(Path(match) for match in glob.glob(str(path)))
        if not found:
            raise InputError(f"no shard {path}; fetch it, or leave it out of the pattern")
        shards += found
    return shards


def expand_braces(pattern: str) -> Iterator[str]:
    """A pattern with {000..009} or {a,b} as patterns without."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    choices: Iterable[str] = braces[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        numbers = range(int(bounds[1]), int(bounds[2]) + 1)
        choices = (str(number).zfill(len(bounds[1])) for number in numbers)
    start, end = braces.span()
    for choice in choices:
        yield from expand_braces(pattern[:start] + choice + pattern[end:])


def _stem(archive: Path) -> str:
    name = archive.name
    extension = next((e for e in ARCHIVES if name.lower().endswith(e)), "")
    return name[: len(name) - len(extension)]


def _safe(archive: Path, name: str, is_zip: bool) -> str:
    """A member's path with plain slashes.

    Raises:
        InputError: the path leads out of the archive, which only an attacker's or a careless person's does.
    """
    path = name.replace("\\", "/") if is_zip else name
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts:
        raise InputError(f"{archive} holds {one_line(name)}, a path that leads out of it; pack it again without")
    return "/".join(parts)


def _list_tar(path: Path, left_out: Counter[str]) -> dict[str, tuple[int, ...]]:
    """Name and place of each file in a tar; the last of those with the same name counts, and links are followed."""
    found: dict[str, tuple[int, ...]] = {}
    links: dict[str, str] = {}
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            name = posixpath.normpath(member.name) if member.name.startswith("./") else member.name
            if member.isreg():
                found[name] = (member.offset_data, member.size, member.size, PLAIN)
            elif member.islnk() or member.issym():
                folder = posixpath.dirname(name) if member.issym() else ""
                links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            tar.members.clear()  # type: ignore[attr-defined]  # a large archive's members would stay in memory
    for name, target in links.items():
        if target in found:
            found[name] = found[target]
        else:
            left_out["links out of the archive or to folders"] += 1
    return found


def _list_zip(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and place of each file in a zip.

    Raises:
        InputError: it is a bomb, is encrypted, or is packed in an unusual way.
    """
    found: dict[str, tuple[int, ...]] = {}
    methods = {zipfile.ZIP_STORED: ZIP_STORED, zipfile.ZIP_DEFLATED: ZIP_DEFLATED}
    total, num_bytes = 0, path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            total += member.file_size
            _check_ratio(path, one_line(member.filename), member.compress_size, member.file_size)
            if member.flag_bits & 1 or member.compress_type not in methods:
                how = "encrypted" if member.flag_bits & 1 else f"packed by method {member.compress_type}"
                raise InputError(f"{path}: {one_line(member.filename)} is {how}; unpack it, and give the folder")
            place = (member.header_offset, member.compress_size, member.file_size, methods[member.compress_type])
            found[member.filename] = place
    _check_ratio(path, "its content", num_bytes, total)
    return found


def _check_ratio(path: Path, what: str, packed: int, size: int) -> None:
    if size > MAX_SMALL_BYTES and size > MAX_RATIO * packed:
        raise InputError(
            f"{path} is a bomb: {what} unpacks from {packed:,} to {size:,} bytes; no images do, so do not trust it"
        )


def _unpacked(archive: Path) -> Path:
    """A packed tar's plain copy in the user's cache folder, made once; other files as they are.

    Random access to a packed tar is not possible.

    Raises:
        InputError: it is damaged or a bomb, or the cache folder cannot be written.
    """
    if _is_zip(archive):
        return archive
    with reading(archive), archive.open("rb") as file:
        first = file.read(6)
    open_packed = next((opener for magic, opener in PACKED.items() if first.startswith(magic)), None)
    if open_packed is None:
        return archive
    info = archive.stat()
    key = hashlib.sha256(f"{os.path.realpath(archive)}\0{info.st_size}\0{info.st_mtime_ns}".encode(errors="replace"))
    plain = user_cache_folder() / "unpacked" / f"{key.hexdigest()[:32]}.tar"
    if plain.exists():
        return plain
    logger.warning(f"{archive}: packed, so it is unpacked once, to {plain}")
    beside = plain.with_suffix(f".{os.getpid()}.tmp")
    try:
        plain.parent.mkdir(parents=True, exist_ok=True)
        with reading(archive), open_packed(archive) as packed, beside.open("wb") as file:
            written = 0
            while chunk := packed.read(1 << 20):
                written += len(chunk)
                _check_ratio(archive, "its content", info.st_size, written)
                file.write(chunk)
        beside.rename(plain)
    except OSError as error:
        raise InputError(
            f"{plain} cannot be written ({reason(error)}); make room, or unpack {archive} yourself"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return plain
