"""Files at an address (`https://`, `s3://`, `hf://`, ...), fetched once into the user's cache folder and read there.

In the folder `vqgen/remote` of the user's cache folder, `files/KEY` is one version of one remote file; a partly fetched
one has another name. `sets/KEY/` has a link to each file of a source, under the file's own name, and is what the local
readers see. `sources/KEY.json` is the last answer to "which files are these, and in which version".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import fsspec
from filelock import FileLock
from tqdm import tqdm

from vqgen.data.skipped import reason
from vqgen.data.sources.archive import ARCHIVES, expand_braces
from vqgen.data.sources.index import user_cache_folder
from vqgen.data.sources.tree import CLASS_LISTS
from vqgen.distributed import computed_by_main, rank
from vqgen.errors import InputError

logger = logging.getLogger("vqgen")

TIMEOUT = 20  # seconds in which a server must say something
TRIES = 3  # without a byte in between
PAUSE = 1.0  # seconds before another try
ASKED_AT_ONCE, FETCHED_AT_ONCE = 16, 4
# What file systems call an entry that changes with the content, the best first.
VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "checksum", "content_md5", "LastModified", "mtime", "created")
S3_CONFIG = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"max_attempts": 1}}
T = TypeVar("T")


class Unreached(InputError):
    """The server does not answer; another try may help."""


class RemoteFile(NamedTuple):
    """One version of a remote file.

    Attributes:
        url: its address.
        name: its path below the folder in which the source's pattern begins.
        size: its bytes; None if the server does not tell.
        version: what changes with its content, such as an ETag; empty if the server does not tell.
    """

    url: str
    name: str
    size: int | None
    version: str

    @property
    def key(self) -> str:
        return _digest(self.url, self.size, self.version)


class Remote(Protocol):
    """A kind of address.

    Attributes:
        chunk: bytes that are read at a time.
    """

    chunk: int

    def find(self, source: str) -> tuple[list[RemoteFile], str]:
        """The files of a source, and the pattern that the same files have in a folder of their own.

        Raises:
            InputError: a file is not there, or needs permission; `Unreached`: the server does not answer.
        """

    def open(self, url: str, start: int = 0) -> tuple[BinaryIO, int]:
        """A file from a byte on, to be read once from there to its end; and that byte, 0 if the server cannot skip.

        Raises:
            InputError, Unreached: as in `find`.
        """


def is_remote(source: str) -> bool:
    """Whether a source is an address and no path."""
    return re.match(r"[A-Za-z][\w+.-]*://", source) is not None


def remote_of(source: str) -> Remote:
    """The kind of a source's address."""
    return Web() if source.lower().startswith(("http://", "https://")) else FileSystem()


def local_copy(source: str) -> tuple[str, list[str]]:
    """Fetches the files at an address, unless they are in the user's cache folder; a changed file is fetched again.

    All processes must call it at the same point. One process of each machine fetches. A fetch that was ended goes on.

    Args:
        source: a file, or files as a pattern with {000..009}, {a,b} or (but from a web server) * and ?.

    Returns:
        The path or pattern of the local files, and lines to tell the user.

    Raises:
        InputError: an address is wrong or needs permission, the server does not answer, or the disk is full.
    """
    if source.lower().startswith("file://"):
        return urllib.parse.unquote(source[len("file://") :]), []
    files, pattern, notes = computed_by_main(lambda: _find(source))
    folder = _fetch(source, files)
    if rank() == 0:
        _remember(source, files, pattern)
    return os.path.join(folder, pattern), notes


def _find(source: str) -> tuple[list[RemoteFile], str, list[str]]:
    """The files of a source as its server tells or, if it does not, as it told when all of them were fetched."""
    try:
        files, pattern = _patiently(lambda: remote_of(source).find(source))
        return files, pattern, []
    except InputError as error:
        with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError):
            known = json.loads(_record(source).read_text("utf-8"))
            files = [RemoteFile(*file) for file in known["files"]]
            if all((_store() / "files" / file.key).is_file() for file in files):
                note = f"{source}: not asked whether it has changed ({error}); going on with what was fetched before"
                logger.warning(note)
                return files, known["pattern"], [note]
        raise


def _patiently(attempt: Callable[[], T]) -> T:
    """The result of an attempt, which is made twice if the server does not answer."""
    try:
        return attempt()
    except Unreached:
        time.sleep(PAUSE)
        return attempt()


# Fetching


def _fetch(source: str, files: list[RemoteFile]) -> Path:
    """The folder with a link to each of the files, of which those that are missing are fetched first."""
    try:
        folder = _store() / "sets" / _digest(*((file.name, file.key) for file in files))
        if all((folder / file.name).is_file() for file in files):
            return folder
        for name in ("files", "sets", "sources"):
            (_store() / name).mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # the processes of one machine wait here for the one that fetches
            _fetch_missing(source, files, folder.name)
            for file in files:
                link = folder / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_file():
                    link.unlink(missing_ok=True)
                    link.symlink_to(os.path.relpath(_store() / "files" / file.key, link.parent))
    except OSError as error:
        remedy = "make room, or name another cache folder in the environment's XDG_CACHE_HOME"
        raise InputError(f"{_store()} cannot be written ({reason(error)}); {remedy}") from error
    return folder


def _fetch_missing(source: str, files: list[RemoteFile], owner: str) -> None:
    """Fetches those of the files that are not there; `owner` names what has been fetched only in part."""
    remote = remote_of(source)
    parts = {file: _store() / "files" / f"{file.key}.{owner[:8]}.part" for file in files}
    missing = [file for file in files if not (_store() / "files" / file.key).is_file()]
    if not missing:
        return
    there = sum(parts[file].stat().st_size for file in missing if parts[file].is_file())
    total = sum(file.size or 0 for file in missing)
    free = shutil.disk_usage(_store()).free
    if total - there > free:
        remedy = "make room, name another cache folder in the environment's XDG_CACHE_HOME, or use fewer shards"
        raise InputError(f"{_gib(total - there)} to fetch, but {_store()} has room for {_gib(free)}; {remedy}")
    known = _gib(total) if all(file.size is not None for file in missing) else "of unknown size"
    what = f"{len(missing)} file{'s' * (len(missing) > 1)}, {known}, to {_store()}"
    logger.warning(f"fetching {source}: {what}" + (f"; {_gib(there)} are there already" if there else ""))
    stop = threading.Event()
    pool = ThreadPoolExecutor(FETCHED_AT_ONCE)
    with tqdm(total=total or None, desc="fetching", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def fetch(file: RemoteFile) -> None:
            try:
                _fetch_file(remote, file, parts[file], stop, bar)
            except BaseException:
                stop.set()  # the others would only delay the message
                raise

        try:
            for future in [pool.submit(fetch, file) for file in missing]:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _fetch_file(remote: Remote, file: RemoteFile, part: Path, stop: threading.Event, bar: Any) -> None:
    """Fetches a file under the name `part`, and renames it when it is whole; goes on where an earlier fetch ended."""
    tries, done = 0, part.stat().st_size if part.exists() and file.version else 0
    bar.update(done)
    while done != file.size:
        if stop.is_set():
            return
        before = done
        try:
            stream, start = remote.open(file.url, done)
            with contextlib.closing(stream), part.open("ab" if start else "wb") as out:
                out.truncate(start)
                bar.update(start - done)
                done = start
                while not stop.is_set() and (chunk := _read(file.url, stream, remote.chunk)):
                    out.write(chunk)
                    done += len(chunk)
                    bar.update(len(chunk))
            if stop.is_set() or file.size is None:
                break
            if done > file.size:
                part.unlink()
                raise InputError(f"{file.url} has changed while it was fetched; start again")
            if done < file.size:
                raise Unreached(f"{file.url}: the connection ended after {done} of {file.size} bytes")
        except Unreached as error:
            tries = 1 if done > before else tries + 1
            if tries == TRIES:
                raise InputError(f"{error}; try again later: the same command goes on from there") from error
            stop.wait(PAUSE * tries)
    if not stop.is_set():
        if not part.exists():  # an empty file
            part.touch()
        part.rename(part.with_name(file.key))


def _read(url: str, stream: BinaryIO, num_bytes: int) -> bytes:
    with asking(url):
        return stream.read(num_bytes)


# The user's cache folder


def _store() -> Path:
    return user_cache_folder() / "remote"


def _record(source: str) -> Path:
    return _store() / "sources" / f"{_digest(source)}.json"


def _remember(source: str, files: list[RemoteFile], pattern: str) -> None:
    """Records which files a source has, all of them fetched, for when its server does not answer."""
    content = json.dumps({"files": files, "pattern": pattern})
    with contextlib.suppress(OSError):  # the source then needs its server the next time
        beside = _record(source).with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(content, "utf-8")
        beside.rename(_record(source))


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.1f} MiB"


# Servers


class Web:
    """`https://` and `http://`, by the standard library: without another package, and in any forked process."""

    chunk = 1 << 20

    def find(self, source: str) -> tuple[list[RemoteFile], str]:
        path, mark, query = source.partition("?")
        if "*" in path or path.endswith("/"):
            raise InputError("a web server does not list its files; name them, as in x-{000..009}.tar")
        base = _folder_of(path, path.find("{"))

        def ask(url: str) -> RemoteFile:
            headers = self._head(url + mark + query)
            if headers.get_content_type() == "text/html":
                raise InputError(f"{url} is a web page; give the address of the file itself")
            ranged = re.fullmatch(r"bytes .*/(\d+)", headers.get("Content-Range", ""))
            size = ranged[1] if ranged else headers.get("Content-Length")
            version = headers.get("ETag") or headers.get("Last-Modified") or ""
            return RemoteFile(url + mark + query, url.removeprefix(base), int(size) if size else None, version)

        return _with_class_names(_asked(ask, list(expand_braces(path))), ask, base), path.removeprefix(base)

    def open(self, url: str, start: int = 0) -> tuple[BinaryIO, int]:
        with asking(url):
            response = self._request(url, "GET", **({"Range": f"bytes={start}-"} if start else {}))
            return response, start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0

    def _head(self, url: str) -> Any:
        with asking(url):
            try:
                with self._request(url, "HEAD") as response:
                    return response.headers
            except urllib.error.HTTPError as error:
                if error.code not in (400, 403, 405, 501):
                    raise
            with self._request(url, "GET", Range="bytes=0-0") as response:  # an address may be signed for GET alone
                return response.headers

    def _request(self, url: str, method: str, **headers: str) -> Any:
        parts = urllib.parse.urlsplit(url)
        if parts.username:  # urllib would take the password for a part of the port
            login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
            url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        headers["User-Agent"] = "vqgen"  # some servers refuse Python's own
        url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(url, headers=headers, method=method)
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server's redirections; a password goes to no other server."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        request = super().redirect_request(req, *args)
        if request is not None and request.host != req.host:
            request.remove_header("Authorization")
        return request


class FileSystem:
    """`s3://`, `hf://` and all other addresses that fsspec knows."""

    chunk = 8 << 20  # each is a request of its own

    def find(self, source: str) -> tuple[list[RemoteFile], str]:
        fs, path = self._opened(source)
        wild = re.search(r"[{*?\[]", path)
        if wild is None:
            with asking(source):
                info = fs.info(path)
                found = fs.find(path, detail=True) if info["type"] == "directory" else {path: info}
            base = f"{path.rstrip('/')}/" if info["type"] == "directory" else _folder_of(path)
        else:
            base, found = _folder_of(path, wild.start()), {}
            for infos in _asked(lambda part: self._matches(fs, part), list(expand_braces(path))):
                found |= infos

        def as_file(path: str, info: dict[str, Any]) -> RemoteFile:
            version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
            return RemoteFile(fs.unstrip_protocol(path), path.removeprefix(base), info.get("size"), version)

        def ask(url: str) -> RemoteFile:
            with asking(url):
                return as_file(url, fs.info(url))

        files = [as_file(path, info) for path, info in found.items() if not path.rpartition("/")[2].startswith(".")]
        if not files:
            raise InputError("there is no file in this folder")
        return _with_class_names(files, ask, base), path.removeprefix(base) if path != base[:-1] else ""

    def open(self, url: str, start: int = 0) -> tuple[BinaryIO, int]:
        fs, path = self._opened(url)
        with asking(url):
            stream = fs.open(path, "rb", block_size=self.chunk, cache_type="readahead")
            stream.seek(start)
            return stream, start

    def _opened(self, url: str) -> tuple[Any, str]:
        scheme = url.partition("://")[0].lower()
        options = {"config_kwargs": S3_CONFIG} if scheme in ("s3", "s3a") else {}
        try:
            return fsspec.url_to_fs(url, **options)
        except ImportError as error:
            remedy = "pip install 'vqgen[remote]'" if options else f"{error}"
            raise InputError(f"{scheme}:// needs a package that is not installed; {remedy}") from error
        except ValueError as error:
            raise InputError(f"{scheme}:// is no known kind of address; use https://, s3:// or hf://") from error

    def _matches(self, fs: Any, pattern: str) -> dict[str, Any]:
        """The files that a pattern without braces stands for."""
        with asking(fs.unstrip_protocol(pattern)):
            if not re.search(r"[*?\[]", pattern):
                return {pattern: fs.info(pattern)}
            found = {path: info for path, info in fs.glob(pattern, detail=True).items() if info["type"] == "file"}
            if not found:
                raise FileNotFoundError
            return dict(sorted(found.items()))


def _folder_of(path: str, end: int = -1) -> str:
    """The folder, with its slash, in which the part of a path before `end` lies."""
    return path[: path.rfind("/", 0, end if end >= 0 else None) + 1]


def _asked(ask: Callable[[str], T], urls: list[str]) -> list[T]:
    """The answers about some addresses, several at a time."""
    pool = ThreadPoolExecutor(ASKED_AT_ONCE)
    try:
        return list(pool.map(ask, urls))
    finally:
        pool.shutdown(cancel_futures=True)


def _with_class_names(files: list[RemoteFile], ask: Callable[[str], RemoteFile], base: str) -> list[RemoteFile]:
    """The files and, if they are archives, the list of class names beside the first if there is one."""
    for file in files:
        if ".." in file.name.split("/") or not file.name or file.name.startswith("/"):
            raise InputError(f"{file.url}: its name leads out of the folder {base}; rename it there")
    if files[0].name.lower().endswith(ARCHIVES):
        for name in CLASS_LISTS:
            with contextlib.suppress(InputError):
                return [*files, ask(base + _folder_of(files[0].name) + name)]
    return files


@contextlib.contextmanager
def asking(url: str) -> Iterator[None]:
    """Turns each way in which a server, or a library that asks it, says no into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each library of fsspec's has its own exceptions, with no common class
        codes = [code for link in _chain(error) if (code := _status(link))]
        nameless = type(error).__name__ == "NoCredentialsError"  # botocore's, which need not be installed
        if set(codes) & {401, 403} or isinstance(error, PermissionError) or nameless:
            raise InputError(f"{url} needs permission{_shown(codes)}; {_login(url)}") from error
        if set(codes) & {404, 410} or isinstance(error, FileNotFoundError):
            raise InputError(f"{url}: there is no such file{_shown(codes)}; check the address") from error
        if codes and codes[0] < 500 and codes[0] != http.HTTPStatus.TOO_MANY_REQUESTS:
            raise InputError(f"{url}: the server refuses{_shown(codes)}; check the address") from error
        cause = getattr(error, "reason", error)  # urllib wraps the error of the socket
        why = reason(cause) if isinstance(cause, Exception) else f"{cause}{_shown(codes)}"
        raise Unreached(f"{url} cannot be reached ({why}); check the address and the network") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The server's status that an error of any HTTP library holds."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    return getattr(getattr(error, "response", None), "status_code", None)


def _shown(codes: list[int]) -> str:
    return f" ({codes[0]})" if codes else ""


def _login(url: str) -> str:
    """What gives permission to read an address."""
    if url.startswith("hf://"):
        return "check the address, accept the data set's terms on its page, and log in with `hf auth login`"
    if url.startswith("s3"):
        return (
            "set the environment's AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true if it is public"
        )
    return "log in as its server asks, as in https://USER:PASSWORD@..., or fetch it by hand"
