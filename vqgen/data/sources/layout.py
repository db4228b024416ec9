"""How people lay out images: which folders are parts, which are classes, and which files are something else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from vqgen.data.skipped import one_line
from vqgen.data.sources.splits import TRAIN, find_pairs, find_split, split_word

# Words in the names of folders that hold images and say nothing about them: My Photos, JPEGImages, img_align_celeba.
IMAGE_WORDS = {"image", "img", "jpg", "jpeg", "png", "picture", "pic", "photo"}
# Names that consist of these say nothing either: data, all_files, raw ...
DATA_WORDS = {"data", "dataset", "sample", "raw", "input", "file", "rgb"}
# Words in the names of folders and files that belong to the images beside them: masks, SegmentationClass, 1_mask.png.
COMPANION_WORDS = {
    *("mask", "segmentation", "seg", "annotation", "label", "depth", "edge", "thumb", "thumbnail", "preview"),
    *("gt", "trimap"),
}
SIZE = re.compile(r"[a-z]*[_-]?\d+(x\d+(@\dx?)?|px|@\dx?)", re.IGNORECASE)  # of icons, as folders' names
STRAY_SHARE = 0.25  # of the images in class folders; more images beside the folders are no strays


@dataclass
class Part:
    """Images of one part of a data set.

    Attributes:
        name: the part's name as the user knows it, such as `val/`; empty for all images.
        rows: indices of its paths.
        inner: each image's path below the folders that are parts or wrappers; its first folder is the class.
    """

    name: str
    rows: list[int]
    inner: list[str]

    def keep(self, kept: Callable[[str], bool]) -> list[str]:
        """Removes the images whose inner path is not kept, and returns their inner paths."""
        removed = [path for path in self.inner if not kept(path)]
        pairs = [(row, path) for row, path in zip(self.rows, self.inner, strict=True) if kept(path)]
        self.rows, self.inner = [row for row, _ in pairs], [path for _, path in pairs]
        return removed


@dataclass
class Layout:
    """The parts of a tree of images, and what was decided on the way.

    Attributes:
        train: the images to train on, or all images.
        held_out: the held-out images; None if the tree has no such part.
        left_out: number of images that are not used, by reason.
        notes: one line for each decision that a user may want to know.
    """

    train: Part
    held_out: Part | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def find_layout(paths: Sequence[str]) -> Layout:
    """The layout of images with these paths, which are relative and have slashes.

    Looks from the top down. A folder that alone holds everything is a wrapper. Folders called train and val (in any of
    the usual spellings) are parts. What is left are the classes, or images without classes.
    """
    layout = Layout(Part("", list(range(len(paths))), list(paths)))
    _unwrap(layout, layout.train, "")
    _leave_out_companions(layout, layout.train)
    _join_numbered_folders(layout, layout.train)
    if not _split_on_top(layout) and not _split_by_pairs(layout):
        _split_in_classes(layout)
    for part in filter(None, (layout.train, layout.held_out)):
        _unwrap(layout, part, part.name, classes=folders_of(layout.train) if part is layout.held_out else ())
        _leave_out_companions(layout, part)
        _leave_out_strays(layout, part)
        _leave_out_companions_in_classes(layout, part)
        _leave_out_companion_files(layout, part)
    _note_what_folders_do_not_say(layout)
    return layout


def words_of(name: str) -> set[str]:
    """The words of a name in lower case and without a plural's s: JPEGImages are jpeg and image."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return {word.lower().removesuffix("s") for word in words}


def is_wrapper(name: str) -> bool:
    """Whether a folder's name says only that it holds images, or data."""
    words = words_of(name)
    return bool(words & IMAGE_WORDS) or (bool(words & DATA_WORDS) and words <= DATA_WORDS | {"all", "the", "x"})


def _holds_images(part: Part, folder: str) -> bool:
    """Whether a folder is called images, or holds only folders that are."""
    inside = [path.split("/")[1:-1] for path in part.inner if path.startswith(f"{folder}/")]
    return is_wrapper(folder) or all(bool(names) and is_wrapper(names[0]) for names in inside)


def folders_of(part: Part) -> Counter[str]:
    """The part's folders with their numbers of images; the empty name stands for images beside the folders."""
    return Counter(path.partition("/")[0] if "/" in path else "" for path in part.inner)


def _unwrap(layout: Layout, part: Part, name: str, classes: Container[str] = ()) -> None:
    """Steps into folders that hold all of a part's images and are no known class; leaves out strays beside them."""
    inside = name
    while True:
        found = folders_of(part)
        loose = found.pop("", 0)
        if len(found) != 1 or loose > STRAY_SHARE * sum(found.values()):
            break
        (folder,) = found
        if folder in classes:
            break
        below = f"{folder}/"
        deeper = {path.removeprefix(below).partition("/")[0] for path in part.inner if path.count("/") > 1}
        alone = folder if is_wrapper(folder) else None
        word = split_word(folder)
        if word is not None and not layout.train.name and word[0] in TRAIN:
            break  # _split_on_top names the part
        again = word is not None and word[0] in part.name.lower()  # train/train/, as some programs unpack train.zip
        if not deeper and alone is None and not again and (word is None or layout.held_out is not None):
            break  # one class
        _leave_out(layout, part, below, f"beside {inside}{folder}/")
        part.inner = [path.removeprefix(below) for path in part.inner]
        inside += below
    if inside != name:
        layout.notes.append(f"{one_line(inside)}: holds all images; the classes, if any, are looked for in it")


def _join_numbered_folders(layout: Layout, part: Part) -> None:
    """Steps into folders such as images_001 and images_002, which are one that was divided by size."""
    found = sorted(folders_of(part))
    if len(found) > 1 and all(map(is_wrapper, found)) and len({re.sub(r"\d+", "", name) for name in found}) == 1:
        shown = " ".join(one_line(f"{name}/") for name in found[:3]) + " ..." * (len(found) > 3)
        layout.notes.append(f"{shown}: no classes, by their names parts of one folder of images")
        part.inner = [path.partition("/")[2] for path in part.inner]
        _unwrap(layout, part, part.name)


def _split_on_top(layout: Layout) -> bool:
    """Divides the images by folders that are called train, val and so on; returns whether there are such folders."""
    part = layout.train
    found = folders_of(part)
    loose = found.pop("", 0)
    split = find_split(found)
    if split is None:
        train = [name for name in found if (word := split_word(name)) is not None and word[0] in TRAIN and not word[1]]
        if len(train) != 1 or not _has_classes(part, train[0]):
            _note_odd_split(layout, found)
            return False
        split = train[0], None, [name for name in found if name != train[0]]
    train_name, held_out_name, others = split
    if loose > sum(found.values()):
        return False
    parts: dict[str, Part] = {}
    for row, path in zip(part.rows, part.inner, strict=True):
        folder, slash, inner = path.partition("/")
        one = parts.setdefault(folder if slash else "", Part(f"{folder}/" if slash else "", [], []))
        one.rows.append(row)
        one.inner.append(inner if slash else path)
    layout.train = parts[train_name]
    layout.held_out = parts[held_out_name] if held_out_name is not None else None
    for name in others:
        shown = one_line(f"{name}/")
        layout.left_out[shown] += found[name]
        beside = " and ".join(one_line(f"{n}/") for n in (train_name, held_out_name) if n is not None)
        layout.notes.append(f"{shown}: {_images(found[name])} beside {beside}, not used")
    if loose:
        _note_strays(layout, parts[""].inner, "beside the parts")
    return True


def _has_classes(part: Part, folder: str) -> bool:
    """Whether a folder has at least two subfolders, and no image beside them."""
    inner = [path.removeprefix(f"{folder}/") for path in part.inner if path.startswith(f"{folder}/")]
    return all("/" in path for path in inner) and len({path.partition("/")[0] for path in inner}) > 1


def _note_odd_split(layout: Layout, folders: Counter[str]) -> None:
    words = [name for name in folders if (word := split_word(name)) is not None and not word[1]]
    if words and len(folders) > 1:
        shown = " and ".join(one_line(f"{name}/") for name in sorted(words)[:3])
        layout.notes.append(f"{shown}: taken for classes like the folders beside, not for parts of a split")


def _split_by_pairs(layout: Layout) -> bool:
    """Divides the images by folders that name both part and class, as trainA trainB testA testB do."""
    part = layout.train
    pairs = find_pairs(folders_of(part))
    if not pairs:
        return False
    words = {word: Part(f"{word}*/", [], []) for word, _ in pairs.values()}
    for row, path in zip(part.rows, part.inner, strict=True):
        folder, _, inner = path.partition("/")
        word, name = pairs[folder]
        words[word].rows.append(row)
        words[word].inner.append(f"{name}/{inner}")
    classes = ", ".join(one_line(name) for name in sorted({name for _, name in pairs.values()})[:3])
    layout.notes.append(
        f"{' '.join(one_line(f'{n}/') for n in sorted(pairs)[:4])}: parts and classes ({classes}) in one name"
    )
    layout.train = next(one for word, one in words.items() if word in TRAIN)
    layout.held_out = next(one for word, one in words.items() if word not in TRAIN)
    return True


def _split_in_classes(layout: Layout) -> None:
    """Divides the images by folders train and val inside each class, as in `bottle/train/x.png`."""
    part = layout.train
    below: dict[str, Counter[str]] = {}
    for path in part.inner:
        names = path.split("/")
        below.setdefault(names[0], Counter())[names[1] if len(names) > 2 else ""] += 1
    splits = {folder: find_split(found) for folder, found in below.items() if "" not in found}
    if not part.inner or len(splits) < len(below) or not all(split and split[1] for split in splits.values()):
        return
    words = {split[:2] for split in splits.values() if split is not None}
    if len(words) != 1:
        return
    ((train_name, held_out_name),) = words
    parts = {name: Part(f"*/{name}/", [], []) for name in (train_name, str(held_out_name))}
    for row, path in zip(part.rows, part.inner, strict=True):
        folder, name, rest = path.split("/", 2)
        if name in parts:
            parts[name].rows.append(row)
            parts[name].inner.append(f"{folder}/{rest}")
        else:
            layout.left_out[one_line(f"*/{name}/")] += 1
    layout.notes.append(f"*/{train_name}/ and */{held_out_name}/: the parts, inside each class")
    layout.train, layout.held_out = parts[train_name], parts[str(held_out_name)]


def _leave_out_companions(layout: Layout, part: Part) -> None:
    """Leaves out folders such as masks/ that lie beside a folder such as images/."""
    found = folders_of(part)
    loose, inside = found.pop("", 0), sum(found.values())
    companions = {name for name in found if COMPANION_WORDS & words_of(name)}
    rest = [name for name in found if name not in companions]
    if companions and (_holds_images(part, rest[0]) if len(rest) == 1 else not rest and loose > STRAY_SHARE * inside):
        for name in sorted(companions):
            shown = one_line(f"{part.name}{name}/")
            layout.left_out[shown] += found[name]
            layout.notes.append(
                f"{shown}: {_images(found[name])} that belong to {rest[0] + '/' if rest else 'those beside'}, not used"
            )
        part.keep(lambda path: path.partition("/")[0] not in companions)
        _unwrap(layout, part, part.name)


def _leave_out_companions_in_classes(layout: Layout, part: Part) -> None:
    """Leaves out folders such as cat/masks/ that lie beside a folder such as cat/images/."""
    inside = Counter(path.split("/")[1] for path in part.inner if path.count("/") > 1)
    companions = {name for name in inside if COMPANION_WORDS & words_of(name)}
    if any(is_wrapper(name) for name in inside if name not in companions):
        for name in sorted(companions):
            shown = one_line(f"{part.name}*/{name}/")
            layout.left_out[shown] += inside[name]
            layout.notes.append(f"{shown}: {_images(inside[name])} that belong to those beside, not used")
        part.keep(lambda path: path.count("/") < 2 or path.split("/")[1] not in companions)


def _leave_out_companion_files(layout: Layout, part: Part) -> None:
    """Leaves out images such as 1_mask.png beside 1.png, unless there are only a few, which are called so by chance."""
    stems = {path.rpartition(".")[0] for path in part.inner}

    def is_companion(path: str) -> bool:
        match = re.fullmatch(r"(.+)[_\W]([a-z]+)([_\W]?\d+)?", path.rpartition(".")[0], re.IGNORECASE)
        return match is not None and bool(COMPANION_WORDS & words_of(match[2])) and match[1] in stems

    companions = set(filter(is_companion, part.inner))
    if companions and len(companions) >= STRAY_SHARE * (len(part.inner) - len(companions)):
        part.keep(lambda path: path not in companions)
        _note_strays(layout, sorted(companions), "that belong to the images of the same names")


def _note_what_folders_do_not_say(layout: Layout) -> None:
    """Notes folders inside the classes, and classes that are sizes of the same pictures."""
    inner = layout.train.inner
    deep = next((path for path in inner if path.count("/") > 1), None)
    if deep is not None:
        layout.notes.append(f"{one_line('/'.join(deep.split('/')[:2]))}/: folders inside a class do not divide it")
    sizes = sorted({path.partition("/")[0] for path in inner if SIZE.fullmatch(path.partition("/")[0])})
    names = Counter(path.partition("/")[2] for path in inner if path.partition("/")[0] in sizes)
    if len(sizes) > 1 and sum(count for count in names.values() if count > 1) > len(inner) / 2:
        shown = " ".join(one_line(f"{name}/") for name in sizes[:3]) + " ..." * (len(sizes) > 3)
        layout.notes.append(
            f"{shown}: by their names the same pictures in several sizes, so held-out ones are also trained on; "
            "give one of the folders as the source"
        )


def _leave_out_strays(layout: Layout, part: Part) -> None:
    """Leaves out a few images that lie beside class folders; with many, the folders are no classes."""
    found = folders_of(part)
    loose, inside = found.pop("", 0), sum(found.values())
    if not loose or not found:
        return
    if loose <= STRAY_SHARE * inside:
        _leave_out(layout, part, "", "beside the class folders")
    elif loose <= inside:
        layout.notes.append(f"{_images(loose)} beside the class folders: no class")
    else:
        names = " ".join(one_line(f"{name}/") for name in sorted(found)[:3])
        layout.notes.append(
            f"{names}: no classes, as most images lie beside the folders, such as {one_line(_first_loose(part))}"
        )
        part.inner = [path.rpartition("/")[2] for path in part.inner]


def _first_loose(part: Part) -> str:
    return next(path for path in part.inner if "/" not in path)


def _leave_out(layout: Layout, part: Part, folder: str, where: str) -> None:
    """Leaves out images that are not below a folder; an empty folder stands for any."""
    names = part.keep(lambda path: path.startswith(folder) and "/" in path)
    if names:
        _note_strays(layout, names, where)


def _note_strays(layout: Layout, names: Sequence[str], where: str) -> None:
    layout.left_out[one_line(where)] += len(names)
    shown = ", ".join(one_line(name) for name in sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
    layout.notes.append(f"{shown}: {_images(len(names))} {one_line(where)}, not used")


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"
