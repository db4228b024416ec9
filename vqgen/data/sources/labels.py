"""Labels of images from tables such as labels.csv, which name the images."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vqgen.data.formats import EXTENSIONS
from vqgen.data.skipped import one_line
from vqgen.data.sources.rows import FILE_COLUMNS, FILE_NAME, rows_of
from vqgen.data.sources.splits import HELD_OUT, TRAIN, split_word
from vqgen.errors import InputError

LABEL_FILES = re.compile(r"_*(labels?|metadata|annotations?|classes)\.(csv|tsv|jsonl|json|txt)", re.IGNORECASE)
# Words in the names of tables beside that for a part: train.csv, val_labels.csv, test_list.txt.
TABLE_WORDS = re.compile(r"(labels?|annotations?|metadata|list|files?|names?)?", re.IGNORECASE)
TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".json")
NO_LABELS = re.compile(
    r".*submission.*|(classes|class_names)\.(json|txt)|package(-lock)?\.json|readme.*|licen[sc]e.*", re.IGNORECASE
)
# Names of what may hold labels in a form that is not read.
LIKE_LABELS = re.compile(
    r".*(label|annot|metadata|categor|caption|bbox|ground_?truth|list_attr|split).*|devkit|imagesets", re.IGNORECASE
)
DATA_FILES = (
    *(*TABLES, ".mat", ".xml", ".xls", ".xlsx", ".yaml", ".yml", ".gz", ".pkl", ".pickle", ".h5", ".npy", ".npz"),
    *(".parquet", ".pq", ".arrow", ".feather"),
)
SPLIT_TABLES = re.compile(r"(^|[\W_])(splits?|partitions?)[\W_]", re.IGNORECASE)  # in names of tables without a header
MAX_TABLES = 50
CLASS_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "cls", "class_id", "label_name", "y")
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "usage")
PART_NUMBERS = {"0": "train", "1": "val", "2": "test"}  # CelebA's
MAX_TABLE_BYTES = 1 << 30


@dataclass
class Labels:
    """What label files say about images.

    Attributes:
        by_row: label of an image, by its index.
        parts: `train` or a word for held-out images, by the image's index, if a file divides the images.
        part_files: paths of the files that do.
        used: paths of the files that were used.
        notes: what was used, and what was found and not used.
        side: the extension of the files beside the images that were used, and the key in those files if it is .json.
    """

    by_row: dict[int, str] = field(default_factory=dict)
    parts: dict[int, str] = field(default_factory=dict)
    part_files: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    side: tuple[str, str | None] = ("", None)


def as_label(value: Any) -> str | None:
    """A class's name from a value in a file: numbers that are whole lose their point, empty values are no label.

    Nor is NaN, which pandas writes for nothing.
    """
    if value is None or isinstance(value, dict | list) or value != value:
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
    folders: Container[str],
    kept: Iterable[int],
) -> Labels:
    """The labels in tables beside the images: labels.csv, metadata.jsonl, train.txt, or any that name the images.

    Args:
        images: paths of the images.
        others: paths of the other files.
        read: reads a file.
        column: the column that the user names.
        kept: indices of the images that are in a part.
        folders: the classes by the images' folders; if there are any, a table needs a clear column to replace them.

    Raises:
        InputError: two files disagree, a file names an image that is not there, or has no such column.
    """
    labels = Labels()
    tables = _tables(images, others)
    references = References(images, kept) if tables else None
    givers: dict[int, str] = {}
    columns_seen: dict[str, None] = {}
    unused: list[str] = []
    unread = [path for path in others if path not in tables]
    for path in tables:
        rows = _read_rows(path, read, labels)
        table = _match(path, rows, references, folders, [*others, *images]) if rows and references is not None else None
        if table is None:
            (unread if path.lower().endswith(".txt") and not is_label_file(path) else unused).append(path)
            continue
        columns_seen |= dict.fromkeys(table.others)
        if column is None:
            table = _without_one_hot(table, labels)
        _take_parts(table, labels)
        chosen = _class_column(table, column, folders, labels)
        if chosen is None:
            continue
        labels.used.add(path)
        for index, row in table.rows:
            label = as_label(row.get(chosen))
            if label is not None and labels.by_row.setdefault(index, label) != label:
                raise InputError(_disagreement(givers[index], path, images[index], labels.by_row[index], label))
            if label is not None:
                givers.setdefault(index, path)
    if column is not None and not columns_seen:  # held-out images in another source need no labels
        labels.notes.append(f"label_column={one_line(column)}: not used, as no label file names the images")
    elif column is not None and column not in columns_seen:
        raise InputError(f"label_column={column} is in no label file; the columns are {shown_columns([*columns_seen])}")
    if unused:
        labels.notes.append(
            f"{some_names(unused)}: not used, as {'it names' if len(unused) == 1 else 'they name'} none of the images"
        )
    labels.notes += _perhaps_labels(unread)
    return labels


def _tables(images: Sequence[str], others: Sequence[str]) -> list[str]:
    """The paths of what may be tables of labels; with very many, only of those that are called so.

    A file that is called like an image is about that image, such as labels/0001.txt with its boxes.
    """
    tables = [path for path in others if path.lower().endswith(TABLES) and not NO_LABELS.fullmatch(_name(path))]
    about_one = {_name(image).rpartition(".")[0] for image in images} if tables else set()
    tables = sorted(path for path in tables if _name(path).rpartition(".")[0] not in about_one)
    return tables if len(tables) <= MAX_TABLES else [path for path in tables if is_label_file(path)]


def is_label_file(path: str) -> bool:
    """Whether a file has a name that people give to label files: labels.csv, metadata.jsonl, train.txt ..."""
    return bool(LABEL_FILES.fullmatch(_name(path))) or _part_of(path) is not None


def _part_of(path: str) -> str | None:
    """The word for a part in the name of a table: train.csv, test_labels.csv, trainLabels.csv ..."""
    found = split_word(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _name(path).rpartition(".")[0]))
    return found[0] if found is not None and TABLE_WORDS.fullmatch(found[1]) else None


def _disagreement(giver: str, path: str, image: str, label: str, other: str) -> str:
    both = f"{one_line(label)} and {one_line(other)}"
    if giver == path:
        return f"{one_line(path)} has {both} for {one_line(image)}; leave one, or give data.label_column="
    return (
        f"{one_line(giver)} and {one_line(path)} disagree: {one_line(image)} is {one_line(label)} in one and "
        f"{one_line(other)} in the other; remove one of them"
    )


def _perhaps_labels(others: Sequence[str]) -> list[str]:
    """One line that names files which are not read, but are called as if they held labels."""
    found: Counter[str] = Counter()
    for path in others:
        folders = path.split("/")[:-1]
        depth = next((i for i, name in enumerate(folders) if LIKE_LABELS.fullmatch(name)), None)
        if depth is not None:
            found["/".join(folders[: depth + 1]) + "/"] += 1
        elif path.lower().endswith(DATA_FILES) and LIKE_LABELS.fullmatch(_name(path)):
            found[path] += 1
    if not found:
        return []
    return [f"{some_names(sorted(found))}: not used; perhaps labels, but no table that names the images"]


def some_names(names: Sequence[str]) -> str:
    """Up to three names, and how many more there are."""
    shown = ", ".join(one_line(name) for name in names[:3])
    return f"{shown} and {len(names) - 3:,} more" if len(names) > 3 else shown


@dataclass
class _Table:
    path: str
    rows: list[tuple[int, Mapping[str, Any]]]  # index of the image, and its row
    others: list[str]  # columns beside the file's name


class References:
    """Finds images by what tables call them.

    That is a path from the table's folder or one around it; or else, as tables come from other machines, the name,
    with as many of the folders before it as are needed to tell images of the same name apart. The extension may be
    missing, or that of the images before they were converted.

    Args:
        images: paths of the images.
        kept: indices of those that a table may mean.
    """

    MISSING, SEVERAL = -1, -2

    def __init__(self, images: Sequence[str], kept: Iterable[int]):
        self.images = images
        self.paths: dict[str, int] = {}
        self.first: dict[str, int] = {}  # by name
        self.more: dict[str, list[int]] = {}  # all images of a name that several have
        for index in kept:
            path = images[index]
            stem = path.rpartition(".")[0]
            self.paths[path] = index
            self.paths[stem] = self.SEVERAL if stem in self.paths else index
            for name in {_name(path), _name(stem)}:
                if name in self.first:
                    self.more.setdefault(name, [self.first[name]]).append(index)
                self.first.setdefault(name, index)

    def find(self, text: str, table: str) -> int:
        """The index of the image that a table means; MISSING if there is none, SEVERAL if it may be any of several."""
        text = text.strip().replace("\\", "/").removeprefix("./")
        found = self._find(text, table)
        other_extension = found == self.MISSING and text.lower().endswith(EXTENSIONS)
        return self._find(text.rpartition(".")[0], table) if other_extension else found

    def _find(self, text: str, table: str) -> int:
        folder = table.rpartition("/")[0]
        while folder or text in self.paths:
            found = self.paths.get(f"{folder}/{text}" if folder else text)
            if found is not None:
                return found
            folder = folder.rpartition("/")[0]
        *folders, name = text.split("/")
        for start in range(1, len(folders)):  # before the search among all of a name, which may be thousands
            if (found := self.paths.get("/".join([*folders[start:], name]))) is not None:
                return found
        if name not in self.more:
            return self.first.get(name, self.MISSING)
        candidates = self.more[name]
        for depth, wanted in enumerate(reversed(folders), 2):
            candidates = [i for i in candidates if self._folder(i, depth) == wanted] or candidates
        if (part := _part_of(table)) is not None:
            candidates = [i for i in candidates if part in self._parts(i)] or candidates
        return candidates[0] if len(candidates) == 1 else self.SEVERAL

    def _folder(self, index: int, depth: int) -> str:
        names = self.images[index].split("/")
        return names[-depth] if depth <= len(names) else ""

    def _parts(self, index: int) -> list[str]:
        return [found[0] for name in self.images[index].split("/")[:-1] if (found := split_word(name)) is not None]


def _match(
    path: str,
    rows: Sequence[Mapping[str, Any]],
    references: References,
    classes: Container[str],
    others: Sequence[str],
) -> _Table | None:
    """Finds the column that names images, and the image of each row; None if most rows name none.

    Numbers may name both classes and images, such as 0/ and 0.png; a table of nothing but classes is about these.

    Raises:
        InputError: rows name images that are not there, or one of several.
    """
    columns = list(dict.fromkeys(name for row in rows[:100] for name in row if name))  # pandas' index has no name
    probe = rows[:: max(1, len(rows) // 200)]
    found = {c: [references.find(str(row[c]), path) for row in probe if row.get(c) is not None] for c in columns}
    hits = {c: sum(index != References.MISSING for index in indices) for c, indices in found.items()}
    known = {name: -rank for rank, name in enumerate(FILE_COLUMNS)}

    def fitness(column: str) -> tuple[bool, int, int]:  # labels that are numbers may be names of images as well
        is_known = column.lower() in known and hits[column] >= len(probe) / 2
        return is_known, hits[column], known.get(column.lower(), -len(known))

    best = max((c for c in columns if c.lower() not in CLASS_COLUMNS), key=fitness, default=None)
    named = next((c for name in FILE_COLUMNS[:4] for c in columns if c.lower() == name), None)
    label_file = is_label_file(path)
    if best is not None and not hits[best]:
        names_files = named is not None and any(FILE_NAME.fullmatch(str(row.get(named))) for row in probe)
        best = named if label_file and names_files else None
    if best is None or not (label_file or sum(index >= 0 for index in found[best]) > len(probe) / 2):
        return None
    if all(str(row.get(best)) in classes for row in probe):
        return None
    named_rows = [row for row in rows if as_label(row.get(best)) is not None]  # and no line of sums, for example
    taken = [(references.find(str(row[best]), path), row) for row in named_rows]
    _check_references(path, [(index, str(row.get(best))) for index, row in taken], label_file, others)
    return _Table(path, [(index, row) for index, row in taken if index >= 0], [c for c in columns if c != best])


def _check_references(path: str, taken: Sequence[tuple[int, str]], label_file: bool, others: Sequence[str]) -> None:
    unread = {name for other in others for name in (_name(other), _name(other).rpartition(".")[0])}
    missing = [text for index, text in taken if index == References.MISSING and _name(text) not in unread]
    if missing and label_file:
        images = "an image that is" if len(missing) == 1 else f"{len(missing):,} images that are"
        raise InputError(
            f"{one_line(path)} names {images} not there, first {one_line(missing[0])}; "
            "fetch what is missing, or remove its lines"
        )
    several = [text for index, text in taken if index == References.SEVERAL]
    if several:
        raise InputError(
            f"{one_line(path)} names {one_line(several[0])}, which is the name of several images; write their paths"
        )


def _without_one_hot(table: _Table, labels: Labels) -> _Table:
    """The table with one column `class` for columns that are 0 but for a single 1 in each row."""
    columns = [c for c in table.others if c.lower() not in SPLIT_COLUMNS]
    values = [[as_label(row.get(c)) for c in columns] for _, row in table.rows]
    if len(columns) < 2 or not all(sorted(map(str, row)) == ["0"] * (len(columns) - 1) + ["1"] for row in values):
        return table
    labels.notes.append(f"{one_line(table.path)}: its columns of 0 and 1 are the classes: {some_names(columns)}")
    names = [columns[row.index("1")] for row in values]
    rows: list[tuple[int, Mapping[str, Any]]] = [
        (i, {**row, "class": name}) for (i, row), name in zip(table.rows, names, strict=True)
    ]
    return _Table(table.path, rows, [*(c for c in table.others if c not in columns), "class"])


def _class_column(table: _Table, column: str | None, folders: Container[str], labels: Labels) -> str | None:
    """The column that is the class; None, with a note, if no column clearly is."""
    parts = _split_column(table)
    path, others = one_line(table.path), [c for c in table.others if c.lower() not in SPLIT_COLUMNS and c != parts]
    if column is not None:
        if column in others:
            labels.notes.append(f"{path}: the class is its column {one_line(column)} (data.label_column)")
            return column
        return None
    values = {c: [row.get(c) for _, row in table.rows] for c in others}
    clear = [c for name in CLASS_COLUMNS for c in others if c.lower().rpartition(".")[2] == name]
    clear = clear or [c for c in others if folders and values[c] and all(as_label(v) in folders for v in values[c])]
    usable = [c for c in clear or ([] if folders else others) if are_classes(values[c])]
    if usable and (clear or len(others) == 1):
        rest = [one_line(c) for c in others if c != usable[0]]
        more = f"; not used: {some_names(rest)} (data.label_column=)" if rest else ""
        labels.notes.append(f"{path}: the class is its column {one_line(usable[0])}{more}")
        return usable[0]
    if others:
        labels.notes.append(f"{path}: not used for classes; data.label_column= takes one of {shown_columns(others)}")
    elif table.path not in labels.used and (is_label_file(table.path) or not table.path.lower().endswith(".txt")):
        labels.notes.append(f"{path}: no column beside the images' names, so no classes from it")
    return None


def shown_columns(columns: Sequence[str]) -> str:
    """Up to twelve columns' names, and how many more there are."""
    shown = ", ".join(one_line(c) for c in columns[:12])
    return f"{shown} and {len(columns) - 12:,} more" if len(columns) > 12 else shown


def are_classes(values: Iterable[Any]) -> bool:
    """Whether values look like classes: they repeat, and are no fractions."""
    found = [label for value in values if (label := as_label(value)) is not None]
    distinct = set(found)
    if not found or any(re.fullmatch(r"[+-]?\d*\.\d+(e[+-]?\d+)?", label) for label in distinct):
        return False
    return len(found) < 10 or len(distinct) <= len(found) / 2


def _split_column(table: _Table) -> str | None:
    """The column that says each image's part, by its own name or the table's, such as list_eval_partition.txt."""
    named = [c for c in table.others if c.lower() in SPLIT_COLUMNS]
    if not named and len(table.others) == 1 and _part_of(table.path) is None:
        named = table.others if SPLIT_TABLES.search(_name(table.path)) else []
    return named[0] if named else None


def _take_parts(table: _Table, labels: Labels) -> None:
    """Takes the images' parts from a column called split, or from a table called train.csv, val.txt and so on."""
    path = one_line(table.path)
    column = _split_column(table)
    words: dict[int, str | None] = {}
    if column is not None:
        values = {index: as_label(row.get(column)) or "" for index, row in table.rows}
        numbered = set(values.values()) == PART_NUMBERS.keys()
        named = {v: PART_NUMBERS[v] if numbered else (split_word(v) or (None,))[0] for v in set(values.values())}
        words = {index: named[value] for index, value in values.items()}
        if None in words.values():
            labels.notes.append(f"{path}: its column {one_line(column)} is not used, as it does not say train and val")
            return
        numbers = ", taken as 0 train, 1 val, 2 test" if numbered else ""
        labels.notes.append(f"{path}: the parts are its column {one_line(column)}{numbers}")
    elif (part := _part_of(table.path)) is not None:
        words = {index: part for index, _ in table.rows}
    if words:
        labels.used.add(table.path)
        labels.part_files.append(table.path)
    for index, word in words.items():
        if word is not None:
            labels.parts.setdefault(index, word)


def _read_rows(path: str, read: Callable[[str], bytes], labels: Labels) -> list[dict[str, Any]]:
    """The rows of a file; none if it is no table.

    Raises:
        InputError: the file is damaged.
    """
    content = read(path)
    if len(content) > MAX_TABLE_BYTES:
        raise InputError(f"{one_line(path)}: {len(content) / 2**30:,.1f} GiB, too large for a label file")
    try:
        rows, assumed = rows_of(path, content)
    except (ValueError, csv.Error, RecursionError) as error:
        if LABEL_FILES.fullmatch(_name(path)):
            raise InputError(f"{one_line(path)} cannot be read ({one_line(str(error)[:100])}); repair it") from error
        return []
    if assumed and is_label_file(path):
        labels.notes.append(f"{one_line(path)}: {assumed}")
    return rows


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def part_words(words: Mapping[int, str]) -> tuple[str | None, str | None]:
    """The word for the part to train on and the word for the held-out part, among those that label files use."""
    used = Counter(words.values())
    train = next((word for word in TRAIN if word in used), None)
    return train, next((word for word in HELD_OUT if word in used), None)
