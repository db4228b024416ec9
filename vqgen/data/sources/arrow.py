"""Reads Parquet and Arrow files: their columns, and the places of images in them.

In an uncompressed Arrow file each image is a range of the file's bytes, so its offset and size are all that is needed
to read it at any time, as in a tar file. The images of other files are copied to such a file first, once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from vqgen.data.skipped import one_line, reason
from vqgen.data.sources.base import CONTAINER_ERRORS
from vqgen.data.sources.index import user_cache_folder
from vqgen.errors import InputError

logger = logging.getLogger("vqgen")

try:
    import fcntl
except ImportError:  # Windows: two processes may make the same copy at the same time
    fcntl = None  # type: ignore[assignment]

PARQUET, ARROW_FILE, ARROW_STREAM, LFS_POINTER = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"version https://git-lfs"
BATCH_BYTES = 1 << 26  # of images that are in memory at a time while they are copied
MAX_BATCH_ROWS = 1024


@contextlib.contextmanager
def reading_table(path: Path) -> Iterator[None]:
    """Turns an error that a damaged table causes into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (*CONTAINER_ERRORS, pa.ArrowException, MemoryError) as error:  # a damaged file may ask for any memory
        raise InputError(f"{path} cannot be read ({reason(error)}); repair it or fetch it again") from error


def schema_of(path: Path) -> pa.Schema:
    """The columns of a file.

    Raises:
        InputError: the file is damaged.
    """
    with reading_table(path):
        schema = pq.read_schema(path) if _is_parquet(path) else _mapped(path)[0].schema
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise InputError(f"{path} has two columns called {one_line(twice[0])}; rename one of them")
    return schema


def num_rows(path: Path) -> int:
    """The number of rows of a file."""
    with reading_table(path):
        return pq.read_metadata(path).num_rows if _is_parquet(path) else _mapped(path)[0].num_rows


def read_column(path: Path, column: str, rows: int | None = None) -> pa.ChunkedArray:
    """A column of a file, or its first rows.

    Raises:
        InputError: the file is damaged, or has no such column.
    """
    if column not in schema_of(path).names:
        raise InputError(f"{path.name} has no column {one_line(column)}, which other files have; leave that file out")
    with reading_table(path):
        if not _is_parquet(path):
            return _mapped(path)[0].column(column)[:rows]
        with pq.ParquetFile(path) as file:
            if rows is None:
                return file.read(columns=[column]).column(column)
            schema = file.schema_arrow
            batches = file.iter_batches(batch_size=rows, columns=[column])
            first = next(batches, None)
            return pa.chunked_array([] if first is None else [first.column(0)], schema.field(column).type)


def located(path: Path, column: str) -> tuple[Path, np.ndarray]:
    """The Arrow file with a column's images, which is a copy unless the file itself will do, and the images' places.

    A place is offset and size in the file. The size is negative if the bytes there are not the image but its path, and
    the offset is -1 if there is no image.

    Raises:
        InputError: the file is damaged or has no such column, or there is no room for the copy.
    """
    read_column(path, column, 1)
    with reading_table(path):
        if not _is_parquet(path):
            table, whole = _mapped(path)
            spans = _spans(table.column(column), whole)
            if spans is not None:
                return path, spans
    store = _store(path, column)
    if not store.exists():
        copy_images(path, column, store)
    with reading_table(store):
        table, whole = _mapped(store)
        spans = _spans(table.column(0), whole)
        assert spans is not None, "the copy is not compressed"
        return store, spans


def copy_images(path: Path, column: str, store: Path) -> None:
    """Copies a column's images to an uncompressed Arrow file.

    Raises:
        InputError: the file is damaged, or there is no room for the copy.
    """
    with _only_one(store):
        if store.exists():  # another process has made it in the meantime
            return
        beside = store.with_suffix(".tmp")
        try:
            with reading_table(path), _writing(path, store.parent):
                _write_copy(path, column, beside)
            with _writing(path, store.parent):
                beside.rename(store)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path, folder: Path) -> Iterator[None]:
    """Tells an error of the cache folder's disk from one of the table that is read."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        remedy = "make room there, or set XDG_CACHE_HOME"
        raise InputError(f"{path}: its images cannot be copied to {folder} ({reason(error)}); {remedy}") from error


def as_file(value: pa.Scalar, shape: tuple[int, ...] = ()) -> bytes | None:
    """An image file from a value: the bytes of one, or the pixels of a nested list of numbers from 0 to 255.

    Args:
        value: the value; None is returned for null.
        shape: the shape of the pixels, if the value is a flat list of them.

    Raises:
        ValueError: the value is no image.
    """
    if not value.is_valid:
        return None
    kind = value.type
    if isinstance(kind, pa.BaseExtensionType):
        return as_file(value.value, tuple(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) else ())
    if not pa.types.is_nested(kind):
        return value.as_py()
    values, lengths = value.values, [len(value.values)]  # of all lists on each level, from the outermost inwards
    while pa.types.is_nested(values.type):
        values = values.flatten()
        lengths.append(len(values))
    pixels = values.to_numpy(zero_copy_only=False)
    if pixels.dtype.kind not in "iu" or not pixels.size or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("no numbers from 0 to 255")
    pixels = pixels.astype(np.uint8)
    if len(lengths) == 1 and not shape:
        return pixels.tobytes()  # a list of the bytes of a file
    pixels = pixels.reshape(shape or [inner // outer for outer, inner in zip([1, *lengths], lengths, strict=False)])
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)  # (C, H, W) -> (H, W, C)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _is_parquet(path: Path) -> bool:
    """Whether a table is a Parquet file, and no Arrow file.

    Raises:
        ValueError: it is neither, and perhaps only Git LFS's pointer to the file.
    """
    with path.open("rb") as file:
        begin = file.read(32)
    if begin.startswith(LFS_POINTER):
        raise InputError(f"{path} is only Git LFS's pointer to the file; run `git lfs pull` in its folder")
    if not begin.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        raise ValueError("neither a Parquet nor an Arrow file")
    return begin.startswith(PARQUET)


def _mapped(path: Path) -> tuple[pa.Table, pa.Buffer]:
    """The table in an Arrow file, which is mapped and not read, and the file's bytes."""
    with pa.memory_map(str(path)) as file:
        whole = file.read_buffer()
    is_file = whole[: len(ARROW_FILE)].to_pybytes() == ARROW_FILE
    with pa.ipc.open_file(whole) if is_file else pa.ipc.open_stream(whole) as reader:
        return reader.read_all(), whole


def _spans(column: pa.ChunkedArray, whole: pa.Buffer) -> np.ndarray | None:
    """(N, 2): offset and size of each image in a file, see `located`; None if the images do not lie in it as files.

    Raises:
        ValueError: the file is damaged.
    """
    column.validate()
    spans = []
    for chunk in column.chunks:
        array = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        parts = (
            {"bytes": array}
            if not pa.types.is_struct(array.type)
            else {f.name: array.field(f.name) for f in array.type}
        )
        if "bytes" not in parts and "path" not in parts:
            return None
        found = np.full((len(array), 2), [-1, 0])
        if "path" in parts:
            paths = _ranges(parts["path"], whole)
            if paths is None:
                return None
            found = np.where(paths[:, 1:] > 0, paths * [1, -1], found)
        if "bytes" in parts:
            files = _ranges(parts["bytes"], whole)
            if files is None:
                return None
            if _is_text(array.type):
                files *= [1, -1]
            found = np.where(files[:, :1] >= 0, files, found)
        found[array.is_null().to_numpy(zero_copy_only=False)] = [-1, 0]
        spans.append(found)
    return np.concatenate(spans) if spans else np.empty((0, 2), np.int64)


def _ranges(array: pa.Array, whole: pa.Buffer) -> np.ndarray | None:
    """(N, 2): offset and size of each value in a file, -1 and 0 for null; None if the values do not lie in it.

    Raises:
        ValueError: the file is damaged.
    """
    if pa.types.is_null(array.type):
        return np.tile([-1, 0], (len(array), 1))
    wide = pa.types.is_large_binary(array.type) or pa.types.is_large_string(array.type)
    if not (wide or pa.types.is_binary(array.type) or pa.types.is_string(array.type)):
        return None
    ranges = np.tile([-1, 0], (len(array), 1))
    _, bounds, content = array.buffers()
    filled = array.is_valid().to_numpy(zero_copy_only=False)
    if not filled.any() or bounds is None or content is None:
        return ranges
    assert array.offset == 0, "what is read from a file is no slice"
    ends = np.frombuffer(bounds, np.int64 if wide else np.int32)[: len(array) + 1].astype(np.int64)
    start = content.address - whole.address
    if start < 0 or start + content.size > whole.size:
        return None
    if (np.diff(ends) < 0).any() or ends[0] < 0 or ends[-1] > content.size:
        raise ValueError("the values' places are damaged")
    ranges[filled] = np.stack([start + ends[:-1], np.diff(ends)], axis=1)[filled]
    return ranges


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _store(path: Path, column: str) -> Path:
    """Where the copy of a file's images lies: in the user's cache folder, under a name that changes with the file."""
    info = os.stat(path)
    key = f"{os.path.realpath(path)}\0{column}\0{info.st_size} {info.st_mtime_ns}"
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    try:
        return user_cache_folder() / "tables" / f"{name}.arrow"
    except RuntimeError as error:
        raise InputError(f"{path}: no folder for a copy of its images ({error}); set XDG_CACHE_HOME") from error


@contextlib.contextmanager
def _only_one(store: Path) -> Iterator[None]:
    """Lets one process at a time make a copy."""
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        lock = store.with_suffix(".lock").open("wb")
    except OSError as error:
        raise InputError(f"{store.parent} cannot be written ({reason(error)}); set XDG_CACHE_HOME") from error
    with lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


@functools.cache  # one line for all files
def _say_copies(folder: Path) -> None:
    logger.warning(f"the images of tables are copied once to {folder}, as a packed table cannot be read at any place")


def _write_copy(path: Path, column: str, target: Path) -> None:
    writer = None
    with contextlib.ExitStack() as stack:
        if _is_parquet(path):
            file = stack.enter_context(pq.ParquetFile(path))
            count, num_bytes = file.metadata.num_rows, _column_bytes(file.metadata, column)
            batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * count // max(1, num_bytes)))
            batches = file.iter_batches(batch_size=batch_rows, columns=[column])
        else:
            table = _mapped(path)[0].select([column])
            count, num_bytes = table.num_rows, table.nbytes
            batches = iter(table.to_batches(max_chunksize=MAX_BATCH_ROWS))
        free = shutil.disk_usage(target.parent).free
        if num_bytes > free:
            raise InputError(
                f"{path}: a copy of its images needs {num_bytes / 2**30:,.1f} GiB in {target.parent}, which has "
                f"{free / 2**30:,.1f}; make room there, or set XDG_CACHE_HOME"
            )
        _say_copies(target.parent)
        sink = stack.enter_context(pa.OSFile(str(target), "wb"))
        progress = stack.enter_context(
            tqdm(desc=f"copying {path.name}", total=count, unit=" images", leave=False, disable=None)
        )
        for batch in batches:
            images = _as_files(batch.column(0))
            if writer is None:
                schema = pa.schema([(column, images.type)])
                writer = stack.enter_context(pa.ipc.new_stream(sink, schema))
            writer.write_batch(pa.record_batch([images], schema=schema))
            progress.update(len(images))
        if writer is None:
            stack.enter_context(pa.ipc.new_stream(sink, pa.schema([(column, pa.binary())])))


def _column_bytes(metadata: pq.FileMetaData, column: str) -> int:
    """The size of a column without compression."""
    sizes = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            found = metadata.row_group(group).column(number)
            if found.path_in_schema.split(".")[0] == column:
                sizes += found.total_uncompressed_size
    return sizes


def _as_files(array: pa.Array) -> pa.Array:
    """A column's values in a type whose bytes lie in an Arrow file as they are."""
    if isinstance(array, pa.ExtensionArray) and not isinstance(array, pa.FixedShapeTensorArray):
        array = array.storage
    kind = array.type
    if pa.types.is_struct(kind):
        fields = [field for field in kind if field.name in ("bytes", "path")]
        parts = [_as_files(array.field(field.name)) for field in fields]
        return pa.StructArray.from_arrays(parts, [field.name for field in fields], mask=array.is_null())
    if pa.types.is_null(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_text(kind):
        return array
    if pa.types.is_string_view(kind):
        return array.cast(pa.large_string())
    if pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return array.cast(pa.large_binary())
    if isinstance(array, pa.DictionaryArray):
        return _as_files(array.dictionary_decode())
    return pa.array([_file_or_nothing(value) for value in array], pa.large_binary())


def _file_or_nothing(value: pa.Scalar) -> bytes | None:
    try:
        return as_file(value)
    except (ValueError, TypeError):  # one row's pixels that are none: an empty file is skipped as a broken image
        return b""
