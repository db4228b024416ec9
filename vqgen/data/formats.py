"""Which image formats are read: by Pillow itself, and by its plug-ins for HEIC and JPEG XL if they are installed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

# All that Pillow can tell by a file's first bytes, and that is safe to try: its EPS, for example, runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "PSD", "DIB")

PLUGINS = {  # extension: the package with Pillow's plug-in for it
    ".heic": "pillow-heif",
    ".heif": "pillow-heif",
    ".hif": "pillow-heif",
    ".jxl": "pillow-jxl-plugin",
}
_MODULES = {"pillow-heif": ("pillow_heif", "HEIF"), "pillow-jxl-plugin": ("pillow_jxl", "JXL")}  # module, Pillow's name
_FAMILIES = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}  # of HEIC
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


def plugin_hint(extension: str) -> str | None:
    """How to make this installation read files of an extension, such as `pip install pillow-heif`.

    None if it reads them already, or if no plug-in is known.
    """
    package = PLUGINS.get(extension.lower())
    return None if package is None or _installed(package) else f"pip install {package}"


def formats_of(content: bytes, name: str = "") -> tuple[str, ...]:
    """Pillow's names of the formats that a file may have.

    Args:
        content: the file, or at least its first 32 bytes.
        name: the file's name. TGA has no mark at its beginning, so Pillow would take other damaged files for it; it is
            tried for names that end in .tga only.

    Raises:
        OSError: the file needs a plug-in that is not installed; the message names it.
    """
    package = _plugin_of(content)
    if package is None:
        return (*FORMATS, "TGA") if name.lower().endswith(".tga") else FORMATS
    module, format_name = _MODULES[package]
    if not _installed(package):
        raise OSError(f"{format_name} is read by Pillow's plug-in only: pip install {package}")
    plugin = importlib.import_module(module)  # pillow_jxl registers itself
    if package == "pillow-heif":
        plugin.register_heif_opener()
    return (format_name, *FORMATS)  # AVIF has the mark of a family of HEIC's, too


def _plugin_of(content: bytes) -> str | None:
    """The package whose plug-in reads a file that begins like this; None if Pillow itself does, or nothing."""
    if content.startswith(_JXL):
        return "pillow-jxl-plugin"
    if content[4:8] == b"ftyp" and content[8:12] in _FAMILIES and b"avif" not in content[8:32]:
        return "pillow-heif"
    return None


def _installed(package: str) -> bool:
    return find_spec(_MODULES[package][0]) is not None


# Lower-case extensions of the files that this installation reads.
EXTENSIONS: tuple[str, ...] = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".pnm"),
    *(".pfm", ".apng", ".jpe", ".jfif", ".dib", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".ico", ".tga", ".psd"),
    *(extension for extension, package in PLUGINS.items() if _installed(package)),
)
