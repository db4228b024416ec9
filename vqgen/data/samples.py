"""The files that drawn images are written to: samples.npz, and single files in a folder for each class."""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vqgen.errors import require

UNSAFE = r'[\x00-\x1f\x7f"%*/:<>?\\|\ud800-\udfff]|^[. ]|[. ]$'  # in a file's name, on one system or another
RESERVED = r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)"  # names that Windows keeps for devices
MAX_NAME = 200  # bytes; most file systems take 255
NO_CLASS = "no_class"


def save_samples(path: Path, images: np.ndarray, class_ids: np.ndarray) -> None:
    """Writes samples.npz: `images` with their `class_ids`, and the images again as `arr_0`.

    Other projects' evaluators read only `arr_0`. A zip file has no second name for the same content, so that the images
    are in it twice.

    Args:
        path: the file.
        images: uint8 (N, H, W, C); grey ones, C = 1, are written as (N, H, W).
        class_ids: (N,) int64, -1 for no class.
    """
    images = images[..., 0] if images.shape[3] == 1 else images
    np.savez_compressed(path, images=images, class_ids=class_ids, arr_0=images)


def load_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images uint8 (N, H, W, C) and class ids (N,) in a samples.npz."""
    with np.load(path) as arrays:
        images, class_ids = arrays["images"], arrays["class_ids"]
    return images.reshape(*images.shape[:3], -1), class_ids


def check_free(folder: Path) -> None:
    """Checks that single files would not mix with other images.

    Raises:
        InputError: the folder, or one in it, has pictures already.
    """
    there = (path for pattern in ("*.png", "*/*.png") for path in sorted(folder.glob(pattern)))
    other = next((path for path in there if path.name != "grid.png"), None)
    remedy = "the new ones would mix with them; remove them, or name another folder: out="
    require(other is None, f"out={folder} has images already, such as {other and other.relative_to(folder)}: {remedy}")


def save_single_files(folder: Path, images: np.ndarray, class_ids: np.ndarray, class_names: Sequence[str]) -> bool:
    """Writes image i to CLASS/0000i.png, so that the folder is a source of images; returns whether there are classes.

    If no image has a class, the images lie directly in the folder.

    Args:
        folder: the folder.
        images: uint8 (N, H, W, C).
        class_ids: (N,), -1 for no class.
        class_names: the classes in the order of their ids.
    """
    with_classes = bool((class_ids >= 0).any())
    folders = [*folder_names(class_names), NO_CLASS] if with_classes else [""]  # -1 is the last
    for i, (image, class_id) in enumerate(zip(images, class_ids, strict=True)):
        path = folder / folders[class_id] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)
    return with_classes


def folder_names(class_names: Sequence[str]) -> list[str]:
    """A folder's name for each class, which every file system takes: the class's own if possible.

    A character that some system refuses becomes % and its code. A name that would fall together with an earlier one,
    because some systems take no account of case, gets its class id.
    """
    names: list[str] = []
    taken = {NO_CLASS}
    for class_id, class_name in enumerate(class_names):
        name = re.sub(UNSAFE, lambda match: f"%{ord(match[0]):02X}", class_name) or "%"
        if re.match(RESERVED, name, re.IGNORECASE):
            name = f"%{ord(name[0]):02X}{name[1:]}"
        name = name.encode()[:MAX_NAME].decode(errors="ignore")
        while (key := unicodedata.normalize("NFC", name).casefold()) in taken:
            name += f"%{class_id}"
        taken.add(key)
        names.append(name)
    return names
