"""Checkpoints in shards: every process writes its share of the tensors, while training goes on.

The files are those of torch.distributed.checkpoint. One process can read what many have written, and the other way.
"""

import errno
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from vqgen.distributed import rank, world_size
from vqgen.errors import InputError
from vqgen.training.files import HashedFile, sha256

SMALL = 1024  # elements; a smaller tensor stays among the numbers
SLOW = timedelta(hours=2)  # in which a process must have written its share
ALONE = "torch.distributed is disabled"  # a warning of torch's if there is only one process
# What torch's metadata consist of.
METADATA = ["Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata"]
METADATA += ["MetadataIndex", "_StorageInfo", "StorageMeta"]


def split(state: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A state without its larger tensors, which are added to `tensors` by name; their shapes stay, on `meta`."""
    if isinstance(state, dict):
        return {key: split(value, tensors, f"{name}/{key}") for key, value in state.items()}
    if isinstance(state, DTensor) or (isinstance(state, Tensor) and state.numel() >= SMALL):
        tensors[name] = state
        return torch.empty(state.shape, dtype=state.dtype, device="meta")
    return state


def is_apart(value: Any) -> bool:
    """Whether a value of a state stands for a tensor that is in the shards."""
    return isinstance(value, Tensor) and value.is_meta


def placed(state: Any, own: Any = None) -> Any:
    """A state from `split` with a tensor to read into in place of each that is in the shards.

    Args:
        state: the state.
        own: a state whose tensor at the same place is taken if it has the same shape; otherwise it is one on the CPU.
    """
    if isinstance(state, dict):
        own = own if isinstance(own, dict) else {}
        return {key: placed(value, own.get(key)) for key, value in state.items()}
    if is_apart(state):
        fits = isinstance(own, Tensor) and own.shape == state.shape
        return own if fits else torch.empty_like(state, device="cpu")
    return state


def read_shards(folder: Path, state: Any, into: Any) -> None:
    """Reads the tensors of a state from a folder of shards; each process reads what its tensors need.

    Args:
        folder: the folder.
        state: the state from `split`, or a part of it.
        into: what `placed` made of it.

    Raises:
        RuntimeError: the folder has no such tensor.
    """
    tensors: dict[str, Tensor] = {}
    _collect(state, into, tensors)
    if not tensors:
        return
    reader = _Reader(folder)
    there = reader.read_metadata().state_dict_metadata
    for name, x in tensors.items():
        kept = there.get(name)
        if not isinstance(kept, TensorStorageMetadata) or kept.size != x.shape:
            raise RuntimeError(f"{folder} has no {name} of shape {tuple(x.shape)}")
    warnings.filterwarnings("ignore", ALONE)
    dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


def _collect(state: Any, into: Any, tensors: dict[str, Tensor], name: str = "") -> None:
    if isinstance(state, dict):
        for key, value in state.items():
            _collect(value, into[key], tensors, f"{name}/{key}")
    elif is_apart(state):
        tensors[name] = into.detach()


class BackgroundWriter:
    """Writes shards in the background, one set at a time. All processes must call its methods together."""

    def __init__(self) -> None:
        self._writing: Future[Any] | None = None
        self._folder = Path()
        self._group: Any = None  # whose messages do not mix with those of training
        self._told = False

    def write(self, folder: Path, tensors: Mapping[str, Tensor], then: Callable[[dict[str, str]], None]) -> None:
        """Copies the tensors, and writes the copies to a folder while the caller goes on.

        Args:
            folder: a new folder, which is there, on a disk that all processes see.
            tensors: tensors by name. FSDP's are written by the processes that have them; of the others, which all
                processes have, each writes a share.
            then: called on the main process, in the background, when all processes have written; it gets the SHA-256
                of each file by its name.
        """
        self.wait()
        self._folder = folder
        if dist.is_initialized() and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=SLOW)
        warnings.filterwarnings("ignore", ALONE)
        writer = _Writer(folder, then)
        writing = dcp.async_save(my_share(tensors), storage_writer=writer, process_group=self._group)
        assert isinstance(writing, Future)
        self._writing, self._told = writing, False

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
            InputError: a process does not see the folder.
            Exception: what a process could not write for, mostly an OSError; so do the other processes.
        """
        writing, self._writing = self._writing, None
        if writing is not None and (error := _reason(writing)) is not None:
            if rank() == 0:
                shutil.rmtree(self._folder, ignore_errors=True)  # it may have filled the disk
            if isinstance(error, FileNotFoundError):
                remedy = "run_dir= must be on a disk that they share, or set train.sharded_checkpoints=false"
                raise InputError(f"{self._folder}: not all processes see this folder; {remedy}") from error
            raise error

    def new_fault(self) -> BaseException | None:
        """Why the last writing has failed, once; None if it has not, or not yet. `wait` raises it all the same."""
        if self._told or self._writing is None or not self._writing.done():
            return None
        self._told = True
        return _reason(self._writing)

    def close(self) -> None:
        """Waits until all is written, and ends the processes' group."""
        self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def _reason(writing: Future[Any]) -> BaseException | None:
    """Why a writing has failed, which it waits for, by the first process that failed; None if it has not."""
    error = writing.exception()
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def my_share(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that this process writes: FSDP's, and of the others as many bytes as other processes."""
    written, mine = [0] * world_size(), dict[str, Tensor]()
    for name, x in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        if isinstance(x, DTensor):
            mine[name] = x
            continue
        owner = written.index(min(written))
        written[owner] += x.nbytes
        if owner == rank():
            mine[name] = x
    return mine


class Hashing(FileSystem):
    """A file system that keeps the SHA-256 of each file that is written."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}  # by the file's name

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with HashedFile(path) as file:
            try:
                yield file
            except RuntimeError as error:  # torch's, which hides why writing failed
                raise error.__context__ or error from None
        self.sums[Path(path).name] = file.sha256()


class _Writer(FileSystemWriter):
    """Writes shards, and calls `then` with their checksums on the main process."""

    def __init__(self, folder: Path, then: Callable[[dict[str, str]], None]):
        super().__init__(folder)  # in one thread, because torch loses the errors of others
        self.fs = self.files = Hashing()
        self.folder, self.then = folder, then

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Writes this process's share, and its checksums for the main process."""
        written = super().write_data(plan, planner)
        (self.folder / f"{rank()}.sums").write_text(json.dumps(self.files.sums))
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        """Ends the writing on the main process, after all have written."""
        super().finish(metadata, results)
        sums = {".metadata": sha256(self.folder / ".metadata")}
        for part in self.folder.glob("*.sums"):
            sums |= json.loads(part.read_text())
            part.unlink()
        if unseen := {file.relative_path for file in metadata.storage_data.values()} - sums.keys():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder / min(unseen)))
        self.then(sums)

    def storage_meta(self) -> StorageMeta:
        """Nothing: torch would keep the folder's path, of a class that depends on Python's version."""
        return StorageMeta()


class _Reader(FileSystemReader):
    """Reads shards; unlike its base, it runs no code from their files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _Plain(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()


class _Plain(pickle.Unpickler):
    """Reads the pickle of torch's metadata, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        plain = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        plain = plain and (name in METADATA)
        plain = plain or (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"))
        plain = plain or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        if not plain:
            raise RuntimeError(f"the metadata of its shards name {module}.{name}")
        return super().find_class(module, name)
