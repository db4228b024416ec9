"""ICC profiles that the tests put into images, and what their colours are in sRGB, by the spaces' own formulas."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

D50, D65 = np.array([0.9642, 1, 0.8249]), (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass
class Space:
    """A colour space: the chromaticities of its primaries, its curve to light, and that curve's ICC tag."""

    primaries: tuple
    to_light: Callable[[np.ndarray], np.ndarray]
    curve: bytes


def parametric(*parameters: float) -> bytes:
    """(aX + b)^g from d on, cX below."""
    return b"para" + bytes(4) + struct.pack(">HH", 3, 0) + b"".join(map(fixed, parameters))


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def srgb_to_light(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)


def rec2020_to_light(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0.0812, ((values + 0.0993) / 1.0993) ** (1 / 0.45), values / 4.5)


SPACES = {
    "Display P3": Space(
        ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
        srgb_to_light,
        parametric(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),
    ),
    "Adobe RGB": Space(
        ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
        lambda values: values ** (563 / 256),
        b"curv" + bytes(4) + struct.pack(">IH", 1, 563),
    ),
    "Rec2020": Space(
        ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
        rec2020_to_light,
        parametric(1 / 0.45, 1 / 1.0993, 0.0993 / 1.0993, 1 / 4.5, 0.0812),
    ),
}
LINEAR = b"curv" + bytes(8)


def profile(space: Space) -> bytes:
    """The ICC profile of an RGB space with the white of D65."""
    to_xyz = adapted() @ matrix(space.primaries)
    tags = {name: b"XYZ " + bytes(4) + b"".join(map(fixed, to_xyz[:, i])) for i, name in enumerate((b"r", b"g", b"b"))}
    return icc(
        b"RGB ",
        b"mntr",
        b"XYZ ",
        {name + b"XYZ": tag for name, tag in tags.items()} | {name + b"TRC": space.curve for name in tags},
    )


def grey_profile(curve: bytes) -> bytes:
    return icc(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": curve})


def cmyk_profile(labs: np.ndarray) -> bytes:
    """A printer whose inks, each at nothing or in full, give these colours (2, 2, 2, 2, 3) in Lab."""
    identity = b"".join(fixed(x) for x in np.eye(3).ravel())
    encoded = np.stack([labs[..., 0] * 652.8, (labs[..., 1] + 128) * 256, (labs[..., 2] + 128) * 256], -1).round()
    ramp = struct.pack(">HH", 0, 65535)
    table = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + identity + struct.pack(">HH", 2, 2)
    table += ramp * 4 + encoded.astype(">u2").tobytes() + ramp * 3
    return icc(b"CMYK", b"prtr", b"Lab ", {b"A2B0": table})


def icc(space: bytes, kind: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": b"XYZ " + bytes(4) + b"".join(map(fixed, D50)), **tags}
    places, content = b"", b""
    for name, tag in tags.items():
        places += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    body = struct.pack(">I", len(tags)) + places + content
    version = b"\x04\x20\0\0" if kind == b"mntr" else b"\x02\x40\0\0"
    header = struct.pack(">I4s4s4s4s4s", 128 + len(body), bytes(4), version, kind, space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + b"".join(map(fixed, D50))
    return header.ljust(128, b"\0") + body


def matrix(primaries: tuple) -> np.ndarray:
    """From light of a space's primaries to XYZ."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    x, y = D65
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])


def adapted() -> np.ndarray:
    """Bradford's adaptation from the white of D65 to that of D50."""
    x, y = D65
    share = BRADFORD @ D50 / (BRADFORD @ np.array([x / y, 1, (1 - x - y) / y]))
    return np.linalg.inv(BRADFORD) @ np.diag(share) @ BRADFORD


def in_srgb(pixels: np.ndarray, space: Space) -> np.ndarray:
    """What uint8 colours (..., 3) of a space are in sRGB, as float from 0 to 255; colours outside are clipped."""
    light = space.to_light(pixels / 255) @ (np.linalg.inv(matrix(SRGB)) @ matrix(space.primaries)).T
    return encoded(light)


def encoded(light: np.ndarray) -> np.ndarray:
    """Light from 0 to 1 in the numbers of sRGB, from 0 to 255."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)


def lab_in_srgb(lab: np.ndarray) -> np.ndarray:
    """Lab colours (..., 3) under D50 in sRGB, from 0 to 255."""
    y = (lab[..., 0] + 16) / 116
    roots = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    xyz = D50 * np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29))
    return encoded(xyz @ np.linalg.inv(adapted() @ matrix(SRGB)).T)
