"""Labels of images: from label files such as labels.csv, and from files beside each image such as 0001.cls."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vqgen.data.skipped import one_line
from vqgen.data.sources.splits import HELD_OUT, TRAIN, split_word
from vqgen.errors import InputError

LABEL_FILES = re.compile(r"(labels?|metadata|annotations?|classes)\.(csv|tsv|jsonl|json)", re.IGNORECASE)
TABLES = (".csv", ".tsv", ".jsonl", ".json")
NO_LABELS = re.compile(r".*submission.*|classes\.json|package(-lock)?\.json", re.IGNORECASE)
FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "image",
    "image_path",
    "path",
    "filepath",
    "image_id",
    "image_name",
    "id",
)
CLASS_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "cls", "class_id", "label_name", "y")
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "usage")
MAX_TABLE_BYTES = 1 << 30
MAX_LABEL_BYTES = 1 << 20  # of a file beside an image


@dataclass
class Labels:
    """What label files say about images.

    Attributes:
        by_row: label of an image, by its index.
        parts: `train` or a word for held-out images, by the image's index, if a file divides the images.
        used: paths of the files that were used.
        notes: what was used, and what was found and not used.
        side: the extension of the files beside the images that were used, and the key in those files if it is .json.
    """

    by_row: dict[int, str] = field(default_factory=dict)
    parts: dict[int, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    side: tuple[str, str | None] = ("", None)


def side_label(content: bytes, key: str | None) -> str | None:
    """The label in a file beside an image; in the key of a .json."""
    value: Any = content.decode("utf-8", "replace")
    if key is not None:
        fields = json.loads(value)
        value = (_flat(fields) if isinstance(fields, dict) else {"label": fields}).get(key)
    label = as_label(value)
    return None if label == "-1" else label


def as_label(value: Any) -> str | None:
    """A class's name from a value in a file: numbers that are whole lose their point, empty values are no label."""
    if value is None or isinstance(value, dict | list):
        return None
    text = str(value).strip()
    if isinstance(value, bool | int):
        return str(int(value))
    if re.fullmatch(r"[+-]?\d+\.0*", text):
        text = text.partition(".")[0]
    return text.encode("utf-8", "backslashreplace").decode() or None


def read_label_files(
    images: Sequence[str],
    others: Sequence[str],
    read: Callable[[str], bytes],
    *,
    column: str | None,
    has_folders: bool,
) -> Labels:
    """The labels in tables beside the images: labels.csv, metadata.jsonl, or any that name the images.

    Args:
        images: paths of the images.
        others: paths of the other files.
        read: reads a file.
        column: the column that the user names.
        has_folders: whether folders already divide the images into classes; a table then needs a clear column.

    Raises:
        InputError: two files disagree, a file names an image that is not there, or has no such column.
    """
    labels = Labels()
    tables = sorted(p for p in others if p.lower().endswith(TABLES) and not NO_LABELS.fullmatch(_name(p)))
    stems = {str(PurePosixPath(image).with_suffix("")) for image in images} if len(tables) > 50 else set()
    tables = [table for table in tables if str(PurePosixPath(table).with_suffix("")) not in stems]
    if len(tables) > 50:
        tables = [table for table in tables if LABEL_FILES.fullmatch(_name(table))]
    references: dict[str, _References] = {}
    givers: dict[int, str] = {}
    columns_seen: dict[str, list[str]] = {}
    for path in tables:
        folder = path.rpartition("/")[0]
        rows = _read_table(path, read)
        if folder not in references:
            references[folder] = _References(images, folder)
        table = _match(path, rows, references[folder], others) if rows else None
        if table is None:
            labels.notes.append(f"{one_line(path)}: not used, as it names none of the images")
            continue
        columns_seen[path] = table.others
        _take_parts(table, labels)
        chosen = _class_column(table, column, has_folders, labels)
        if chosen is None:
            continue
        labels.used.add(path)
        for index, row in table.rows:
            label = as_label(row.get(chosen))
            if label is None:
                continue
            if labels.by_row.setdefault(index, label) != label:
                raise InputError(
                    f"{one_line(givers[index])} and {one_line(path)} disagree: {one_line(images[index])} is "
                    f"{one_line(labels.by_row[index])} in one and {one_line(label)} in the other; remove one of them"
                )
            givers.setdefault(index, path)
    if column is not None and columns_seen and not any(column in seen for seen in columns_seen.values()):
        known = ", ".join(dict.fromkeys(name for seen in columns_seen.values() for name in seen))
        raise InputError(
            f"label_column={column} is in no label file; the columns are {known or 'none but the file name'}"
        )
    return labels


@dataclass
class _Table:
    path: str
    rows: list[tuple[int, Mapping[str, Any]]]  # index of the image, and its row
    others: list[str]  # columns beside the file's name


class _References:
    """Finds images by what tables call them: a path from the table's folder, a name, or a name without extension."""

    def __init__(self, images: Sequence[str], folder: str):
        self.exact: dict[str, int] = {}
        self.names: dict[str, int] = {}
        self.stems: dict[str, int] = {}
        prefix = f"{folder}/" if folder else ""
        for index, path in enumerate(images):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :]
            name = inner.rpartition("/")[2]
            self.exact[inner] = index
            # A name that two images share says nothing, hence -1.
            self.names[name] = -1 if name in self.names else index
            for stem in {name.rpartition(".")[0], inner.rpartition(".")[0]}:
                self.stems[stem] = -1 if self.stems.get(stem, index) != index else index

    def find(self, text: str) -> int:
        """The image's index, -1 if there is none or several."""
        text = text.strip().replace("\\", "/").removeprefix("./")
        name = text.rpartition("/")[2]
        found = self.exact.get(text)
        if found is None:
            found = self.names.get(name, self.stems.get(text, self.stems.get(name, -1)))
        return found


def _match(
    path: str, rows: Sequence[Mapping[str, Any]], references: _References, others: Sequence[str]
) -> _Table | None:
    """Finds the column that names images, and the image of each row.

    Raises:
        InputError: rows name images that are not there.
    """
    columns = list(dict.fromkeys(name for row in rows[:100] for name in row))
    probe = rows[:: max(1, len(rows) // 200)]
    hits = {c: sum(references.find(str(row[c])) >= 0 for row in probe if row.get(c) is not None) for c in columns}
    known = {name: -rank for rank, name in enumerate(FILE_COLUMNS)}
    best = max(columns, key=lambda c: (hits[c], known.get(c.lower(), -len(known))), default=None)
    named = next((c for name in FILE_COLUMNS[:4] for c in columns if c.lower() == name), None)
    label_file = bool(LABEL_FILES.fullmatch(_name(path)) or split_word(_name(path).rpartition(".")[0]))
    if best is not None and not hits[best]:
        names_files = named is not None and any(re.search(r"\.\w{3,4}$", str(row.get(named))) for row in probe)
        best = named if label_file and names_files else None
    if best is None or not (label_file or hits[best] > len(probe) / 2):
        return None
    taken = [(references.find(str(row.get(best, ""))), row) for row in rows]
    unread = {other.rpartition("/")[2] for other in others}
    missing = [str(row.get(best)) for index, row in taken if index < 0 and _name(str(row.get(best))) not in unread]
    if missing and label_file:
        images = "an image that is" if len(missing) == 1 else f"{len(missing):,} images that are"
        raise InputError(
            f"{one_line(path)} names {images} not there, first {one_line(missing[0])}; "
            "fetch what is missing, or remove its lines"
        )
    return _Table(path, [(index, row) for index, row in taken if index >= 0], [c for c in columns if c != best])


def _class_column(table: _Table, column: str | None, has_folders: bool, labels: Labels) -> str | None:
    """The column that is the class; None, with a note, if no column clearly is."""
    path, others = one_line(table.path), [c for c in table.others if c.lower() not in SPLIT_COLUMNS]
    if column is not None:
        if column in others:
            labels.notes.append(f"{path}: the class is its column {one_line(column)} (data.label_column)")
            return column
        return None
    clear = [c for name in CLASS_COLUMNS for c in others if c.lower() == name]
    candidates = clear or ([] if has_folders else others)
    usable = [c for c in candidates if _are_classes([row.get(c) for _, row in table.rows])]
    shown = ", ".join(one_line(c) for c in others)
    if usable and (clear or len(others) == 1):
        rest = [one_line(c) for c in others if c != usable[0]]
        more = f"; not used: {', '.join(rest)} (data.label_column=)" if rest else ""
        labels.notes.append(f"{path}: the class is its column {one_line(usable[0])}{more}")
        return usable[0]
    if not others:
        labels.notes.append(f"{path}: no column beside the images' names, so no classes from it")
    else:
        labels.notes.append(f"{path}: not used for classes; data.label_column= takes one of {shown}")
    return None


def _are_classes(values: Iterable[Any]) -> bool:
    """Whether values look like classes: they repeat, and are no fractions."""
    found = [label for value in values if (label := as_label(value)) is not None]
    distinct = set(found)
    if not found or any(re.fullmatch(r"[+-]?\d*\.\d+(e[+-]?\d+)?", label) for label in distinct):
        return False
    return len(found) < 10 or len(distinct) <= len(found) / 2


def _take_parts(table: _Table, labels: Labels) -> None:
    """Takes the images' parts from a column called split, or from a table called train.csv, val.csv and so on."""
    column = next((c for c in table.others if c.lower() in SPLIT_COLUMNS), None)
    words: dict[int, str] = {}
    if column is not None:
        for index, row in table.rows:
            found = split_word(str(row.get(column)))
            if found is None:
                return
            words[index] = found[0]
        labels.notes.append(f"{one_line(table.path)}: the parts are its column {one_line(column)}")
    elif (found := split_word(_name(table.path).rpartition(".")[0])) is not None:
        words = {index: found[0] for index, _ in table.rows}
    for index, word in words.items():
        labels.parts.setdefault(index, word)


def _read_table(path: str, read: Callable[[str], bytes]) -> list[dict[str, Any]]:
    """The rows of a .csv, .tsv, .jsonl or .json file; empty if it is no table.

    Raises:
        InputError: the file is damaged.
    """
    content = read(path)
    if len(content) > MAX_TABLE_BYTES:
        raise InputError(f"{one_line(path)}: {len(content) / 2**30:,.1f} GiB, too large for a label file")
    text = content.decode("utf-8-sig", "replace")
    try:
        if path.lower().endswith(".jsonl"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return [_flat(row) for row in rows if isinstance(row, dict)]
        if path.lower().endswith(".json"):
            return _json_rows(json.loads(text))
        return _csv_rows(text)
    except (ValueError, csv.Error, RecursionError) as error:
        if LABEL_FILES.fullmatch(_name(path)):
            raise InputError(f"{one_line(path)} cannot be read ({one_line(str(error)[:100])}); repair it") from error
        return []


def _csv_rows(text: str) -> list[dict[str, Any]]:
    head = text[: 1 << 16]
    delimiter = max(",;\t|", key=lambda d: (head.partition("\n")[0].count(d), d == ","))
    lines = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    if len(lines) < 1:
        return []
    header = [cell.strip() for cell in lines[0]]
    # A first line that names a file is no header.
    if any(re.search(r"\.\w{3,4}$", cell) for cell in header):
        header, lines = [f"column {i + 1}" for i in range(len(header))], [[], *lines]
    return [dict(zip(header, row, strict=False)) for row in lines[1:]]


def _json_rows(content: Any) -> list[dict[str, Any]]:
    """Rows from the usual forms: a list of objects, {file: label}, or StyleGAN's {"labels": [[file, label], ...]}."""
    if isinstance(content, dict) and isinstance(content.get("labels"), list):
        content = content["labels"]
    if isinstance(content, dict):
        return [{"file_name": key, "label": value} for key, value in content.items() if as_label(value) is not None]
    if isinstance(content, list):
        pairs = [row for row in content if isinstance(row, list) and len(row) == 2]
        return [_flat(row) for row in content if isinstance(row, dict)] or [
            {"file_name": name, "label": label} for name, label in pairs
        ]
    return []


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An object whose inner objects' keys are written as outer.inner."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def part_words(words: Mapping[int, str]) -> tuple[str | None, str | None]:
    """The word for the part to train on and the word for the held-out part, among those that label files use."""
    used = Counter(words.values())
    train = next((word for word in TRAIN if word in used), None)
    return train, next((word for word in HELD_OUT if word in used), None)


# Files beside each image


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
        if not any(path.endswith(extension) for path in labels.used):
            count = sum(path is not None for path in found[extension])
            hint = "; data.label_key=txt takes them as classes" if extension == ".txt" else ""
            if not any(note.startswith(f"{extension}:") for note in labels.notes):
                labels.notes.append(f"{extension}: {count:,} files beside the images, not used{hint}")
    return labels


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
        text = content.decode("utf-8", "replace")
        value: Any = text
        if extension == ".json":
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{one_line(path)} cannot be read ({error}); repair or remove it") from error
            flat = _flat(fields) if isinstance(fields, dict) else {"label": fields}
            if chosen is None:
                chosen = next((k for name in CLASS_COLUMNS for k in flat if k.lower() == name), None)
                if chosen is None or not isinstance(flat[chosen], int | str):
                    known = ", ".join(one_line(k) for k in flat)
                    count = sum(path is not None for path in paths)
                    labels.notes.append(f".json: {count:,} files, not used; data.label_key= takes one of {known}")
                    return False
            elif key is not None and not by_row and chosen not in flat:
                raise InputError(f"label_key={key} is not in {one_line(path)}; its keys are {', '.join(flat)}")
            value = flat.get(chosen)
        label = as_label(value)
        if label == "-1":  # WebDataset has no other way to say that an image has no class
            continue
        if label is not None and extension != ".json" and re.search(r"[\n\r\0]", label):
            raise InputError(f"{one_line(path)} holds {label[:20]!r}, which is no class; make it a number or a name")
        if label is not None:
            by_row[row] = label
    if key is None and extension != ".cls" and not _are_classes(by_row.values()):
        distinct = len(set(by_row.values()))
        labels.notes.append(
            f"{extension}: not used, as its {distinct:,} values hardly repeat; data.label_key={chosen or extension[1:]}"
        )
        return False
    labels.by_row |= by_row
    labels.side = extension, chosen
    labels.used |= {path for path in paths if path is not None}
    what = f"key {chosen} of the .json files" if extension == ".json" else f"{extension} files"
    labels.notes.append(f"the class is in the {what} beside the images")
    return bool(by_row)
