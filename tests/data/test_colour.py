"""Colours in profiles become those of sRGB, computed here by the spaces' formulas."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data.files import load, read_one, save
from data.profiles import LINEAR, SPACES, cmyk_profile, encoded, grey_profile, in_srgb, lab_in_srgb, profile
from PIL import Image, ImageCms

from vqgen.data import colour
from vqgen.data.colour import to_srgb


@pytest.fixture(autouse=True)
def nothing_cached():
    colour._conversion.cache_clear()
    colour._has_lcms.cache_clear()


def colours() -> np.ndarray:
    """64 colours (8, 8, 3), from dark to light and from grey to pure."""
    values = np.array([0, 90, 170, 255], np.uint8)
    return np.stack(np.meshgrid(values, values, values), -1).reshape(8, 8, 3)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("extension", ["png", "tif", "webp", "jpg"])
def test_a_profile_s_colours_become_those_of_srgb(tmp_path, space, extension):
    pixels = colours() if extension != "jpg" else np.broadcast_to(np.array([130, 170, 150], np.uint8), (8, 8, 3)).copy()
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(extension, {})
    path = tmp_path / "a" / f"x.{extension}"
    save(path, Image.fromarray(pixels), icc_profile=profile(SPACES[space]), **lossless)
    read = read_one(path).transpose(1, 2, 0)
    expected = in_srgb(pixels, SPACES[space])
    assert np.abs(expected - pixels).max() > 5  # otherwise this tests nothing
    np.testing.assert_allclose(read, expected, atol=1 if extension != "jpg" else 3)


def test_a_resized_image_has_srgb_s_colours_too(tmp_path):
    pixels = np.broadcast_to(np.array([200, 80, 30], np.uint8), (40, 30, 3))
    path = save(tmp_path / "a" / "x.png", Image.fromarray(pixels), icc_profile=profile(SPACES["Display P3"]))
    for resize in ("crop", "pad"):
        read = read_one(path, resize=resize, background="#0a141e")
        np.testing.assert_allclose(read[:, 4, 4], in_srgb(pixels[0, 0], SPACES["Display P3"]), atol=1)
    assert tuple(read[:, 0, 0]) == (10, 20, 30)  # the padding is sRGB already


def test_opacity_stays(tmp_path):
    pixels = np.concatenate([colours(), np.full((8, 8, 1), 128, np.uint8)], -1)
    pixels[0, 0, 3], pixels[7, 7, 3] = 0, 255
    path = save(tmp_path / "a" / "x.png", Image.fromarray(pixels), icc_profile=profile(SPACES["Rec2020"]))
    read = read_one(path, background="#204060").transpose(1, 2, 0)
    opacity = pixels[..., 3:] / 255
    expected = opacity * in_srgb(pixels[..., :3], SPACES["Rec2020"]) + (1 - opacity) * np.array([0x20, 0x40, 0x60])
    np.testing.assert_allclose(read, expected, atol=2)


def test_a_palette_has_its_profile_s_colours(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 80, 30])
    read = read_one(save(tmp_path / "a" / "x.png", image, icc_profile=profile(SPACES["Adobe RGB"])))
    np.testing.assert_allclose(read[:, 4, 4], in_srgb(np.array([200, 80, 30]), SPACES["Adobe RGB"]), atol=1)


def test_grey_stays_grey_and_takes_the_tone_curve(tmp_path):
    ramp = (np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)
    image, adobe = Image.fromarray(ramp), SPACES["Adobe RGB"]
    cases = [
        (image, grey_profile(LINEAR), encoded(ramp / 255)),
        (image, profile(adobe), in_srgb(np.stack([ramp] * 3, -1), adobe)[..., 0]),
        (image.convert("LA"), grey_profile(LINEAR), encoded(ramp / 255)),
        (image, profile(SPACES["Display P3"]), ramp),
    ]
    for number, (stored, icc, expected) in enumerate(cases):
        read = read_one(save(tmp_path / str(number) / "a" / "x.png", stored, icc_profile=icc))
        assert read.shape == (1, 8, 8)
        np.testing.assert_allclose(read[0], expected, atol=1)


@pytest.mark.parametrize("extension", ["jpg", "tif"])
def test_inks_have_the_colours_that_the_printer_s_profile_says(tmp_path, extension):
    labs = np.zeros((2, 2, 2, 2, 3))  # all inks together are black
    labs[0, 0, 0, 0], labs[1, 0, 0, 0], labs[0, 1, 0, 0] = colours = (100, 0, 0), (60, -30, -20), (50, 40, 5)
    for k, (inks, lab) in enumerate(zip([(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0)], colours, strict=True)):
        image, options = Image.new("CMYK", (32, 32), inks), {"quality": 100} if extension == "jpg" else {}
        path = save(tmp_path / str(k) / "a" / f"x.{extension}", image, icc_profile=cmyk_profile(labs), **options)
        read = read_one(path, channels=3)
        np.testing.assert_allclose(read[:, 4, 4], lab_in_srgb(np.array(lab)), atol=3)


def test_a_tiff_of_lab_colours(tmp_path):
    for k, (lightness, a, b) in enumerate([(100, 0, 0), (60, -30, -20), (50, 40, 5)]):
        stored = Image.new("LAB", (40, 40), (round(lightness * 2.55), a + 128, b + 128))
        read = read_one(save(tmp_path / str(k) / "a" / "x.tif", stored), channels=3)
        np.testing.assert_allclose(read[:, 4, 4], lab_in_srgb(np.array([lightness, a, b])), atol=3)


def test_a_profile_that_is_broken_or_for_other_channels_changes_nothing(tmp_path):
    whole = profile(SPACES["Rec2020"])
    broken = [b"no profile", whole[:150], whole[:-60], bytes(len(whole))]
    others = [grey_profile(LINEAR), cmyk_profile(np.zeros((2, 2, 2, 2, 3)))]
    for number, icc in enumerate(broken + others):
        path = save(tmp_path / str(number) / "a" / "x.png", Image.fromarray(colours()), icc_profile=icc)
        np.testing.assert_array_equal(read_one(path).transpose(1, 2, 0), colours())


def test_srgb_costs_nothing(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert colour._conversion(icc, "RGB") is colour._conversion(icc, "L") is None
    path = save(tmp_path / "a" / "x.png", Image.fromarray(colours()), icc_profile=icc)
    np.testing.assert_array_equal(read_one(path).transpose(1, 2, 0), colours())


def test_many_images_share_one_conversion_in_all_threads(monkeypatch):
    built, build = [], ImageCms.buildTransform
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *args, **flags: built.append(args) or build(*args, **flags))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(24)]
    alone = [np.asarray(to_srgb(image, profile(SPACES["Rec2020"]))) for image in images]
    assert len(built) == 1
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: np.asarray(to_srgb(image, profile(SPACES["Rec2020"]))), images * 4))
    assert len(built) == 1
    np.testing.assert_array_equal(together, alone * 4)


def test_a_pillow_without_littlecms_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(colour.features, "check", lambda feature: False)
    for k in range(4):
        image = Image.fromarray(colours() // (k + 1))
        save(tmp_path / "a" / f"{k}.png", image, icc_profile=profile(SPACES["Rec2020"]))
    train, _ = load(tmp_path / "a", val_fraction=0)
    np.testing.assert_array_equal(train.read(0).transpose(1, 2, 0), colours() // (int(train.names[0][0]) + 1))
    assert caplog.messages == ["this Pillow was built without LittleCMS, so the colour profiles of images are ignored"]


def test_modes_without_a_profile_are_as_pillow_converts_them():
    buffer = io.BytesIO()
    Image.fromarray(colours()).save(buffer, "PNG")
    for mode, result in {
        "1": "L",
        "L": "L",
        "LA": "LA",
        "P": "RGB",
        "RGB": "RGB",
        "RGBA": "RGBA",
        "CMYK": "RGB",
    }.items():
        image = Image.fromarray(colours()).convert(mode)
        converted = to_srgb(image, None)
        assert converted.mode == result
        np.testing.assert_array_equal(np.asarray(converted), np.asarray(image.convert(result)))
