"""A seeded fuzzer that makes folders of images: broken images, which must be skipped, and odd ones, which must load.

python tests/soak/hostile.py FOLDER NUM_VALID NUM_HOSTILE [SEED]
"""

import io
import os
import random
import stat
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

EXTENSIONS = {
    "PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm",
    "AVIF": "avif", "JPEG2000": "jp2", "ICO": "ico", "DIB": "dib",
}  # fmt: skip
STEMS = ["image", "猫", "кот", "été", "قط", "🐱 a", "a\tb", "a\nb", "-rf", "a'b\"c", "a\\b", "x" * 200, "\udcff\udcfe"]
TEXTS = [
    b"<!DOCTYPE html><html><body>404 Not Found</body></html>", b"no image\n", b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n",
    b"%PDF-1.7\n", b"PK\3\4", b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>", b"\xff\xd8\xff",
    b"GIF89a", b"\0\0\1\0\1\0", b"8BPS\0\1", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xffO\xffQ", b"\x28\0\0\0",
    b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF\4\0\0\0WEBP", b"II*\0", b"P6\n", b"version https://git-lfs.github.com/spec/v1\n",
]  # fmt: skip


def make_valid(folder: Path, count: int, seed: int) -> list[str]:
    """Writes this number of odd images that load, and returns their names."""
    rng = random.Random(f"valid {seed}")
    return [_write(folder, f"valid{i}", rng, *rng.choice(VALID)(rng)) for i in range(count)]


def make_hostile(folder: Path, count: int, seed: int) -> list[str]:
    """Writes this number of files that have an image's extension but must be skipped, and returns their names.

    A file made from a valid image is kept only if Pillow alone, without this project's loader, does not load it either.
    """
    rng = random.Random(f"hostile {seed}")
    kinds, weights = zip(*HOSTILE.items(), strict=True)
    names: list[str] = []
    while len(names) < count:
        (kind,) = rng.choices(kinds, weights)
        if kind in SPECIAL:
            names.append(_write(folder, f"hostile{len(names)}", rng, None, rng.choice(list(EXTENSIONS.values()))))
            kind(folder / names[-1])
            continue
        content, extension = kind(rng)
        if not loads(content):
            names.append(_write(folder, f"hostile{len(names)}", rng, content, extension))
    return names


def loads(content: bytes) -> bool:
    """Whether Pillow reads the image, or might; it does not read what it takes for a decompression bomb."""
    try:
        with warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11) else warnings.catch_warnings():
            image = Image.open(io.BytesIO(content), formats=[*EXTENSIONS, "PSD"])
            if image.width < 100_000:  # a very wide image takes Pillow minutes, so this is not tried
                image.load()
    except Exception:
        return False
    return True


def _write(folder: Path, prefix: str, rng: random.Random, content: bytes | None, extension: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{prefix} {rng.choice(STEMS)}.{rng.choice([extension, extension.upper()])}"
    if content is not None:
        (folder / name).write_bytes(content)
    return name


# Valid images


def _noise(rng: random.Random, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(rng.getrandbits(32)).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def _bytes(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _plain(rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(list(EXTENSIONS))
    image = Image.fromarray(_noise(rng, (rng.randint(8, 64), rng.randint(8, 64), 3)))
    return _bytes(image, form, **({"sizes": [image.size]} if form == "ICO" else {})), EXTENSIONS[form]


def _misnamed(rng: random.Random) -> tuple[bytes, str]:
    content, extension = _plain(rng)
    return content, rng.choice([other for other in EXTENSIONS.values() if other != extension])


def _animated(rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(["GIF", "WEBP", "PNG"])
    frames = [Image.fromarray(_noise(rng, (16, 16, 3))) for _ in range(3)]
    return _bytes(frames[0], form, save_all=True, append_images=frames[1:]), EXTENSIONS[form]


def _deep(rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(["PNG", "TIFF", "JPEG2000"])
    return _bytes(Image.fromarray(_noise(rng, (16, 16), np.uint16)), form), EXTENSIONS[form]


def _profiled(rng: random.Random) -> tuple[bytes, str]:
    """An image with a colour profile, which may be damaged."""
    form = rng.choice(["PNG", "JPEG", "TIFF", "WEBP"])
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for _ in range(rng.choice([0, 1, 20])):
        icc[rng.randrange(len(icc))] = rng.getrandbits(8)
    return _bytes(Image.fromarray(_noise(rng, (16, 16, 3))), form, icc_profile=bytes(icc)), EXTENSIONS[form]


def _cmyk(rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(["JPEG", "TIFF"])
    return _bytes(Image.fromarray(_noise(rng, (16, 16, 4)), "CMYK"), form), EXTENSIONS[form]


def _rotated(rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(["JPEG", "PNG", "WEBP", "TIFF"])
    exif = Image.Exif()
    exif[0x0112] = rng.randint(2, 8)
    return _bytes(Image.fromarray(_noise(rng, (16, 24, 3))), form, exif=exif), EXTENSIONS[form]


def _palette(rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(["PNG", "GIF"])
    image = Image.fromarray(_noise(rng, (16, 16, 3))).quantize(16)
    return _bytes(image, form, **rng.choice([{}, {"transparency": 3}])), EXTENSIONS[form]


def _transparent(rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(["PNG", "WEBP", "TIFF"])
    return _bytes(Image.fromarray(_noise(rng, (16, 16, rng.choice([2, 4])))), form), EXTENSIONS[form]


def _thin(rng: random.Random) -> tuple[bytes, str]:
    return _bytes(Image.fromarray(_noise(rng, rng.choice([(1, 1), (1, 3000), (3000, 1)]))), "PNG"), "png"


def _damaged_exif(rng: random.Random) -> tuple[bytes, str]:
    while True:
        exif = b"Exif\0\0" + rng.choice([b"II*\0", b"MM\0*", b""]) + rng.randbytes(rng.randint(0, 40))
        content = _bytes(Image.fromarray(_noise(rng, (16, 16, 3))), "JPEG", exif=exif)
        if loads(content):
            return content, "jpg"


Maker = Callable[[random.Random], tuple[bytes, str]]
VALID: list[Maker] = [
    _plain, _misnamed, _animated, _deep, _profiled, _cmyk, _rotated, _palette, _transparent, _thin, _damaged_exif
]  # fmt: skip


# Broken images, of which some may still load


def _cut(rng: random.Random) -> tuple[bytes, str]:
    content, extension = rng.choice(VALID)(rng)
    return content[: rng.randrange(len(content))], extension


def _flipped(rng: random.Random) -> tuple[bytes, str]:
    """An image with a few bytes changed in the header, or anywhere."""
    content, extension = rng.choice(VALID)(rng)
    changed = bytearray(content)
    for _ in range(rng.choice([1, 4, 16])):
        changed[rng.randrange(min(len(changed), rng.choice([40, 400, 10**6])))] = rng.getrandbits(8)
    return bytes(changed), extension


def _spliced(rng: random.Random) -> tuple[bytes, str]:
    (one, extension), (two, _) = (rng.choice(VALID)(rng) for _ in range(2))
    return one[: rng.randrange(len(one))] + two[rng.randrange(len(two)) :], extension


def _empty(rng: random.Random) -> tuple[bytes, str]:
    return b"", rng.choice(list(EXTENSIONS.values()))


def _garbage(rng: random.Random) -> tuple[bytes, str]:
    start = rng.choice([b"", *TEXTS])
    return start + rng.randbytes(rng.randint(1, 2000)), rng.choice(list(EXTENSIONS.values()))


def _text(rng: random.Random) -> tuple[bytes, str]:
    return rng.choice(TEXTS), rng.choice(list(EXTENSIONS.values()))


def _png_of_size(width: int, height: int, rng: random.Random) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, rng.choice([8, 16]), rng.choice([0, 2, 6]), 0, 0, rng.randint(0, 1))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _bomb(rng: random.Random) -> tuple[bytes, str]:
    """A header for 30,000 x 30,000 pixels or more, and almost no data after it."""
    side = rng.choice([30_000, 65_535])
    form = rng.choice(["PNG", "GIF", "BMP", "PPM", "JPEG", "TIFF", "WEBP"])
    small = Image.fromarray(_noise(rng, (16, 16, 3)))
    content = bytearray(_bytes(small, form, **({"lossless": True} if form == "WEBP" else {})))
    if form == "PNG":
        content = bytearray(_png_of_size(side, rng.choice([side, 2**31 - 1]), rng))
    elif form == "GIF":
        struct.pack_into("<HH", content, 6, side, side)
    elif form == "BMP":
        struct.pack_into("<ii", content, 18, side, side)
    elif form == "PPM":
        content = bytearray(b"P6\n%d %d\n255\n" % (side, side) + bytes(100))
    elif form == "JPEG":
        struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, side, side)
    elif form == "TIFF":
        at = max(content.find(struct.pack("<HHI", 256, kind, 1)) for kind in (3, 4)) + 8  # ImageWidth, then ImageLength
        struct.pack_into("<I", content, at, side)
        struct.pack_into("<I", content, at + 12, side)
    else:
        struct.pack_into("<I", content, 21, 0x3FFF | 0x3FFF << 14)  # 16,384 x 16,384, the largest possible
    return bytes(content), EXTENSIONS[form]


def _hollow(rng: random.Random) -> tuple[bytes, str]:
    """A header within Pillow's limit, and almost no data after it."""
    return _png_of_size(rng.choice([4000, 12_000]), 12_000, rng), "png"


def _dead_link(path: Path) -> None:
    path.symlink_to("nowhere.png")


def _looping_link(path: Path) -> None:
    path.symlink_to(path.name)


def _device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def _vast(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(1 << 41)  # a sparse file, which takes no room on the disk


SPECIAL = [_dead_link, _looping_link, _device_link, _pipe, _socket, _vast]
HOSTILE: dict[Callable, float] = {
    _cut: 6, _flipped: 6, _spliced: 2, _empty: 2, _garbage: 2, _text: 2, _bomb: 3, _hollow: 0.1,
    _dead_link: 1, _looping_link: 1, _device_link: 0.5, _pipe: 1, _socket: 0.5, _vast: 0.1,
}  # fmt: skip


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    num_valid, num_hostile, seed = [*map(int, numbers), 0][:3]
    make_valid(Path(folder), num_valid, seed)
    for name in make_hostile(Path(folder), num_hostile, seed):
        print(name.encode("utf-8", "backslashreplace").decode().encode("unicode_escape").decode())
