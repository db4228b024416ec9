"""Every format is read from a real file; a plug-in is named where it is missing."""

import io

import numpy as np
import pytest
from data.files import load, read_one, save
from PIL import Image

from vqgen.data import formats
from vqgen.data.formats import EXTENSIONS, PLUGINS, formats_of, plugin_hint

OPTIONS: dict[str, dict] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True},
    "ICO": {"sizes": [(8, 8)]},
}
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
JXL = b"\xff\x0a" + bytes(64)


def psd(pixels: np.ndarray) -> bytes:
    """An uncompressed Photoshop file of RGB pixels (H, W, 3)."""
    height, width, _ = pixels.shape
    header = b"8BPS" + (1).to_bytes(2, "big") + bytes(6) + (3).to_bytes(2, "big")
    header += height.to_bytes(4, "big") + width.to_bytes(4, "big") + (8).to_bytes(2, "big") + (3).to_bytes(2, "big")
    return header + bytes(4) + bytes(4) + bytes(4) + bytes(2) + pixels.transpose(2, 0, 1).tobytes()


@pytest.mark.parametrize("extension", [extension for extension in EXTENSIONS if extension not in PLUGINS])
@pytest.mark.parametrize("upper", [False, True])
def test_every_extension_is_read_in_any_case(tmp_path, extension, upper):
    y, x = np.mgrid[:8, :8].astype(np.uint8)
    pixels = np.stack([30 * x, 30 * y, 255 - 30 * x], -1)
    path = tmp_path / "a" / f"x{extension.upper() if upper else extension}"
    image = Image.fromarray(pixels)
    if extension == ".psd":
        path.parent.mkdir()
        path.write_bytes(psd(pixels))
    elif extension == ".pfm":  # Pillow writes grey ones only
        save(path, Image.fromarray(pixels[..., 0].astype(np.float32) / 255), format="PPM")
        pixels = np.repeat(pixels[..., :1], 3, -1)
    elif extension in (".pgm", ".pbm"):
        grey = Image.fromarray(pixels[..., 0] if extension == ".pgm" else pixels[..., 0] > 99)
        save(path, grey, format="PPM")
        pixels = np.repeat(np.asarray(grey.convert("L"))[..., None], 3, -1)
    else:
        form = Image.registered_extensions()[extension]
        save(path, image, format=form, **OPTIONS.get(form, {}))
    read = read_one(path, channels=3).transpose(1, 2, 0)
    atol = 10 if extension in (".jpg", ".jpeg", ".jpe", ".jfif", ".avif") else 0
    np.testing.assert_allclose(read.astype(int), pixels, atol=atol)


def test_only_a_file_named_so_is_tried_as_a_tga(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "TGA")
    for name in ("x.png", "x.tga.jpg", "x"):
        assert "TGA" not in formats_of(image.getvalue(), name)
    assert "TGA" in formats_of(image.getvalue(), "folder/X.TGA")


def test_a_damaged_png_is_no_tga(tmp_path):
    path = save(tmp_path / "a" / "x.tga", Image.new("RGB", (8, 8), "red"), format="PNG")
    content = path.read_bytes()
    save(tmp_path / "held" / "y.png")
    save(tmp_path / "a" / "y.png")
    for damaged in (content[:30], content[:40] + bytes(40) + content[80:], b"", b"II*\0" + bytes(40)):
        path.write_bytes(damaged)
        assert load(tmp_path / "a", val_source=str(tmp_path / "held"))[0].names == ["y.png"]


# Plug-ins


def test_a_missing_plug_in_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    assert plugin_hint(".HEIC") == plugin_hint(".hif") == "pip install pillow-heif"
    assert plugin_hint(".jxl") == "pip install pillow-jxl-plugin"
    assert plugin_hint(".xcf") is plugin_hint(".png") is plugin_hint("") is None
    for k, content in enumerate((HEIC, JXL)):
        save(tmp_path / "photos" / f"{k}0.png")
        save(tmp_path / "photos" / f"{k}1.png")
        (tmp_path / "photos" / f"{k}2.jpg").write_bytes(content)  # a phone's photo under another name
    load(tmp_path / "photos", val_fraction=0)
    assert any("pip install pillow-heif" in message for message in caplog.messages)
    with pytest.raises(OSError, match="pip install pillow-jxl-plugin"):
        formats_of(JXL)


def test_an_installed_plug_in_needs_no_hint(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: object())
    assert plugin_hint(".heic") is plugin_hint(".jxl") is None
    monkeypatch.undo()
    for extension, package in PLUGINS.items():
        assert (extension in EXTENSIONS) == (plugin_hint(extension) is None), package


@pytest.mark.parametrize("extension", PLUGINS)
def test_an_installed_plug_in_reads_its_files_under_any_name(tmp_path, extension):
    if plugin_hint(extension) is not None:
        pytest.skip(f"{plugin_hint(extension)} to test this")
    image = Image.fromarray(np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)).convert("RGB")
    form = "JXL" if extension == ".jxl" else "HEIF"
    formats_of(JXL if form == "JXL" else HEIC)  # registers the plug-in, which then also writes
    for name in (f"x{extension}", f"x{extension.upper()}", "x.jpg"):
        path = save(tmp_path / name / "a" / name, image, format=form, quality=95)
        read = read_one(path, image_size=64, channels=3)
        np.testing.assert_allclose(read[0].astype(int), np.asarray(image)[..., 0], atol=12)


def test_avif_needs_no_plug_in(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "AVIF")
    assert "AVIF" in formats_of(image.getvalue())
    assert "AVIF" in formats_of(b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf" + bytes(8))
