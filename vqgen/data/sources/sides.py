"""Labels of images from a file beside each, such as 0001.cls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vqgen.data.skipped import one_line
from vqgen.data.sources.labels import CLASS_COLUMNS, Labels, are_classes, as_label, shown_columns
from vqgen.data.sources.rows import flat as flattened
from vqgen.errors import InputError

MAX_LABEL_BYTES = 1 << 20


def read_side_files(
    images: Sequence[str],
    keys: Sequence[str],
    sides: Mapping[str, Mapping[str, str]],
    read: Callable[[str], bytes],
    *,
    key: str | None,
) -> Labels:
    """The labels in files beside each image: .cls, or a key of .json; .txt only if the user asks for it.

    Args:
        images: paths of the images.
        keys: each image's path without what differs between it and the files beside it.
        sides: for each of .cls, .json and .txt, the paths of such files by their key.
        read: reads a file.
        key: the key in .json that the user names, or `txt` or `cls`.

    Raises:
        InputError: no file has the key.
    """
    labels = Labels()
    found = {extension: [paths.get(one) for one in keys] for extension, paths in sides.items()}
    present = [extension for extension in (".cls", ".json", ".txt") if any(found.get(extension, []))]
    asked = f".{key}" if key in ("cls", "txt") else ".json" if key is not None else None
    if asked is not None and asked not in present:
        raise InputError(f"label_key={key}: no {asked} file lies beside an image; leave label_key out")
    for extension in [asked] if asked else [e for e in present if e != ".txt"]:
        taken = _take_side_files(labels, images, found[extension], read, extension, key)
        if taken:
            break
    for extension in present:
        if not any(path.lower().endswith(extension) for path in labels.used):
            count = sum(path is not None for path in found[extension])
            hint = "; data.label_key=txt takes them as classes" if extension == ".txt" else ""
            if not any(note.startswith(f"{extension}:") for note in labels.notes):
                labels.notes.append(f"{extension}: {count:,} files beside the images, not used{hint}")
    return labels


def side_label(content: bytes, key: str | None) -> str | None:
    """The label in a file beside an image; in the key of a .json."""
    value: Any = content.decode("utf-8", "replace")
    if key is not None:
        fields = json.loads(value)
        value = (flattened(fields) if isinstance(fields, dict) else {"label": fields}).get(key)
    return _label(value)


def _label(value: Any) -> str | None:
    label = as_label(value)
    return None if label == "-1" else label  # WebDataset has no other way to say that an image has no class


def _take_side_files(
    labels: Labels,
    images: Sequence[str],
    paths: Sequence[str | None],
    read: Callable[[str], bytes],
    extension: str,
    key: str | None,
) -> bool:
    """Reads one kind of files into the labels; returns whether they have classes."""
    chosen = key if extension == ".json" else None
    by_row: dict[int, str] = {}
    for row, path in enumerate(paths):
        if path is None:
            continue
        content = read(path)
        if len(content) > MAX_LABEL_BYTES:
            raise InputError(f"{one_line(path)}: {len(content):,} bytes, too large for a label; remove it")
        value: Any = content.decode("utf-8", "replace")
        if extension == ".json":
            try:
                fields = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{one_line(path)} cannot be read ({error}); repair or remove it") from error
            flat = flattened(fields) if isinstance(fields, dict) else {"label": fields}
            if chosen is None:
                chosen = next((k for name in CLASS_COLUMNS for k in flat if k.lower() == name), None)
                if chosen is None or not isinstance(flat[chosen], int | str):
                    known = shown_columns([*flat])
                    count = sum(path is not None for path in paths)
                    labels.notes.append(f".json: {count:,} files, not used; data.label_key= takes one of {known}")
                    return False
            elif key is not None and not by_row and chosen not in flat:
                raise InputError(f"label_key={key} is not in {one_line(path)}; its keys are {shown_columns([*flat])}")
            value = flat.get(chosen)
        label = _label(value)
        if label is not None and extension != ".json" and re.search(r"[\n\r\0]", label):
            raise InputError(f"{one_line(path)} holds {label[:20]!r}, which is no class; make it a number or a name")
        if label is not None:
            by_row[row] = label
    if key is None and extension != ".cls" and not are_classes(by_row.values()):
        distinct = len(set(by_row.values()))
        labels.notes.append(
            f"{extension}: not used, as its {distinct:,} values hardly repeat; data.label_key={chosen or extension[1:]}"
        )
        return False
    if not by_row:
        return False
    labels.by_row |= by_row
    labels.side = extension, chosen
    labels.used |= {path for path in paths if path is not None}
    what = f"key {chosen} of the .json files" if extension == ".json" else f"{extension} files"
    labels.notes.append(f"the class is in the {what} beside the images")
    return True
