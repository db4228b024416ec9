"""A tree of files, in a folder or in archives, read as images with parts and classes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from vqgen.data.formats import EXTENSIONS, plugin_hint
from vqgen.data.pixels import open_image
from vqgen.data.skipped import one_line, reason
from vqgen.data.sources.base import Found, NoImages
from vqgen.data.sources.index import Index, kept_index
from vqgen.data.sources.labels import TABLES, Labels, part_words, read_label_files, some_names
from vqgen.data.sources.layout import Layout, Part, find_layout
from vqgen.data.sources.sides import read_side_files
from vqgen.errors import InputError
from vqgen.settings import DataConfig

MAX_CLASSES = 1_000_000  # more labels are rather the images' own names
SIDES = (".cls", ".json", ".txt")
_ARRAYS = "save its arrays as .npz, such as images and labels"
PICKLE = re.compile(rb"\x80[\2-\5]")  # how files of Python's pickles begin
HINTS = {  # by extension
    ".svg": "these are drawings: convert them to .png, for example with rsvg-convert",
    ".mat": f"Matlab's: {_ARRAYS}",
    **dict.fromkeys((".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".pth", ".bin"), _ARRAYS),
    **dict.fromkeys((".npy", ".npz", ".zip", ".tar", ".tgz"), "give it as the source to read images from it"),
    **dict.fromkeys((".7z", ".rar"), "unpack it first"),
    **dict.fromkeys((".cr2", ".nef", ".arw", ".dng"), "raw photos: develop them to .jpg or .tif"),
}
CLASS_LISTS = ("classes.json", "classes.txt", "class_names.txt")  # the classes' names in the order of their numbers


class Listing(NamedTuple):
    """The files of a tree.

    Attributes:
        paths: relative, with slashes.
        places: (N, k) int64, where each file is; the tree knows the meaning.
        left_out: number of files that are not listed, by reason.
        lasting: whether any later change would show, so that the listing may be kept.
        notes: what was assumed; one line each.
    """

    paths: list[str]
    places: np.ndarray
    left_out: Mapping[str, int] = {}
    lasting: bool = True
    notes: Sequence[str] = ()


class Tree(Protocol):
    """Files in a folder or in archives; it can be pickled, and used by several threads and processes at a time.

    Attributes:
        key: what tells this tree from others, for the index on disk.
        dotted: whether the files of one sample have the same name up to its first dot, as WebDataset's have.
    """

    @property
    def key(self) -> Sequence[str]: ...

    @property
    def dotted(self) -> bool: ...

    def listing(self) -> Listing:
        """All files.

        Raises:
            InputError: the tree cannot be read.
        """

    def state(self, read: Sequence[str]) -> Any:
        """The state of the tree and of files in it that were read, as JSON has it; see `kept_index`."""

    def is_current(self, state: Any) -> bool:
        """Whether the tree is still in a state."""

    def beside(self, name: str) -> bytes | None:
        """The content of a file at the tree's top, or beside its archives; None if there is none."""

    def inner(self, path: str) -> str:
        """A path without what only tells several archives apart."""

    def name_of(self, path: str, key: str, place: np.ndarray) -> str:
        """The name of an image, from its path and the path up to its extension."""

    def files(self, names: Sequence[str]) -> Sequence[str]:
        """The files on disk that hold these images."""

    def num_bytes(self, name: str, place: np.ndarray) -> int:
        """The size of a file; call it before `read`, which may wait forever for a file that this refuses."""

    def read(self, name: str, place: np.ndarray) -> bytes:
        """The content of an image, or of another file by its path; see `Source`."""


class TreeSource:
    """The images of a tree.

    Args:
        tree: the files.
        index: the images among them.
        class_names: the classes in the order of their ids.
    """

    def __init__(self, tree: Tree, index: Index, class_names: list[str]):
        self.tree, self.index = tree, index
        self.names: Sequence[str] = index.names
        self.class_ids = index.class_ids
        self.class_names = class_names

    @property
    def files(self) -> Sequence[str]:
        return self.tree.files(self.index.names)

    def num_bytes(self, row: int) -> int:
        return self.tree.num_bytes(self.index.names[row], self.index.places[row])

    def open(self, row: int) -> Image.Image:
        name = self.index.names[row]
        return open_image(self.tree.read(name, self.index.places[row]), name)


def open_tree(tree: Tree, data: DataConfig) -> Found:
    """The images of a tree, with parts and classes as people lay them out.

    All processes must call it at the same point.

    Raises:
        InputError: the tree has no images, or its labels cannot be used.
    """
    key = [*tree.key, *EXTENSIONS, repr(data.label_column), repr(data.label_key)]
    indices, facts = kept_index(key, tree.is_current, lambda: _index(tree, data))
    train, *held_out = (
        TreeSource(tree, index, names) for index, names in zip(indices, facts["class_names"], strict=True)
    )
    return Found(train, held_out[0] if held_out else None, facts["split"], facts["left_out"], facts["notes"])


def _index(tree: Tree, data: DataConfig) -> tuple[list[Index], dict[str, Any], Any]:
    listing = tree.listing()
    extensions = [extension_of(path) for path in listing.paths]
    images = [row for row, extension in enumerate(extensions) if extension in EXTENSIONS]
    others = {path: row for row, path in enumerate(listing.paths) if extensions[row] not in EXTENSIONS}
    left_out = Counter(listing.left_out)
    images, keys = _keys(listing.paths, images, left_out) if tree.dotted else (images, None)
    paths = [listing.paths[row] for row in images]
    keys = keys or _stems(paths)

    def read(path: str) -> bytes:
        try:
            place = listing.places[others[path]]
            tree.num_bytes(path, place)  # raises if it is a pipe, which would be read forever
            return tree.read(path, place)
        except OSError as error:
            raise InputError(f"{one_line(path)} cannot be read ({reason(error)}); repair or remove it") from error

    if not paths:
        raise NoImages(_no_images(extensions, read, others))
    layout = find_layout([tree.inner(path) for path in paths])
    labels = _labels(paths, keys, others, read, layout, data, dotted=tree.dotted)
    parts = _parts(layout, labels)
    lists = {path for path in others if tree.inner(path) in CLASS_LISTS}
    contents = {tree.inner(path): read(path) for path in lists}
    names_of_numbers = class_list(lambda name: contents.get(name) or tree.beside(name))
    by_part = [_labels_of(part, labels, train=part is parts[0]) for part in parts]
    indices, class_names = [], []
    for part, given in zip(parts, by_part, strict=True):
        class_ids, names = class_ids_of(given, names_of_numbers)
        rows = [images[row] for row in part.rows]
        image_names = [tree.name_of(paths[row], keys[row], listing.places[images[row]]) for row in part.rows]
        indices.append(Index.of(image_names, listing.places[rows], class_ids))
        class_names.append(names)
    left_out.update(layout.left_out)
    used = labels.used | lists
    left_out.update(extensions[row] for path, row in others.items() if path not in used)
    hints = [
        f"{extension}: {count:,} {'file' if count == 1 else 'files'} not read; {hint}"
        for extension, count in sorted(left_out.items())
        if (hint := hint_of(extension)) is not None
    ]
    if not any(class_names):
        hints += _words_in_names(paths)
    split = parts[1].name if len(parts) > 1 else ""
    notes = [*listing.notes, *layout.notes, *labels.notes, *hints]
    facts = {"class_names": class_names, "split": split, "left_out": dict(left_out), "notes": notes}
    return indices, facts, tree.state(sorted(used)) if listing.lasting else None


def extension_of(path: str) -> str:
    """The lower-case extension of a path, such as `.png`; `no extension` if there is none."""
    _, dot, extension = path.rpartition("/")[2].rpartition(".")
    return f".{extension.lower()}" if dot else "no extension"


def _no_images(extensions: Sequence[str], read: Callable[[str], bytes], paths: Iterable[str]) -> str:
    found = Counter(extensions).most_common(4)
    held = ", ".join(f"{count:,} {extension}" for extension, count in found) or "no files"
    message = f"no image among its files, {held} (looked for {' '.join(EXTENSIONS)})"
    unnamed = next((path for path in paths if extension_of(path) == "no extension"), None)
    hints = {hint for extension, _ in found if (hint := hint_of(extension)) is not None}
    if unnamed is not None and PICKLE.match(read(unnamed)):
        hints.add(f"{one_line(unnamed)} is a pickle, which may run any program: {_ARRAYS}")
    return f"{message}; {'; '.join(sorted(hints))}" if hints else message


def hint_of(extension: str) -> str | None:
    """What to do about files of an extension; None if nothing is known."""
    return plugin_hint(extension) or HINTS.get(extension)


def describe_file(path: Path) -> str:
    """What a file is that is no source of images."""
    extension = extension_of(path.name)
    if extension in EXTENSIONS:
        return "a single image"
    if extension in TABLES:
        return f"a table; give the folder of the images that it names, or if it holds pixels, {_ARRAYS}"
    with path.open("rb") as file:
        if PICKLE.match(file.read(2)):
            return f"a pickle, which may run any program and is not read; {_ARRAYS}"
    hint = hint_of(extension)
    return "a file of an unknown type" + (f" ({hint})" if hint is not None else "")


def _keys(paths: Sequence[str], images: list[int], left_out: Counter[str]) -> tuple[list[int], list[str] | None]:
    """The images of samples whose files share a name up to its first dot, and the samples' keys.

    If a sample has several images, such as 0.input.jpg and 0.target.jpg, one kind is kept: that without a further word,
    or the first. Names with dots of other kinds, such as v1.0.jpg and v1.1.jpg, are no samples, and neither are they if
    most have only one image: their keys are None.
    """
    keys, words = [], []
    for row in images:
        folder, slash, name = paths[row].rpartition("/")
        stem, _, word = name.partition(".")
        keys.append(folder + slash + stem)
        words.append(word.lower())
    if len(set(keys)) == len(keys):
        return images, keys
    kinds = Counter(words)
    if len(kinds) > len(set(keys)):
        return images, None
    if len(keys) < 1.5 * len(set(keys)):  # a few images that are called alike, such as logo.png and logo.gif
        return images, None
    order = {word: rank for rank, word in enumerate(sorted(kinds, key=lambda word: "." in word))}  # else the first
    chosen: dict[str, int] = {}
    for i, key in enumerate(keys):
        if key not in chosen or order[words[i]] < order[words[chosen[key]]]:
            chosen[key] = i
    kept = sorted(chosen.values())
    left_out.update(f"{word} beside {words[kept[0]]}" for i, word in enumerate(words) if chosen[keys[i]] != i)
    return [images[i] for i in kept], [keys[i] for i in kept]


def _words_in_names(paths: Sequence[str]) -> list[str]:
    """One line if the images' names begin with words that look like classes, as cat.0.jpg and dog.0.jpg do."""
    words = Counter(re.match(r"[^\W\d_]*", path.rpartition("/")[2])[0] for path in paths)  # type: ignore[index]
    if "" in words or not 1 < len(words) <= len(paths) / 4:
        return []
    shown = ", ".join(f"{one_line(word)} ({count:,})" for word, count in words.most_common(3))
    more = f" and {len(words) - 3:,} more" if len(words) > 3 else ""
    return [f"{shown}{more}: how the names begin; if these are classes, sort the images into folders called so"]


def _stems(paths: Sequence[str]) -> list[str]:
    """The paths without their extensions, except where several images would then have the same."""
    stems = [path.rpartition(".")[0] for path in paths]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else path for stem, path in zip(stems, paths, strict=True)]


def _labels(
    paths: Sequence[str],
    keys: Sequence[str],
    others: Mapping[str, int],
    read: Callable[[str], bytes],
    layout: Layout,
    data: DataConfig,
    *,
    dotted: bool,
) -> Labels:
    """The labels that files give: those beside each image before those in tables."""
    known = set(keys)
    sides: dict[str, dict[str, str]] = {extension: {} for extension in SIDES}
    for path in others:
        if (extension := extension_of(path)) in SIDES:
            folder, slash, name = path.rpartition("/")
            first_dot = folder + slash + name.partition(".")[0]
            key = first_dot if dotted and first_dot in known else path.rpartition(".")[0]
            if key in known:
                sides[extension][key] = path
    sides = {extension: found for extension, found in sides.items() if found}
    labels = Labels()
    if sides or data.label_key is not None:
        labels = read_side_files(paths, keys, sides, read, key=data.label_key)
    beside = {path for found in sides.values() for path in found.values()}
    tables = [path for path in others if path not in beside]
    folders = {path.partition("/")[0] for path in layout.train.inner if "/" in path}
    kept = [row for part in (layout.train, layout.held_out) if part is not None for row in part.rows]
    if not labels.by_row or data.label_column is not None:
        found = read_label_files(paths, tables, read, column=data.label_column, folders=folders, kept=kept)
        labels.by_row = found.by_row or labels.by_row
        labels.parts, labels.part_files, labels.used = found.parts, found.part_files, labels.used | found.used
        labels.notes += found.notes
    if folders and any(row in labels.by_row for row in layout.train.rows):
        inner = dict(zip(layout.train.rows, layout.train.inner, strict=True))
        if any(labels.by_row.get(row) != path.partition("/")[0] for row, path in inner.items()):
            shown = " ".join(one_line(f"{name}/") for name in sorted(folders)[:3]) + (
                " ..." if len(folders) > 3 else ""
            )
            labels.notes.append(f"{shown}: these folders are not the classes, as there are labels")
    return labels


def _parts(layout: Layout, labels: Labels) -> list[Part]:
    """The part to train on and the held-out part, as folders or else as label files divide the images."""
    parts = [part for part in (layout.train, layout.held_out) if part is not None and part.rows]
    train, held_out = part_words(labels.parts)
    if len(parts) > 1 or train is None or held_out is None:
        return parts
    if sum(row in labels.parts for row in layout.train.rows) < len(layout.train.rows) / 2:
        labels.notes.append(f"{train} and {held_out} in label files: not used, as most images are in no part")
        return parts
    divided = {train: Part("", [], []), held_out: Part(f"{held_out} in the label file", [], [])}
    unused: Counter[str] = Counter()
    for row, path in zip(layout.train.rows, layout.train.inner, strict=True):
        word = labels.parts.get(row, "no part")
        if word in divided:
            divided[word].rows.append(row)
            divided[word].inner.append(path)
        else:
            unused[word] += 1
    for word, count in unused.items():
        layout.left_out[f"{word} in the label file"] += count
        labels.notes.append(f"{word}: {count:,} images of this part by label files, not used")
    labels.notes.append(f"{some_names(labels.part_files)}: divides the images into {train} and {held_out}")
    return list(divided.values())


def _labels_of(part: Part, labels: Labels, *, train: bool) -> list[str | None]:
    """Each image's label: that of the files that give labels, or else its folder.

    If the files name held-out images only, as Tiny ImageNet's do, the folders are the classes in training.
    """
    if labels.by_row and not (train and not any(row in labels.by_row for row in part.rows)):
        given = [labels.by_row.get(row) for row in part.rows]
        if missing := given.count(None):
            part_name = f" of {part.name}" if part.name else ""
            labels.notes.append(f"{missing:,} of {len(given):,} images{part_name} have no label: no class")
        return given
    return [
        path.partition("/")[0].encode("utf-8", "backslashreplace").decode() if "/" in path else None
        for path in part.inner
    ]


def class_list(beside: Callable[[str], bytes | None]) -> Mapping[str, str]:
    """The names of classes that are numbers, from a classes.json or the like: {"0": "cat", ...}.

    The lines of a .txt are the names in order, or each begins with its number, as in `1 cat`.

    Args:
        beside: the content of a file by its name; None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    for name in CLASS_LISTS:
        content = beside(name)
        if content is None:
            continue
        if name.endswith(".txt"):
            lines = [line.strip() for line in content.decode("utf-8-sig", "replace").splitlines() if line.strip()]
            numbered = [re.fullmatch(r"(\d+)[\s,:;]+(\S.*)", line) for line in lines]
            if all(numbered):
                return {str(int(match[1])): match[2] for match in numbered if match is not None}
            return {str(i): line for i, line in enumerate(lines)}
        try:
            found = json.loads(content)
        except ValueError as error:
            raise InputError(f"{name} cannot be read ({error}); repair it") from error
        if isinstance(found, list):
            return {str(i): str(one) for i, one in enumerate(found)}
        if isinstance(found, dict) and all(isinstance(value, int) for value in found.values()):
            return {str(value): str(one) for one, value in found.items()}
        if isinstance(found, dict) and all(re.fullmatch(r"\d+", key) for key in found):
            return {str(int(key)): str(one) for key, one in found.items()}
        raise InputError(f'{name} is no list of class names; make it one, such as ["cat", "dog"]')
    return {}


def class_ids_of(
    labels: Sequence[str | None], names_of_numbers: Mapping[str, str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """(N,) int64 class ids from 0, -1 for no class, and the classes' names; only classes with images are there.

    Numbers sort as numbers, also in names such as `a10`.

    Args:
        labels: each image's label; None for no class.
        names_of_numbers: names of classes whose labels are numbers, which are written without leading zeros here.

    Raises:
        InputError: one of the numbers has no name, or there are too many classes.
    """
    found = sorted({label for label in labels if label is not None}, key=natural)
    if len(found) > MAX_CLASSES:
        raise InputError(f"{len(found):,} classes are too many; give labels of at most {MAX_CLASSES:,} classes")
    ids: dict[str | None, int] = {label: i for i, label in enumerate(found)}
    class_ids = np.array([ids.get(label, -1) for label in labels], np.int64)
    if names_of_numbers and found and all(re.fullmatch(r"\d+", label) for label in found):
        unnamed = [label for label in found if str(int(label)) not in names_of_numbers]
        if unnamed:
            raise InputError(
                f"the list of class names has {len(names_of_numbers)} names, and none for class {unnamed[0]}; add it"
            )
        names = [names_of_numbers[str(int(label))] for label in found]
        counts = Counter(names)  # two of ImageNet's classes are called crane
        found = [name if counts[name] == 1 else f"{name} ({label})" for name, label in zip(names, found, strict=True)]
    return class_ids, found


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts names with numbers as people do: 2 before 10, and a2 before a10."""
    parts = re.split(r"(\d{1,18})", name)
    return (*((int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)), (-1, name))
