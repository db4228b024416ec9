"""Images of more than 8 bits: their values are read in full, and one white level holds for a whole set."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from data.files import load, read_one, save
from PIL import Image

from vqgen.data.deep import ValuesImage, deep_of, find_levels
from vqgen.data.pixels import open_image, to_pixels
from vqgen.data.skipped import reason
from vqgen.errors import InputError
from vqgen.settings import DataConfig


def png(values: np.ndarray, clear: tuple[int, ...] = ()) -> bytes:
    """A 16-bit PNG of values (H, W) or (H, W, C); `clear` is the transparent value."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = (*values.shape, 1)[:3]
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    transparency = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    content = chunk(b"IHDR", header) + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def tiff(values: np.ndarray, order: str = "<", *, planar: bool = False, packed: bool = False, **tags: int) -> bytes:
    """An uncompressed or zipped TIFF of values (H, W) or (H, W, C), in that order of the bytes.

    Args:
        values: the values.
        order: `<` or `>`.
        planar: whether each channel is a strip of its own.
        packed: whether to compress.
        tags: `photometric`, `extra` and `bits`, if they are not those of grey, RGB and RGB with opacity.
    """
    height, width, channels = (*values.shape, 1)[:3]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    values = values.astype(values.dtype.newbyteorder(order)).reshape(height, width, channels)
    strips = [values[..., c].tobytes() for c in range(channels)] if planar else [values.tobytes()]
    strips = [zlib.compress(strip) if packed else strip for strip in strips]
    bits = [tags.get("bits", 8 * values.dtype.itemsize)] * channels
    photometric = tags.get("photometric", 2 if channels > 2 else 1)
    entries = {
        256: [width], 257: [height], 258: bits, 259: [8 if packed else 1], 262: [photometric], 273: strips,
        277: [channels], 278: [height], 279: [len(strip) for strip in strips],
        284: [2 if planar else 1], 339: [kind] * channels,
    }  # fmt: skip
    if channels in (2, 4):
        entries[338] = [tags.get("extra", 2)]
    content, fields = b"", b""
    start = 8 + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
        if tag == 273:
            numbers = []
            for strip in strips:
                numbers.append(start + len(content))
                content += strip + bytes(len(strip) % 2)
        packed_numbers = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed_numbers, content = struct.pack(f"{order}I", start + len(content)), content + packed_numbers
        fields += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed_numbers
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + fields + bytes(4) + content


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def values_of(content: bytes) -> np.ndarray:
    """The values (H, W) or (H, W, C) that are read from a file, with opacity from 0 to 1 as the last channel."""
    deep = deep_of(open_image(content))
    parts = [part for _, part in deep._strips()]
    values = np.concatenate([values for values, _ in parts])
    if parts[0][1] is None:
        return values
    values = values if values.ndim == 3 else values[..., None]
    return np.concatenate([values, np.concatenate([opacity for _, opacity in parts])[..., None]], -1)


def random(*shape: int, dtype: type = np.uint16, most: int = 65536) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, most, shape).astype(dtype)


# Values


@pytest.mark.parametrize("form", ["png", "tiff <", "tiff >", "tiff planar <", "tiff planar >", "tiff packed"])
def test_colours_of_16_bits_keep_all_their_bits(form):
    values = random(40, 30, 3)
    content = png(values) if form == "png" else tiff(
        values, ">" if ">" in form else "<", planar="planar" in form, packed="packed" in form
    )  # fmt: skip
    np.testing.assert_array_equal(values_of(content), values)


@pytest.mark.parametrize("channels", [2, 4])
def test_16_bits_with_opacity_keep_all_their_bits(channels):
    values = random(9, 7, channels)
    read = values_of(png(values))
    np.testing.assert_array_equal(read[..., :-1], values[..., :-1])
    np.testing.assert_allclose(read[..., -1], values[..., -1] / 65535)
    if channels == 4:
        np.testing.assert_array_equal(values_of(tiff(values)), read)


def test_filtered_and_interlaced_pngs_of_16_bits_keep_all_their_bits():
    smooth = np.add.outer(np.arange(64) * 300, np.arange(64) * 700).astype(np.uint16)
    stored = Image.fromarray(smooth)  # Pillow filters the rows
    buffer = io.BytesIO()
    stored.save(buffer, "PNG")
    np.testing.assert_array_equal(values_of(buffer.getvalue()), smooth)


def test_a_transparent_value_of_16_bits(tmp_path):
    values = np.full((8, 8), 30_000, np.uint16)
    values[0, 0], values[0, 1] = 1234, 65535
    read = read_one(write(tmp_path / "a", {"x.png": png(values, (1234,))}) / "x.png", background="#0000ff")
    assert tuple(read[:, 0, 0]) == (0, 0, 255)
    assert tuple(read[:, 4, 4]) == (117, 117, 117)
    values = np.stack([values] * 3, -1)
    values[0, 2] = 1234, 1234, 1235  # another colour, although the high bytes are the same
    content = png(values, (1234, 1234, 1234))
    read = read_one(write(tmp_path / "b", {"x.png": content}) / "x.png", background="#0000ff")
    assert tuple(read[:, 0, 0]) == (0, 0, 255)
    assert tuple(read[:, 0, 2]) == (5, 5, 5)


@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_and_long_integers_and_floats(order):
    for dtype in (np.int16, np.int32, np.uint32, np.float32, np.int8):
        values = random(9, 7, dtype=dtype) if dtype != np.float32 else np.random.default_rng(0).random((9, 7), dtype)
        if dtype == np.uint32 and order == "<":
            values[0, 0] = 2**32 - 1
        if dtype == np.uint32 and order == ">":
            continue  # Pillow does not know them
        np.testing.assert_array_equal(values_of(tiff(values, order)), values)


def test_a_tiff_whose_white_is_the_smallest_value(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    read = read_one(write(tmp_path / "a", {"x.tif": tiff(values, photometric=0)}) / "x.tif")
    np.testing.assert_allclose(read[0], 255 - values / 257, atol=0.51)


def test_a_format_that_says_what_is_white_is_believed(tmp_path):
    pgm = b"P5\n8 8\n1000\n" + np.full((8, 8), 500, ">u2").tobytes()
    assert set(read_one(write(tmp_path / "a", {"x.pgm": pgm}) / "x.pgm").ravel()) <= {127, 128}
    jp2 = save(tmp_path / "b" / "x.jp2", Image.fromarray(np.full((64, 64), 1000, np.uint16)), irreversible=False)
    assert (read_one(jp2) == 4).all()


def test_a_profile_and_an_orientation_hold_for_16_bits_too(tmp_path):
    values = np.zeros((8, 8), np.uint16)
    values[:4] = 60_000
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise: what is above comes to the right
    read = read_one(save(tmp_path / "a" / "x.png", Image.fromarray(values), exif=exif))
    assert (read[0, :, 4:] > 200).all()
    assert (read[0, :, :4] == 0).all()


# The white level of a set


def ramp(low: float, high: float, dtype: type = np.uint16) -> np.ndarray:
    return np.linspace(low, high, 64).reshape(8, 8).astype(dtype)


def with_pixel(values: np.ndarray, value: float) -> np.ndarray:
    values = values.copy()
    values[3, 3] = value
    return values


SETS = {
    "12 bits in 16": ([ramp(0, 4095), ramp(0, 400)], 0, 4095),
    "10 bits in 16": ([ramp(0, 1000), ramp(0, 300)], 0, 1023),
    "14 bits in 16": ([ramp(0, 16000), ramp(0, 300)], 0, 16383),
    "16 bits": ([ramp(0, 20000), ramp(0, 300)], 0, 65535),
    "8 bits in 16": ([ramp(0, 200)], 0, 255),
    "a label in each pixel": ([ramp(0, 9), ramp(0, 20)], 0, 20),
    "a hot pixel in each": ([with_pixel(ramp(0, 4000), 65535), with_pixel(ramp(0, 300), 60000)], 0, 4095),
    "floats that overshoot": ([ramp(-0.04, 1.05, np.float32), ramp(0, 0.3, np.float32)], 0, 1),
    "floats to 255": ([ramp(0, 200, np.float32), ramp(0, 40, np.float32)], 0, 255),
    "floats to 65535": ([ramp(0, 60000, np.float32)], 0, 65535),
    "floats of another scale": ([ramp(0, 3, np.float32), ramp(0, 1, np.float32)], 0, 3),
    "floats on both sides of 0": ([ramp(-1, 1, np.float32), ramp(-0.5, 0.3, np.float32)], -1, 1),
    "floats without data": ([np.where(np.eye(8) > 0, np.float32(-3.4e38), ramp(0, 1, np.float32))], 0, 1),
    "a CT scan": ([ramp(-1024, 3071, np.int16), ramp(-1000, 100, np.int16)], -1024, 3071),
    "signed but not negative": ([ramp(0, 3000, np.int16)], 0, 4095),
    "large integers": ([ramp(0, 1e6, np.int32), ramp(0, 1e5, np.int32)], 0, 1e6),
}


@pytest.mark.parametrize("cache_gb", [0, 1])
@pytest.mark.parametrize("case", SETS)
def test_a_set_has_one_black_and_one_white_level(tmp_path, case, cache_gb):
    images, black, white = SETS[case]
    write(tmp_path / "x", {f"{k}.tif": tiff(values) for k, values in enumerate(images)})
    write(tmp_path / "held", {"x.tif": tiff(images[0])})
    train, held_out = load(tmp_path / "x", val_source=str(tmp_path / "held"), cache_gb=cache_gb)
    kind = "float" if images[0].dtype == np.float32 else "integer"
    for part in (train, held_out):
        assert (part.levels[kind].black, part.levels[kind].white) == pytest.approx((black, white))
        assert part.crop[f"{kind}_levels"] == f"{black:g} {white:g}"
    for k, values in enumerate(images):
        expected = np.clip((values.astype(float) - black) / (white - black), 0, 1) * 255
        np.testing.assert_allclose(train.read(k)[0], expected, atol=0.51)
    np.testing.assert_array_equal(held_out.read(0), train.read(0))


def test_the_levels_are_said_in_one_line(tmp_path):
    write(tmp_path / "x", {f"{k}.tif": tiff(ramp(0, 4095)) for k in range(2)})
    train, _ = load(tmp_path / "x", val_fraction=0)
    line = "white is 4095 in images of more than 8 bits, the smallest usual value that none exceeds (data.white=)"
    assert train.notes == [line]
    write(tmp_path / "y", {f"{k}.tif": tiff(ramp(-1024, 3000, np.int16)) for k in range(2)})
    (note,) = load(tmp_path / "y", val_fraction=0)[0].notes
    assert note.startswith(
        "black is -1024 and white 3000 in images of more than 8 bits, their lowest and highest value"
    )
    save(tmp_path / "z" / "0.png")
    save(tmp_path / "z" / "1.png")
    train, _ = load(tmp_path / "z")
    assert (train.notes, train.levels) == ([], {})
    assert train.crop == {"image_size": 8, "channels": 1, "resize": "crop", "background": "white"}  # old stores' key


def test_a_white_level_that_is_given(tmp_path):
    write(tmp_path / "x", {f"{k}.tif": tiff(ramp(0, 4095)) for k in range(2)})
    for cache_gb in (0, 1):
        train, _ = load(tmp_path / "x", val_fraction=0, white=8190, cache_gb=cache_gb)
        np.testing.assert_allclose(train.read(0)[0], ramp(0, 4095) / 8190 * 255, atol=0.51)
        assert train.notes == ["white is 8190 in images of more than 8 bits, as data.white says"]
    square = to_pixels(Image.fromarray(ramp(0, 4095)), 1, DataConfig(image_size=8, white=8190))
    np.testing.assert_array_equal(square, train.read(0))
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"^white="):
            load(tmp_path / "x", white=wrong)


def test_floats_and_integers_in_one_set_have_levels_of_their_own(tmp_path):
    save(tmp_path / "x" / "2.png", 77)
    write(tmp_path / "x", {"0.tif": tiff(ramp(0, 4095)), "1.tif": tiff(ramp(0, 1, np.float32))})
    save(tmp_path / "held" / "x.png", 77)
    train, _ = load(tmp_path / "x", val_source=str(tmp_path / "held"))
    assert {kind: levels.white for kind, levels in train.levels.items()} == {"integer": 4095, "float": 1}
    assert (train.read(0).max(), train.read(1).max(), train.read(2).max()) == (255, 255, 77)
    assert len(train.notes) == 2


def test_colour_in_deep_images_decides_the_channels(tmp_path):
    grey = np.stack([ramp(0, 4095)] * 3, -1)
    write(tmp_path / "x", {f"{k}.png": png(grey) for k in range(3)})
    for cache_gb in (0, 1):
        assert load(tmp_path / "x", cache_gb=cache_gb)[0].channels == 1
    write(tmp_path / "x", {"3.png": png(np.stack([ramp(0, 4095), ramp(0, 1000), ramp(9, 9)], -1))})
    for cache_gb in (0, 1):
        train, _ = load(tmp_path / "x", cache_gb=cache_gb, val_fraction=0)
        assert (train.channels, train.levels["integer"].white) == (3, 4095)


def test_the_levels_do_not_depend_on_the_order_of_the_images():
    extremes = [(0.0, 4000.0), (0.0, 12.0), (0.0, 900.0)]
    assert find_levels("integer", extremes) == find_levels("integer", extremes[::-1])
    assert find_levels("integer", extremes).white == 4095


# Images that Pillow does not hold


def test_an_array_of_any_numbers_is_an_image():
    values = np.random.default_rng(0).random((8, 8, 3))
    data = DataConfig(image_size=8)
    np.testing.assert_allclose(to_pixels(ValuesImage.of(values), 3, data), values.transpose(2, 0, 1) * 255, atol=0.51)
    assert to_pixels(ValuesImage.of(values[..., 0] > 0.5), None, data).shape == (1, 8, 8)
    for wrong in (np.zeros((8, 8, 5)), np.zeros(8), np.zeros((8, 8), complex)):
        with pytest.raises(OSError, match="an image has 1 channel"):
            ValuesImage.of(wrong)


def test_a_tiff_that_needs_tifffile_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)  # as if it were not installed
    with pytest.raises(InputError) as error:
        open_image(tiff(np.zeros((8, 8, 3), np.float32)))
    assert "pip install 'vqgen[tiff]'" in reason(error.value)


def test_tiffs_that_pillow_does_not_read():
    floats = np.random.default_rng(0).random((9, 7, 3)).astype(np.float32)
    for content in (tiff(floats), tiff(floats, ">"), tiff(floats, planar=True), tiff(floats, packed=True)):
        np.testing.assert_array_equal(values_of(content), floats)
    for dtype in (np.float64, np.float16, np.uint64):
        values = random(9, 7, dtype=dtype, most=200)
        np.testing.assert_array_equal(values_of(tiff(values)), values)
    with_opacity = random(9, 7, 2)
    np.testing.assert_allclose(values_of(tiff(with_opacity, extra=2))[..., 1], with_opacity[..., 1] / 65535)
    with pytest.raises(OSError, match="2 bands"):
        open_image(tiff(with_opacity, extra=0))
    with pytest.raises(OSError, match="values of 1 bits"):
        open_image(tiff(random(9, 8, 3, dtype=np.uint8), bits=1))
    with pytest.raises(OSError, match="5 bands"):
        open_image(tiff(random(9, 7, 5), photometric=1))


def test_a_damaged_tiff_is_no_image(tmp_path, caplog):
    content = tiff(np.zeros((8, 8, 3), np.float32))
    write(tmp_path / "x", {"0.tif": content[:20], "1.tif": b"II*\0" + bytes(50)})
    save(tmp_path / "x" / "2.png")
    save(tmp_path / "held" / "3.png")
    load(tmp_path / "x", val_source=str(tmp_path / "held"))
    assert "tifffile" not in caplog.text
    assert "no image" in caplog.text
