"""Data sets by their name on the Hugging Face Hub, through its package `datasets`: hf:NAME or hf:NAME:SPLIT."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vqgen.data.skipped import one_line, reason
from vqgen.data.sources.base import Found
from vqgen.data.sources.labels import as_label
from vqgen.distributed import computed_by_main
from vqgen.errors import InputError, need
from vqgen.settings import DataConfig

PREFIX = "hf:"
ROWS_AT_ONCE = 16
TIMEOUT = 10.0  # seconds until the Hub counts as unreachable
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class Address(NamedTuple):
    """What a source such as hf:USER/NAME/CONFIG:SPLIT names.

    Attributes:
        name: the data set's name on the Hub, or a folder.
        config: one of the data set's configurations; None for the only one.
        split: one of its splits; None for all.
    """

    name: str
    config: str | None
    split: str | None

    @property
    def is_local(self) -> bool:
        return os.path.exists(self.name)


class _Rows(NamedTuple):
    """The Arrow files of a data set: the files of each split, and the columns' meaning."""

    files: dict[str, list[str]]
    features: dict[str, Any]


def open_hub(source: str, path: Path, data: DataConfig) -> Found | None:
    """The images of a data set of the Hub, which `datasets` downloads once and keeps in its own cache.

    Raises:
        InputError: the Hub does not answer and the cache has no copy, the data set needs a login, there is no such data
            set, configuration or split, or it has no images.
    """
    address = parse(source)
    if address is None:
        return None
    need("datasets", "datasets", f"a data set {source}")
    need("pyarrow", "datasets", f"a data set {source}")
    from vqgen.data.sources.arrow import num_rows
    from vqgen.data.sources.tables import Split, Table, open_tables

    found = computed_by_main(lambda: _download(address))
    if not all(os.path.exists(file) for files in found.files.values() for file in files):
        found = _download(address)  # this machine has another cache than the main process's
    splits = {}
    for name, files in found.files.items():
        tables, first_row = [], 0
        for file in files:
            tables.append(Table(Path(file), f"{name}/", first_row))
            first_row += num_rows(Path(file))
        splits[name] = Split(tables)
    remedy = f"give {PREFIX}{address.name}:{next(iter(splits))}, for example"
    return open_tables(splits, data, remedy=remedy, features=found.features, explicit=address.split is not None)


def parse(source: str) -> Address | None:
    """What a source names; None if it is no data set of the Hub.

    Raises:
        InputError: the name or the split is no name.
    """
    if not source.startswith(PREFIX) or source.startswith("hf://"):
        return None
    name, _, split = source.removeprefix(PREFIX).partition(":")
    if not re.fullmatch(r"\w[\w.-]*|", split):
        raise InputError(
            f"{split} is not the name of one split; give one such as train, and data.max_images= for a part"
        )
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return Address(folder, None, split or None)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){0,2}", name):
        shown = one_line(name) or "nothing"
        raise InputError(f"{shown} is neither a folder nor a name on the Hub; give {PREFIX}NAME or {PREFIX}USER/NAME")
    user_and_name, config = "/".join(name.split("/")[:2]), name.split("/")[2:]
    return Address(user_and_name, config[0] if config else None, split or None)


class HubShard:
    """A part of a data set of the Hub, read from its beginning without fetching the whole data set first.

    Args:
        rows: the rows, an `IterableDataset`.
        name: the part's name.
        image: the column with the images.
        label: the column with the classes; None if there is none.
        version: what changes with the content.
    """

    size = None  # in bytes; unknown

    def __init__(self, rows: Any, name: str, image: str, label: str | None, version: str):
        self._rows, self.name, self._image, self._label, self._version = rows, name, image, label, version

    def head(self, num_bytes: int) -> bytes:
        """What changes with the content, in place of the first bytes."""
        return self._version.encode()[:num_bytes]

    def rows(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None, str | None]]:
        """Name, file and label of each image, always in the same order; a row without an image is passed over.

        Args:
            wanted: whether an image is wanted, by its name; the file of one that is not is None.

        Raises:
            InputError: the Hub does not answer any more.
        """
        with _hub_errors(self.name):
            # Its own iterator would give each worker of a DataLoader only some of the rows.
            batches = self._rows.iter(batch_size=ROWS_AT_ONCE)
            images = (pair for batch in batches for pair in zip(batch[self._image], self._labels(batch), strict=True))
            for number, (value, label) in enumerate(images):
                content = value.get("bytes") if isinstance(value, dict) else value
                path = value.get("path") if isinstance(value, dict) else None
                if content is None and not path:
                    continue
                name = f"{self.name}/{number}"
                is_wanted = wanted(name)
                if content is None and path and is_wanted:
                    content = Path(path).read_bytes()
                yield name, content if is_wanted else None, as_label(label)

    def _labels(self, batch: Mapping[str, list[Any]]) -> list[Any]:
        return batch[self._label] if self._label is not None else [None] * len(batch[self._image])


def hub_shards(source: str, data: DataConfig) -> tuple[list[HubShard], Mapping[str, str], list[str]]:
    """The parts of a data set of the Hub that is to be streamed, the names of classes that are numbers, and notes.

    Args:
        source: as in `data.source=hf:NAME:SPLIT`; without a split, it is `train`.
        data: the settings, of which `image_column` and `label_column` matter.

    Raises:
        InputError: as of `open_hub`.
    """
    datasets = need("datasets", "datasets", f"a data set {source}")
    need("pyarrow", "datasets", f"a data set {source}")
    from vqgen.data.sources.tables import stream_columns

    address = parse(source)
    if address is None:
        raise InputError(f"{source} is no data set of the Hub; give {PREFIX}NAME")
    split = address.split or "train"
    with _hub_errors(address.name), _quiet(datasets):
        if not address.is_local and not _answers(address):
            raise InputError(f"the Hub cannot be reached, so {address.name} cannot be streamed; connect to the network")
        builder = datasets.load_dataset_builder(address.name, address.config)
        rows = builder.as_streaming_dataset(split=split)
        features = rows._resolve_features().features
    image, label, names, notes = stream_columns(features.arrow_schema, features.to_dict(), data)
    rows = rows.select_columns([image, *([label] if label is not None else [])])
    if isinstance(features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    count = rows.num_shards
    shards = [
        HubShard(rows.shard(count, i), f"{split}-{i:05}-of-{count:05}", image, label, f"{builder.hash} {i}")
        for i in range(count)
    ]
    return shards, names, notes


def _download(address: Address) -> _Rows:
    """Makes `datasets` download and prepare a data set, or find it in its cache.

    Raises:
        InputError: this is not possible; see `open_hub`.
    """
    datasets = need("datasets", "datasets", "a data set of the Hub")
    with _hub_errors(address.name), contextlib.ExitStack() as stack:
        stack.enter_context(_quiet(datasets))
        if not address.is_local and not _answers(address):
            stack.enter_context(_offline(datasets))
        loaded = datasets.load_dataset(address.name, address.config, split=address.split, keep_in_memory=False)
    splits = {address.split: loaded} if address.split is not None else dict(loaded)
    files = {name: [file["filename"] for file in split.cache_files] for name, split in splits.items()}
    features = next(iter(splits.values())).features.to_dict()
    return _Rows({str(name): found for name, found in files.items()}, features)


def _answers(address: Address) -> bool:
    """Whether the Hub answers; asks once, because `datasets` itself tries for half a minute.

    Raises:
        InputError: it answers that there is no such data set, or that it needs a login.
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(address.name, timeout=TIMEOUT)
    except errors.RepositoryNotFoundError as error:
        raise InputError(_not_found(address.name, gated=isinstance(error, errors.GatedRepoError))) from error
    except errors.HFValidationError as error:
        raise InputError(f"{address.name} is no name on the Hub; give {PREFIX}NAME or {PREFIX}USER/NAME") from error
    except (errors.HTTPError, OSError):  # no network, offline mode, or a Hub that is out of order
        return False
    return True


def _not_found(name: str, gated: bool) -> str:
    if gated:
        page = f"https://huggingface.co/datasets/{name}"
        return f"{name} needs a permission; ask for it at {page}, then {LOGIN}"
    return f"the Hub has no data set {name} that you may read; check its name and, if it is private, {LOGIN}"


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turns the errors of `datasets` that its user can correct into an InputError of one line."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors

    try:
        yield
    except InputError:
        raise
    except DatasetNotFoundError as error:
        raise InputError(_not_found(name, gated="gated" in str(error))) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise InputError(_not_found(name, gated=isinstance(error, errors.GatedRepoError))) from error
        raise InputError(f"{name}: the Hub answers {status or reason(error)}; try again later") from error
    except (ConnectionError, errors.HTTPError) as error:
        cache = datasets.config.HF_DATASETS_CACHE
        raise InputError(
            f"{name} is not in the cache {cache}, and the Hub cannot be reached; connect to the network, "
            "or load it once where there is one and copy that cache"
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{name}: {_first_words(error)}") from error


def _first_words(error: BaseException) -> str:
    """What `datasets` says is wrong, without the example of its own code that may follow."""
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    text = text.partition(" Example of usage")[0]
    if match := re.search(r"available configs: \[(.*?)\]", text):
        return f"has several configurations; name one of them behind it, as in {PREFIX}USER/NAME/CONFIG: {match[1]}"
    return one_line(text)[:300]


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Makes `datasets` look into its cache only."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keeps the warnings of `datasets` off the screen: what matters, vqgen says itself."""
    level, shows_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shows_bars:
            datasets.enable_progress_bars()
