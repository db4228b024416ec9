"""Any image file becomes its known pixels: kinds of image, sizes, damage, large images."""

import contextlib
import io
import logging
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import BLUE, GREEN, RED, load, read_one, save
from data.profiles import SPACES, profile
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from vqgen.data import deep
from vqgen.data import pixels as pixels_module
from vqgen.data.pixels import open_image, to_pixels
from vqgen.settings import DataConfig

# Kinds of image


def test_transparency_is_composited_on_the_background(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (0, 0, 255, 255)
    pixels[4:, 4:, 3] = 128
    path = save(tmp_path / "a" / "rgba.png", Image.fromarray(pixels))
    read = read_one(path, background="red")
    assert tuple(read[:, 0, 0]) == RED
    assert tuple(read[:, 0, 7]) == BLUE
    np.testing.assert_allclose(read[:, 7, 7], (127, 0, 128), atol=1)
    assert tuple(read_one(path)[:, 0, 0]) == (255, 255, 255)


def test_grey_with_alpha_stays_grey(tmp_path):
    pixels = np.full((8, 8, 2), (50, 255), np.uint8)
    pixels[0, 0, 1] = 0
    read = read_one(save(tmp_path / "a" / "la.png", Image.fromarray(pixels)))
    assert read.shape == (1, 8, 8)
    assert (read[0, 0, 0], read[0, 7, 7]) == (255, 50)


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette_with_a_transparent_entry(tmp_path, extension):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putpixel((0, 0), 0)
    image.putpixel((1, 0), 2)
    read = read_one(save(tmp_path / "a" / f"p.{extension}", image, transparency=0), background="#102030")
    assert [tuple(read[:, 0, x]) for x in range(3)] == [(0x10, 0x20, 0x30), BLUE, GREEN]


def test_palette_without_transparency(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*GREEN, *BLUE])
    assert tuple(read_one(save(tmp_path / "a" / "p.png", image))[:, 3, 3]) == GREEN


def test_one_bit(tmp_path):
    image = Image.new("1", (8, 8), 0)
    image.putpixel((2, 1), 1)
    read = read_one(save(tmp_path / "a" / "bit.png", image))
    assert read.shape == (1, 8, 8)
    assert read[0, 1, 2] == 255
    assert read.sum() == 255


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, extension):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    read = read_one(save(tmp_path / "a" / f"deep.{extension}", Image.fromarray(values)))
    np.testing.assert_array_equal(read[0], np.rint(values / 257))


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), 1),
        (np.linspace(0, 200, 64, dtype=np.float32), 255),
        (np.linspace(0, 60000, 64, dtype=np.float32), 65535),
        (np.linspace(0, 60000, 64, dtype=np.int32), 65535),
        (np.linspace(0, 1e6, 64, dtype=np.int32), 1e6),
    ],
)
def test_wide_grey_is_scaled_to_the_usual_white_above_it(tmp_path, values, white):
    read = read_one(save(tmp_path / "a" / "wide.tiff", Image.fromarray(values.reshape(8, 8))))
    np.testing.assert_allclose(read.ravel(), values / white * 255, atol=0.51)


def test_float_nan_is_black(tmp_path):
    values = np.full((8, 8), np.nan, np.float32)
    values[0, 0] = 1
    read = read_one(save(tmp_path / "a" / "nan.tiff", Image.fromarray(values)))
    assert (read[0, 0, 0], read[0, 1, 1]) == (255, 0)


def test_cmyk_jpeg(tmp_path):
    read = read_one(save(tmp_path / "a" / "print.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))
    np.testing.assert_allclose(read[:, 4, 4], RED, atol=3)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("width", [8, 16])
def test_exif_orientation_is_applied(tmp_path, extension, width):
    image = Image.new("RGB", (width, 8), "blue")
    image.paste("red", (0, 0, width, 4))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # this orientation means a quarter turn clockwise: red on the right
    read = read_one(save(tmp_path / "a" / f"turned.{extension}", image, exif=exif, quality=100))
    assert (read[0, :, 7] > 200).all()
    assert (read[2, :, 0] > 200).all()


def test_the_first_of_the_pictures_of_a_phone_s_jpeg_is_read(tmp_path):
    first, second = scene(300, 200), Image.new("RGB", (300, 200), "red")
    path = save(tmp_path / "a" / "x.jpg", first, format="MPO", save_all=True, append_images=[second], quality=95)
    expected = to_pixels(first, 3, DataConfig(image_size=8)).astype(int)
    assert np.abs(read_one(path) - expected).mean() < 2


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, RED)]
    for extension in ("gif", "webp"):
        path = save(tmp_path / extension / f"a.{extension}", frames[0], save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(read_one(path)[:, 4, 4], GREEN, atol=3)


@pytest.mark.parametrize("extension", ["png", "jpg", "JPEG", "webp", "bmp", "gif", "tif", "TIFF", "ppm", "pgm", "PbM"])
def test_every_extension_in_any_case(tmp_path, extension):
    image = Image.new("1" if extension == "PbM" else "L", (8, 8), 255)
    read = read_one(save(tmp_path / "a" / f"x.{extension}", image, format="PPM" if extension == "PbM" else None))
    np.testing.assert_allclose(read, 255, atol=1)


# Size


def test_crop_scales_the_short_side_and_takes_the_centre(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8))
    read = read_one(save(tmp_path / "a" / "wide.png", noise))
    expected = np.asarray(noise.resize((32, 8), Image.Resampling.BICUBIC))[:, 12:20]
    np.testing.assert_allclose(read.transpose(1, 2, 0), expected, atol=1)


@pytest.mark.parametrize("shape", [(8, 11), (13, 8), (8, 8), (8, 12)])
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_a_crop_that_needs_no_scaling_keeps_every_pixel(tmp_path, shape, extension):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
    read = read_one(save(tmp_path / "a" / f"x.{extension}", Image.fromarray(noise)))
    np.testing.assert_array_equal(read.transpose(1, 2, 0), noise[top : top + 8, left : left + 8])


def test_resizing_is_pillow_s_own():
    rng = np.random.default_rng(0)
    for _ in range(200):
        (width, height), size = rng.integers(1, 60, 2), tuple(map(int, rng.integers(1, 30, 2)))
        image = Image.fromarray(rng.integers(0, 256, (height, width), np.uint8))
        if max(size[1] / width, size[0] / height) != 1:
            cropped = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
            assert pixels_module._scaled(image, image.size, size, "crop") == cropped
        padded = image.copy()
        padded.thumbnail(size[::-1], Image.Resampling.BICUBIC, reducing_gap=None)
        assert pixels_module._scaled(image, image.size, size, "pad") == padded


# JPEGs that are decoded at a smaller size


def scene(width: int, height: int) -> Image.Image:
    """A picture with smooth shades, edges and some texture, the same at every size."""
    y, x = np.mgrid[:height, :width] / min(width, height)
    shades = [np.sin(3 * x + 2 * y), np.cos(5 * x * y), ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1) * 1.0]
    texture = 0.2 * np.sin(40 * x) * np.sin(31 * y)
    pixels = np.stack(shades, -1) * 0.4 + 0.5 + texture[..., None]
    return Image.fromarray((255 * np.clip(pixels, 0, 1)).astype(np.uint8))


def in_full(monkeypatch, content: bytes, **settings) -> np.ndarray:
    with monkeypatch.context() as patched:
        patched.setattr(pixels_module, "SPARE", {})
        return to_pixels(open_image(content), 3, DataConfig(**settings)).astype(int)


@pytest.mark.parametrize("resize", ["crop", "pad"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(512, 400), (401, 613), (1202, 902)])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(monkeypatch, resize, orientation, size):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    scene(*size).save(buffer, "JPEG", quality=92, exif=exif, icc_profile=profile(SPACES["Display P3"]))
    decoded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    for image_size in (24, 48, 64, 96):
        settings = {"image_size": image_size, "resize": resize}
        whole = in_full(monkeypatch, buffer.getvalue(), **settings)
        assert decoded[0] == size
        decoded.clear()
        read = to_pixels(open_image(buffer.getvalue()), 3, DataConfig(**settings))
        needed = (min if resize == "crop" else max)(size)
        factors = [factor for factor, times in pixels_module.SPARE.items() if needed >= times * image_size]
        if orientation != 1:
            factors = [factor for factor in factors if size[0] % factor == size[1] % factor == 0]
        assert decoded[0] == tuple(-(-side // max([1, *factors])) for side in size)
        decoded.clear()
        assert np.abs(read - whole).mean() < 1
    assert in_full(monkeypatch, buffer.getvalue(), image_size=24).std() > 20


def test_a_turned_jpeg_is_decoded_smaller_for_a_shape_that_is_no_square(monkeypatch):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    scene(1200, 400).save(buffer, "JPEG", quality=92, exif=exif)
    image, settings = open_image(buffer.getvalue()), {"image_size": [96, 24]}
    read = to_pixels(image, 3, DataConfig(**settings))
    assert image.size == (300, 100)
    assert np.abs(read - in_full(monkeypatch, buffer.getvalue(), **settings)).mean() < 1


def test_a_small_jpeg_and_a_png_are_decoded_in_full(monkeypatch):
    for form, side in (("JPEG", 95), ("PNG", 500)):
        buffer = io.BytesIO()
        scene(side, side).save(buffer, form)
        whole = in_full(monkeypatch, buffer.getvalue(), image_size=24)
        np.testing.assert_array_equal(to_pixels(open_image(buffer.getvalue()), 3, DataConfig(image_size=24)), whole)


# Small images


def test_crop_scales_a_small_image_up(tmp_path):
    assert (read_one(save(tmp_path / "a" / "small.png", Image.new("L", (4, 6), 90))) == 90).all()


def test_pad_only_shrinks_and_centres(tmp_path):
    small = read_one(save(tmp_path / "a" / "s.png", Image.new("RGB", (4, 2), BLUE)), resize="pad", background="red")
    assert (small[:, 3:5, 2:6] == np.array(BLUE)[:, None, None]).all()
    assert (small[2] == 255).sum() == 8
    assert tuple(small[:, 0, 0]) == RED
    large = read_one(save(tmp_path / "b" / "l.png", Image.new("RGB", (64, 32), BLUE)), resize="pad", background="red")
    assert (large[:, 2:6] == np.array(BLUE)[:, None, None]).all()
    assert (large[2] == 255).sum() == 32
    thin = read_one(save(tmp_path / "c" / "t.png", Image.new("RGB", (1000, 1), BLUE)), resize="pad", background="red")
    assert (thin[2] == 255).sum() == 8


def test_pad_of_grey_images_takes_the_grey_of_the_background(tmp_path):
    read = read_one(save(tmp_path / "a" / "s.png", Image.new("L", (4, 4), 7)), resize="pad", background="#646464")
    assert (read[0, 0, 0], read[0, 4, 4]) == (100, 7)


# Damage


def test_every_kind_of_damage_is_skipped(tmp_path, caplog):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for extension in ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "avif"):
        whole = save(
            tmp_path / "whole" / f"x.{extension}", noise, **({} if extension == "ppm" else {"exif": exif})
        ).read_bytes()
        for k in range(40):
            content = bytearray(whole[: rng.integers(len(whole)) if k % 4 == 0 else None])
            for at in rng.integers(0, max(1, min(len(content), (40, 200, 10**6)[k % 3])), 4):
                content[at : at + 1] = [rng.integers(256)]
            (tmp_path / "damaged").mkdir(exist_ok=True)
            (tmp_path / "damaged" / f"{k}.{extension}").write_bytes(content)
    train, val = load(tmp_path / "damaged", channels=3)
    assert 0 < len(train) + len(val) < 320
    assert all(message.startswith("skipped ") for message in caplog.messages)


def test_damage_to_the_exif_is_none_to_the_image(tmp_path):
    image = Image.new("RGB", (8, 8), GREEN)
    for k, exif in enumerate(
        (b"Exif\0\0", b"Exif\0\0XX*\0\1", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\4\0\0\0\xff")
    ):
        read = read_one(save(tmp_path / str(k) / "a" / "x.jpg", image, exif=exif, quality=100))
        np.testing.assert_allclose(read[:, 4, 4], GREEN, atol=3)


# Large images


def test_large_images_are_in_memory_one_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(pixels_module, "LARGE_PIXELS", 100)
    save(folder / "cat" / "large.png", Image.new("L", (11, 10)))
    train, _ = load(folder, channels=1, cache_gb=0, val_fraction=0)
    large, small = train.names.index("cat/large.png"), train.names.index("cat/0.png")
    with ThreadPoolExecutor(2) as pool:
        with pixels_module._one_large:  # as by a thread with another image
            assert pool.submit(train.read, small).result(60) is not None
            waiting = pool.submit(train.read, large)
            with pytest.raises(StillWaiting):
                waiting.result(0.2)
        assert waiting.result(60) is not None


def test_an_image_in_strips_is_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = {
        "rgba.png": rng.integers(0, 256, (31, 20, 4), np.uint8),
        "la.png": rng.integers(0, 256, (31, 20, 2), np.uint8),
        "deep.png": rng.integers(0, 65536, (31, 20), np.uint16),
        "float.tif": np.where(np.eye(31, 20), np.nan, rng.random((31, 20), np.float32) * 1000),
        "int.tif": rng.integers(-10, 1 << 20, (31, 20), np.int32),
    }
    for name, pixels in images.items():
        save(tmp_path / "x" / name, Image.fromarray(pixels.astype(np.float32) if name == "float.tif" else pixels))
    palette = Image.fromarray(rng.integers(0, 256, (31, 20, 3), np.uint8)).quantize(16)
    save(tmp_path / "x" / "palette.png", palette, transparency=3)
    save(tmp_path / "held" / "x.png")
    read = []
    for strip_pixels in (1 << 20, 50):
        monkeypatch.setattr(deep, "STRIP_PIXELS", strip_pixels)
        train, _ = load(tmp_path / "x", val_source=str(tmp_path / "held"), channels=3, background="#306090")
        assert len(train) == 6
        read.append(train.__getitems__(range(6))[0])
        assert load(tmp_path / "x", val_source=str(tmp_path / "held"))[0].channels == 3
    assert torch.equal(*read)


def test_a_very_wide_image_takes_no_minutes(tmp_path):
    wide = tmp_path / "a" / "wide.pgm"
    wide.parent.mkdir()
    wide.write_bytes(b"P5\n60000000 1\n255\n" + bytes(60_000_000))
    start = time.monotonic()
    assert read_one(wide).max() == 0
    assert time.monotonic() - start < 10


# Pillow's warnings and log lines


def odd_image(path: Path) -> Path:
    """An image that loads, but whose damaged EXIF data make Pillow warn."""
    return save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\0\0\0\xff\0\0\0")


def host_settings() -> tuple:
    pillow = logging.getLogger("PIL")
    return list(warnings.filters), pillow.level, pillow.propagate, list(pillow.handlers), list(pillow.filters)


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_pillow_is_quiet_only_while_an_image_is_decoded(tmp_path, cache_gb, caplog):
    path = odd_image(tmp_path / "x" / "0.jpg")
    odd_image(tmp_path / "x" / "1.jpg")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        before = host_settings()
        for part in load(tmp_path / "x", cache_gb=cache_gb):
            part.__getitems__([0])
        assert host_settings() == before
        assert shown == []
        with Image.open(path) as image:
            image.getexif()
        assert shown  # otherwise the image is not odd
    caplog.clear()
    logging.getLogger("PIL.TiffImagePlugin").error("as Pillow says it")
    assert caplog.messages == ["as Pillow says it"]


def test_pillow_is_quiet_as_long_as_any_thread_decodes():
    before = host_settings()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as mine:
        mine.enter_context(pixels_module.quiet_pillow)
        pool.submit(_inside_once).result()
        inside = host_settings()
        assert inside != before
        with warnings.catch_warnings(record=True) as shown:
            warnings.warn_explicit("odd", UserWarning, "PIL/x.py", 1, module="PIL.TiffImagePlugin")
            warnings.warn_explicit("another's", UserWarning, "x.py", 1, module="x")
        assert [str(warning.message) for warning in shown] == ["another's"]
    assert host_settings() == before


def _inside_once() -> None:
    with pixels_module.quiet_pillow:
        pass
