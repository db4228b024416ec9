"""Checkpoints in shards: every process writes its share of the tensors, while training goes on.

The files are those of torch.distributed.checkpoint. One process can read what many have written, and the other way.
"""

import io
import json
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from vqgen.distributed import rank, world_size
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

    def write(self, folder: Path, tensors: Mapping[str, Tensor], then: Callable[[dict[str, str]], None]) -> None:
        """Copies the tensors, and writes the copies to a folder while the caller goes on.

        Args:
            folder: a new folder, which the main process has made, on a disk that all processes see.
            tensors: tensors by name. FSDP's are written by the processes that have them; of the others, which all
                processes have, each writes a share.
            then: called on the main process, in the background, when all processes have written; it gets the SHA-256
                of each file by its name.
        """
        self.wait()
        self._folder = folder
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=SLOW)
        warnings.filterwarnings("ignore", ALONE)
        writer = _Writer(folder, then)
        writing = dcp.async_save(my_share(tensors), storage_writer=writer, process_group=self._group)
        assert isinstance(writing, Future)
        self._writing = writing

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
            OSError: a process could not write; so does each of the others.
        """
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.exception()
        if isinstance(error, CheckpointException):
            if rank() == 0:
                shutil.rmtree(self._folder, ignore_errors=True)  # it may have filled the disk
            error = next(iter(error.failures.values()))[0]
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits until all is written, and ends the processes' group."""
        self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


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
    """A file system that keeps the SHA-256 of each file that is written, and makes no folders."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}  # by the file's name

    def mkdir(self, path: Any) -> None:
        """Does nothing: another process that makes the folder could disturb the main process, which prepares it."""

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
        self.then(sums)


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
        plain = plain or (module == "pathlib" and name.endswith("Path"))
        plain = plain or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        if not plain:
            raise RuntimeError(f"the metadata of its shards name {module}.{name}")
        return super().find_class(module, name)
