"""Shards that are read from their beginning, one sample after another: tar files, or parts of a data set of the Hub."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from vqgen.data.formats import EXTENSIONS
from vqgen.data.pixels import checked_size
from vqgen.data.skipped import reason
from vqgen.data.sources.archive import TARS, find_shards
from vqgen.data.sources.hub import HubShard, hub_shards
from vqgen.data.sources.hub import parse as parse_hub
from vqgen.data.sources.remote import Unreached, asking, is_remote, remote_of
from vqgen.data.sources.tree import CLASS_LISTS, SIDES, class_list
from vqgen.errors import InputError
from vqgen.settings import DataConfig

PAUSES = (1, 2, 4, 8, 16, None)  # seconds before a broken connection is opened again; then the run ends
DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, struct.error, ValueError)


class Sample(NamedTuple):
    """An encoded image.

    Attributes:
        name: `shard.tar/key`.
        extension: that of the image's file, such as `.jpg`.
        content: the file's bytes.
        sides: the contents of files beside it that may hold its label, by extension: `.cls`, `.json` or `.txt`.
    """

    name: str
    extension: str
    content: bytes
    sides: Mapping[str, bytes]


class Shard(Protocol):
    """A part of a data set that is read from its beginning: a tar file, or the rows of a table.

    Attributes:
        name: its name, without its folder.
        size: its bytes; None if unknown.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    def head(self, num_bytes: int) -> bytes:
        """Its first bytes."""

    def samples(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Sample | None]]:
        """Name and sample of each image, always in the same order; None for a sample that is not wanted.

        Args:
            wanted: whether to read an image, by its name; it is asked once for each, just before the image's turn.

        Raises:
            Damaged: the rest of the shard cannot be read.
            InputError: it is not there, or its server does not answer.
        """


class Damaged(InputError):
    """The rest of a shard cannot be read."""


def sample_of(name: str, members: Mapping[str, bytes]) -> Sample | None:
    """The sample of all files of one key, by extension; None if none of them is an image."""
    extension = next((extension for extension in members if extension in EXTENSIONS), None)
    if extension is None:
        return None
    sides = {side: members[side] for side in SIDES if side in members}
    return Sample(name, extension, members[extension], sides)


@dataclass(frozen=True)
class TarShard:
    """A tar file, compressed or not, on the disk or at an address, in WebDataset's layout.

    The files of one key, which is the path up to the first dot of the name, follow each other.
    """

    place: str
    name: str
    size: int | None

    def open(self) -> BinaryIO:
        if is_remote(self.place):
            return cast(BinaryIO, _Lasting(self.place, self.size))
        return open(self.place, "rb")

    def head(self, num_bytes: int) -> bytes:
        with contextlib.closing(self.open()) as file:
            return file.read(num_bytes)

    def samples(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Sample | None]]:
        try:
            # A stream cannot go back; a file on the disk can pass over what is not wanted.
            mode: Any = "r|*" if is_remote(self.place) else "r:*"
            with contextlib.closing(self.open()) as file, tarfile.open(fileobj=file, mode=mode, bufsize=1 << 20) as tar:
                for key, members in itertools.groupby(_parts_of(tar), key=lambda member: _parts(member)[0]):
                    name = f"{self.name}/{key}"
                    is_wanted = wanted(name)
                    contents = {_parts(member)[1]: _content(tar, member, is_wanted) for member in members}
                    sample = sample_of(name, contents)
                    if sample is not None:
                        yield name, sample if is_wanted else None
                if self.size is not None and 0 <= self.size - tar.offset < tarfile.BLOCKSIZE:
                    raise EOFError("the mark at its end is missing")  # tarfile takes a cut header for the end
        except InputError:  # the server's; it is a ValueError too
            raise
        except DAMAGE as error:
            raise Damaged(f"{self.name} cannot be read to its end ({reason(error)})") from error
        except OSError as error:
            raise InputError(f"{self.place} cannot be read ({reason(error)}); the same command goes on") from error


def _parts_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members that may be files of a sample; a hidden file is none."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them, 1 KB each
        if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
            yield member


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """A member's key and extension."""
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, f".{extension.lower()}"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, is_wanted: bool) -> bytes:
    extension = _parts(member)[1]
    if not is_wanted or extension not in (*EXTENSIONS, *SIDES):
        return b""
    with contextlib.suppress(OSError):  # a file too large for an image is a broken image
        checked_size(member.size)
        return cast(Any, tar.extractfile(member)).read()
    return b""


class _Lasting:
    """A file at an address, whose connection is opened again when it breaks."""

    def __init__(self, url: str, size: int | None):
        self.url, self.size, self.position = url, size, 0
        self.stream: BinaryIO | None = None

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; empty at the end.

        Raises:
            InputError: the server says no, or does not answer for half a minute.
        """
        for pause in PAUSES:
            try:
                if self.stream is None:
                    self.stream, start = remote_of(self.url).open(self.url, self.position)
                    with asking(self.url):
                        while start < self.position and (
                            chunk := self.stream.read(min(1 << 20, self.position - start))
                        ):
                            start += len(chunk)
                with asking(self.url):
                    content = self.stream.read(num_bytes)
                if not content and num_bytes and self.size is not None and self.position < self.size:
                    raise Unreached(f"{self.url}: the connection ended after {self.position} of {self.size} bytes")
                self.position += len(content)
                return content
            except Unreached as error:
                self.close()
                if pause is None:
                    raise InputError(f"{error}; the same command goes on from there") from error
                time.sleep(pause)
        raise AssertionError

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = None


@dataclass(frozen=True)
class RowShard:
    """A part of a data set of the Hugging Face Hub."""

    part: HubShard

    @property
    def name(self) -> str:
        return self.part.name

    size = None

    def head(self, num_bytes: int) -> bytes:
        return self.part.head(num_bytes)

    def samples(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Sample | None]]:
        for name, content, label in self.part.rows(wanted):
            sides = {".cls": label.encode()} if label is not None else {}
            yield name, Sample(name, "", content, sides) if content is not None else None


class Shards(NamedTuple):
    """The shards of a source.

    Attributes:
        shards: the shards, in their order.
        names_of_numbers: the names of classes that are numbers, from a list beside the first shard or the data set's.
        notes: what was assumed; None if the files beside the images are to say it.
    """

    shards: Sequence[Shard]
    names_of_numbers: Mapping[str, str]
    notes: list[str] | None


def open_shards(data: DataConfig) -> Shards:
    """The shards of `data.source`.

    Raises:
        InputError: there is no such shard or data set, or the source is of another kind.
    """
    if parse_hub(data.source) is not None:
        parts, names, notes = hub_shards(data.source, data)
        return Shards([RowShard(part) for part in parts], names, notes)
    source = data.source.removeprefix("file://")
    if is_remote(source):
        files, _ = remote_of(source).find(source)
        found = [TarShard(file.url, file.name.rpartition("/")[2], file.size) for file in files]
        shards = [shard for shard in found if shard.name not in CLASS_LISTS]
        lists = {shard.name: shard for shard in found if shard.name in CLASS_LISTS}
        names = class_list(lambda name: lists[name].head(1 << 26) if name in lists else None)
    else:
        path = Path(source).expanduser()
        paths = [] if path.is_dir() else find_shards(path)
        shards = [TarShard(str(path.resolve()), path.name, path.stat().st_size) for path in paths]
        beside = {name: paths[0].parent / name for name in CLASS_LISTS} if paths else {}
        names = class_list(
            lambda name: beside[name].read_bytes() if name in beside and beside[name].is_file() else None
        )
    if not shards or not all(shard.name.lower().endswith(TARS) for shard in shards):
        kinds = f"tar shards ({', '.join(TARS)}) or hf:NAME"
        raise InputError(f"stream=true reads {kinds}; name some, as in x-{{000..009}}.tar")
    return Shards(shards, names, None)
