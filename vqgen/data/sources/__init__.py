"""Sources of images; each kind has its own file.

A new kind of source is its file, an entry in `SOURCES` and a test.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vqgen.data.skipped import reason
from vqgen.data.sources.archive import open_archives
from vqgen.data.sources.arrays import open_digits, open_idx, open_npz
from vqgen.data.sources.base import Found, NoImages, Source
from vqgen.data.sources.folder import open_folder
from vqgen.data.sources.hub import open_hub
from vqgen.data.sources.parquet import open_parquet
from vqgen.data.sources.remote import is_remote, local_copy
from vqgen.data.sources.saved import open_saved
from vqgen.data.sources.tree import describe_file
from vqgen.errors import InputError
from vqgen.settings import DataConfig

__all__ = ["SOURCES", "Found", "Source", "open_source"]

# Each function takes the source as the user wrote it, the same as a path with ~ expanded, and the settings; it returns
# None for a source of another kind. The first function that returns images wins: `digits` may also be a folder, and IDX
# files lie in one.
SOURCES: dict[str, Callable[[str, Path, DataConfig], Found | None]] = {
    "digits": open_digits,
    "idx": open_idx,
    "hub": open_hub,
    "saved": open_saved,
    "parquet": open_parquet,
    "folder": open_folder,
    "npz": open_npz,
    "archives": open_archives,
}
REMEDY = "give a folder of images, a tar, zip, parquet, .npz or .npy, a pattern of these, hf:NAME, or digits"


def open_source(key: str, source: str | Path, data: DataConfig) -> Found:
    """Opens images of any kind.

    All processes must call it at the same point, because the main process lists some sources for all.

    Args:
        key: the setting's name in messages.
        source: the setting's value, such as a path or an address.
        data: the settings that say how to read it.

    Raises:
        InputError: there is no such source, or it cannot be read.
    """
    if not str(source):  # of a shell's unset variable; as a path, it would be the current folder
        raise InputError(f"{key}= is empty; {REMEDY}")
    try:
        local, notes = local_copy(str(source)) if is_remote(str(source)) else (str(source), [])
        path = Path(local).expanduser()
        problem = NoImages(describe_file(path) if path.is_file() else "no such file or folder")
        for open_kind in SOURCES.values():
            try:
                if (found := open_kind(local, path, data)) is not None:
                    return replace(found, notes=[*notes, *found.notes])
            except NoImages as error:  # a folder may hold no image, but archives
                problem = error
        raise problem
    except NoImages as error:
        raise InputError(f"{key}={source}: {error}; {REMEDY}") from error
    except InputError as error:
        raise InputError(f"{key}={source}: {error}") from error
    except (OSError, RuntimeError) as error:  # a path without permission or too long, or ~ of an unknown user
        raise InputError(f"{key}={source}: {reason(error)}") from error
