"""Image files, shards and arrays that the tests of the data write and load."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

from vqgen.data.images import ImageSet, load_images
from vqgen.settings import DataConfig

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, image: Image.Image | tuple | int = 0, **options) -> Path:
    """Saves an image, or 8 x 8 pixels of a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.new("L" if isinstance(image, int) else "RGB", (8, 8), image)
    image.save(path, **options)
    return path


def load(source, **settings) -> tuple[ImageSet, ImageSet]:
    return load_images(DataConfig(source=str(source), **{"image_size": 8, **settings}))


def read_one(path: Path, **settings) -> np.ndarray:
    """The pixels (C, H, W) of the image saved at a path in an otherwise empty folder."""
    save(path.parents[1] / "val" / "other.png")
    train, _ = load(path.parent, val_source=str(path.parents[1] / "val"), **settings)
    assert len(train) == 1
    pixels = train.read(0)
    assert pixels.dtype == np.uint8
    return pixels


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(colour, size=8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, tuple[int, bytes | None]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (colour, label) in samples.items():
            add_to_tar(tar, f"{key}.png", png(colour))
            add_to_tar(tar, f"{key}.json", b"{}")
            if label is not None:
                add_to_tar(tar, f"{key}.cls", label)


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">3sB{array.ndim}I", b"\0\0\x08", array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_table(path: Path, columns: dict[str, object], **options) -> Path:
    """Writes a Parquet file; `options` are those of pyarrow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def greys(count: int, start: int = 0) -> list[bytes]:
    """PNG files of one grey each: `start`, `start` + 1, ..."""
    return [png(start + k) for k in range(count)]
